"""What a steering sweep consists of: layers and coefficients read from text, conditions built.

A sweep is a list of conditions. Every condition answers the same questions with the same seeds, so
that differences between conditions are paired. Nothing here needs a model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pvec.errors import InputError
from pvec.models.decoder import check_layer
from pvec.settings.commands import SteerSettings
from pvec.steering.instructions import SteeringVector, instructions, random_like
from pvec.types import Dose, Instruction, Operator, Percentile, Positions

AUTO_DEPTHS = (0.35, 0.45, 0.55, 0.65, 0.75)
"""Where ``--layer auto`` looks, as shares of the depth: a handful around 55 %, where the paper's
two models (layers 20 of 28 and 16 of 32) and the bundled one steer best."""

Role = Literal["baseline", "prompt_pos", "prompt_neg", "steered", "random"]
"""What a condition can be, in the order of tables."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a condition lies in the sweep; what is measured of it is kept beside these fields.

    ``name`` is unique in a run and for people; nothing else is read out of it. ``control_of`` is
    the ``vector`` of the steered conditions whose control a random condition is. ``operator`` is
    None where nothing is steered, ``positions`` where they are the run's. Where the limits of a cap
    or floor are a percentile, ``percentile`` is its name (``pos50``) and ``coef`` its number.
    """

    name: str
    role: Role
    vector: str = ""
    layers: tuple[int, ...] = ()
    coef: float = 0.0
    operator: Operator | None = None
    control_of: str = ""
    percentile: str = ""
    positions: Positions | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The fields above by name, of a condition and of all that is measured of it."""
        return {field.name: getattr(self, field.name) for field in fields(Place)}

    @property
    def where(self) -> str:
        """The layers as ``layers_label`` writes them, and positions that are not the run's."""
        return layers_label(self.layers) + (f", {self.positions}" if self.positions else "")

    def controls(self, other: Place) -> bool:
        """Whether this is the random vector at the very point where ``other`` steers."""
        return (
            self.role == "random"
            and other.role == "steered"
            and (self.control_of, self.layers, self.coef, self.operator, self.positions)
            == (other.vector, other.layers, other.coef, other.operator, other.positions)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition(Place):
    """One point of the sweep, a control, or a baseline, with what steers it."""

    steering: tuple[Instruction, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Return the JSON form that a response's id covers."""
        covered = ("name", "role", "vector", "layers", "coef")
        return {**{name: self.place[name] for name in covered}, "layers": list(self.layers)}

    def labels(self) -> dict[str, Any]:
        """Return what is stored beside ``identity`` and follows from it and the steering."""
        labels: dict[str, Any] = {"operator": self.operator, "control_of": self.control_of}
        own = {"percentile": self.percentile, "positions": self.positions}
        return {**labels, **{name: value for name, value in own.items() if value}}


def stored_condition(stored: Mapping[str, Any]) -> Condition:
    """Return the condition of a stored response, without its instructions.

    Runs of pvec 0.1 stored neither operator nor ``control_of``; their labels had one fixed form,
    from which both follow.
    """
    steered = stored["role"] in {"steered", "random"}
    if steered and "operator" not in stored:
        first = str(stored["name"]).rpartition(" · ")[2].partition(" ")[0]
        vectors = str(stored["vector"]).split(" + ")
        control_of = " + ".join(vector.removeprefix("random like ") for vector in vectors)
        stored = {
            **stored,
            "operator": first if first in {"cap", "ablate"} else "add",
            "control_of": control_of if stored["role"] == "random" else "",
        }
    known = {field.name: stored[field.name] for field in fields(Place) if field.name in stored}
    return Condition(**{**known, "layers": tuple(stored["layers"]), "coef": float(stored["coef"])})


def parse_coefs(text: str) -> tuple[float, ...]:
    """Read ``-2,-1,0,1,2`` or ``0:2:0.5`` (both ends included) into ascending, distinct numbers.

    Raises ``InputError`` naming the part that does not parse.
    """
    values = {value + 0.0 for part in _parts(text, "--coef") for value in _coef_part(part, text)}
    return tuple(sorted(values))


def parse_doses(text: str) -> tuple[Dose, ...]:
    """Read coefficients as ``parse_coefs`` does, or percentiles of one class: ``p25,p50,p75``.

    Raises ``InputError`` for numbers and percentiles, or percentiles of several classes, in one
    list: they have no common axis.
    """
    percentiles = [Percentile.parse(part) for part in text.split(",")]
    known = sorted(filter(None, percentiles), key=lambda percentile: percentile.percent)
    if not known:
        return parse_coefs(text)
    if len(known) < len(percentiles) or len({percentile.of for percentile in known}) > 1:
        raise InputError(
            f"--coef {text!r} mixes percentiles of one kind with something else: give numbers, or "
            f"percentiles of one class, such as p25,p50,p75 or pos25,pos50."
        )
    return tuple(dict.fromkeys(known))


def parse_layers(text: str, *, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Read which layers to steer at, each choice a tuple of layers steered at once.

    ``20``; ``3,4``; ``12:24:2`` (both ends included); ``3+4`` (at once); ``all`` (every layer at
    once); ``auto`` (``AUTO_DEPTHS``). Raises ``InputError`` for text that does not parse and
    ``ModelError`` for a layer that the model does not have.
    """
    if text.strip() == "auto":
        near = {min(num_layers, max(1, round(share * num_layers))) for share in AUTO_DEPTHS}
        return tuple((layer,) for layer in sorted(near))
    if text.strip() == "all":
        return (tuple(range(1, num_layers + 1)),)
    choices = [choice for part in _parts(text, "--layer") for choice in _layer_part(part, text)]
    for layer in itertools.chain(*choices):
        check_layer(layer, num_layers)
    return tuple(dict.fromkeys(choices))


def evaluation_conditions(
    vectors: Sequence[SteeringVector],
    steer: SteerSettings,
    *,
    num_layers: int,
    seed: int,
    prompts: bool = True,
) -> list[Condition]:
    """Return what ``steer-eval`` compares: unsteered, steered, random controls, prompted.

    ``prompts`` says whether there are system prompts that ask for the trait. ``seed`` is that of
    the first random control. Raises what ``steered_conditions`` raises.
    """
    conditions = [Condition(name="unsteered", role="baseline")]
    if vectors:
        conditions += steered_conditions(vectors, steer, num_layers=num_layers)
    if vectors and steer.random_control:
        random = [random_like(vector, seed=seed + i) for i, vector in enumerate(vectors)]
        conditions += steered_conditions(random, steer, num_layers=num_layers, control_of=vectors)
    if steer.prompt_baseline and prompts:
        conditions.append(Condition(name="prompted for", role="prompt_pos"))
        conditions.append(Condition(name="prompted against", role="prompt_neg"))
    return conditions


def steered_conditions(
    vectors: Sequence[SteeringVector],
    steer: SteerSettings,
    *,
    num_layers: int,
    control_of: Sequence[SteeringVector] = (),
) -> list[Condition]:
    """Return one condition per vector (or all of them together), choice of layers and coefficient.

    ``control_of`` are the vectors whose random controls ``vectors`` are, one for each. Coefficient
    0 of ``add`` is the unsteered baseline and is left out here. Raises ``InputError`` or
    ``ModelError`` for texts, layers, coefficients and units that cannot be used.
    """
    every = range(len(vectors))
    return [
        steered_condition(
            [vectors[i] for i in group],
            steer,
            layers=layers,
            coef=coef,
            control_of=group_label([control_of[i] for i in group]) if control_of else "",
        )
        for group in ([every] if steer.together else [[i] for i in every])
        for layers in group_layers([vectors[i] for i in group], steer, num_layers=num_layers)
        for coef in _coefs(steer)
    ]


def single_layer(steer: SteerSettings) -> int | None:
    """Return the layer of settings that name one, for vector files that do not say theirs."""
    return int(steer.layer) if steer.layer.strip().isdecimal() else None


def steers_everywhere(steer: SteerSettings) -> bool:
    """Whether every layer is steered that the vector has a direction for."""
    return steer.incremental or steer.layer.strip() == "all"


def group_layers(
    group: Sequence[SteeringVector], steer: SteerSettings, *, num_layers: int
) -> list[tuple[int, ...]]:
    """Return the choices of layers that the settings ask for (see ``parse_layers``); "all" are
    those at which every vector has a direction.
    """
    if steer.incremental and steer.layer not in {"auto", "all"}:
        raise InputError(
            f"--incremental steers every layer and cannot be combined with --layer {steer.layer}: "
            f"omit one of them."
        )
    choices = parse_layers("all" if steer.incremental else steer.layer, num_layers=num_layers)
    if not steers_everywhere(steer):
        return list(choices)
    return [tuple(n for n in layers if all(v.has(n) for v in group)) for layers in choices]


def steered_condition(
    group: Sequence[SteeringVector],
    steer: SteerSettings,
    *,
    layers: tuple[int, ...],
    coef: Dose,
    control_of: str = "",
    positions: Positions | None = None,
) -> Condition:
    """Return the condition that steers with a group of vectors at once; ``positions`` where they
    are not those of the settings."""
    label = group_label(group)
    operator = f"{steer.operator} " if steer.operator != "add" else ""
    unit = " norms" if steer.coef_unit == "norm" else ""
    percentile = str(coef) if isinstance(coef, Percentile) else ""
    number = coef.percent if isinstance(coef, Percentile) else coef
    amount = "" if steer.operator == "ablate" else percentile or f"coef {number:g}{unit}"
    return Condition(
        name=f"{label} · {layers_label(layers)} · {operator}{amount}".strip()
        + (f" · {positions}" if positions else ""),
        role="random" if control_of else "steered",
        vector=label,
        layers=layers,
        coef=number,
        operator=steer.operator,
        control_of=control_of,
        percentile=percentile,
        positions=positions,
        steering=instructions(
            group,
            layers,
            coef=coef,
            positions=positions or steer.positions,
            operator=steer.operator,
            unit=steer.coef_unit,
        ),
    )


def group_label(group: Sequence[SteeringVector]) -> str:
    """Return what a group of vectors is called that steer together."""
    return " + ".join(vector.label for vector in group)


def layers_label(layers: Sequence[int]) -> str:
    """Return how a choice of layers is written: ``layer 20``, ``layers 3+4``, ``layers 1-28``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + "+".join(str(layer) for layer in layers)


def _coefs(steer: SteerSettings) -> tuple[Dose, ...]:
    if steer.operator == "ablate":
        return (1.0,)  # an ablation takes no coefficient
    coefs = parse_doses(steer.coef)
    return tuple(coef for coef in coefs if coef != 0) if steer.operator == "add" else coefs


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text!r} has an empty entry: write numbers with commas.")
    return parts


def _coef_part(part: str, text: str) -> list[float]:
    numbers = [_number(chunk, part, text) for chunk in part.split(":")]
    if len(numbers) == 1:
        return numbers
    if len(numbers) != 3 or numbers[2] <= 0 or numbers[1] < numbers[0]:
        raise InputError(
            f"--coef {text!r} does not parse at {part!r}: a range is FROM:TO:STEP with a step "
            f"above 0, for example 0:2:0.5."
        )
    first, last, step = numbers
    # A little slack, so that 0:0.3:0.1 reaches 0.3 although 3 x 0.1 is above it in binary.
    count = math.floor((last - first) / step + 1e-9) + 1
    return [round(first + i * step, 10) for i in range(count)]


def _number(chunk: str, part: str, text: str) -> float:
    try:
        value = float(chunk)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        where = f" (in {part!r})" if chunk != part else ""
        raise InputError(
            f"--coef {text!r} does not parse: {chunk!r}{where} is not a number. "
            f"Write for example --coef -2,-1,0,1,2 or --coef 0:2:0.5."
        )
    return value


def _layer_part(part: str, text: str) -> list[tuple[int, ...]]:
    if ":" not in part:
        return [tuple(sorted({_whole(chunk, text) for chunk in part.split("+")}))]
    numbers = [_whole(chunk, text) for chunk in part.split(":")]
    step = numbers[2] if len(numbers) == 3 else 1
    if len(numbers) not in (2, 3) or step < 1 or numbers[1] < numbers[0]:
        raise InputError(
            f"--layer {text!r} does not parse at {part!r}: a range is FROM:TO or FROM:TO:STEP "
            f"with both ends included, for example 12:24:2."
        )
    return [(layer,) for layer in range(numbers[0], numbers[1] + 1, step)]


def _whole(chunk: str, text: str) -> int:
    try:
        return int(chunk)
    except ValueError:
        raise InputError(
            f"--layer {text!r} does not parse: {chunk!r} is not a whole number. Write a layer "
            f"(20), a list (3,4), a range (12:24:2), layers at once (3+4), 'all' or 'auto'."
        ) from None
