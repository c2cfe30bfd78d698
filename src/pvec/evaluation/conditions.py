"""What a steering sweep consists of: layers and coefficients read from text, conditions built.

A sweep is a list of conditions. Every condition answers the same questions with the same seeds, so
that differences between conditions are paired. Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pvec.errors import InputError
from pvec.evaluation.condition import Condition, layers_label
from pvec.models.decoder import check_layer
from pvec.settings.commands import SteerSettings
from pvec.steering.instructions import SteeringVector, instructions, random_like
from pvec.types import LIMITS, Dose, Percentile, Positions

AUTO_DEPTHS = (0.35, 0.45, 0.55, 0.65, 0.75)
"""Where ``--layer auto`` looks, as shares of the depth: a handful around 55 %, where the paper's
two models (layers 20 of 28 and 16 of 32) and the bundled one steer best."""

BASELINE = "unsteered"


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
    for choice in choices:
        for layer in choice:
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
    conditions = [Condition(name=BASELINE, role="baseline")]
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
    """Return the choices of layers; "all" are those at which every vector has a direction."""
    choices = steered_layers(steer, num_layers=num_layers)
    if not steers_everywhere(steer):
        return list(choices)
    return [tuple(n for n in layers if all(v.has(n) for v in group)) for layers in choices]


def steered_layers(steer: SteerSettings, *, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Return the choices of layers that the settings ask for (see ``parse_layers``)."""
    if steer.incremental and steer.layer not in {"auto", "all"}:
        raise InputError(
            f"--incremental steers every layer and cannot be combined with --layer {steer.layer}: "
            f"omit one of them."
        )
    return parse_layers("all" if steer.incremental else steer.layer, num_layers=num_layers)


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
    percentile, number = "", 0.0
    if isinstance(coef, Percentile):
        percentile, number = str(coef), coef.percent
    else:
        number = coef
    amount = percentile or f"coef {number:g}{unit}"
    if steer.operator == "ablate":
        amount = ""
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


def percentile_class(steer: SteerSettings) -> str:
    """Return whose percentiles the limits of the settings are, or an empty text."""
    first = Percentile.parse(steer.coef.split(",")[0])
    return first.of if first and steer.operator in LIMITS else ""


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


def _coef_part(part: str, text: str) -> Iterator[float]:
    numbers = [_number(chunk, part, text) for chunk in part.split(":")]
    if len(numbers) == 1:
        yield numbers[0]
        return
    if len(numbers) != 3 or numbers[2] <= 0 or numbers[1] < numbers[0]:
        raise InputError(
            f"--coef {text!r} does not parse at {part!r}: a range is FROM:TO:STEP with a step "
            f"above 0, for example 0:2:0.5."
        )
    first, last, step = numbers
    # A little slack, so that 0:0.3:0.1 reaches 0.3 although 3 x 0.1 is above it in binary.
    for i in range(math.floor((last - first) / step + 1e-9) + 1):
        yield round(first + i * step, 10)


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


def _layer_part(part: str, text: str) -> Iterator[tuple[int, ...]]:
    if ":" in part:
        numbers = [_whole(chunk, text) for chunk in part.split(":")]
        step = numbers[2] if len(numbers) == 3 else 1
        if len(numbers) not in (2, 3) or step < 1 or numbers[1] < numbers[0]:
            raise InputError(
                f"--layer {text!r} does not parse at {part!r}: a range is FROM:TO or FROM:TO:STEP "
                f"with both ends included, for example 12:24:2."
            )
        yield from ((layer,) for layer in range(numbers[0], numbers[1] + 1, step))
    else:
        yield tuple(sorted({_whole(chunk, text) for chunk in part.split("+")}))


def _whole(chunk: str, text: str) -> int:
    try:
        return int(chunk)
    except ValueError:
        raise InputError(
            f"--layer {text!r} does not parse: {chunk!r} is not a whole number. Write a layer "
            f"(20), a list (3,4), a range (12:24:2), layers at once (3+4), 'all' or 'auto'."
        ) from None
