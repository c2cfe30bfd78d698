"""What a steering sweep consists of: layers and coefficients read from text, conditions built.

A sweep is a list of conditions. Every condition answers the same questions with the same seeds, so
that differences between conditions are paired. Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pvec.errors import InputError
from pvec.models.decoder import check_layer
from pvec.types import Instruction, Operator, Positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

Role = Literal["baseline", "steered", "random", "prompt_pos", "prompt_neg"]

AUTO_DEPTHS = (0.35, 0.45, 0.55, 0.65, 0.75)
"""Where ``--layer auto`` looks, as shares of the depth: a handful around 55 %, where the paper's
two models (layers 20 of 28 and 16 of 32) and the bundled one steer best."""

BASELINE = "unsteered"


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One curve's vector: rows ``[num_layers + 1, hidden_size]`` and the residual norms, if known.

    ``mean_norms`` is ``[num_layers + 1]``; doses in units of it need it.
    """

    label: str
    rows: NDArray[np.float32]
    mean_norms: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The points asked for.

    ``layers`` holds one tuple per choice; the layers of a choice are steered at once. ``together``
    steers with all vectors at once instead of drawing one curve per vector.
    """

    layers: tuple[tuple[int, ...], ...]
    coefs: tuple[float, ...]
    positions: Positions = "response"
    operator: Operator = "add"
    unit: Literal["raw", "norm"] = "raw"
    together: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """One point of the sweep, a control, or a baseline."""

    name: str
    role: Role
    vector: str = ""
    layers: tuple[int, ...] = ()
    coef: float = 0.0
    steering: tuple[Instruction, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that a response line keeps, enough to rebuild the curves."""
        return {
            "name": self.name,
            "role": self.role,
            "vector": self.vector,
            "layers": list(self.layers),
            "coef": self.coef,
        }


def parse_coefs(text: str) -> tuple[float, ...]:
    """Read ``-2,-1,0,1,2`` or ``0:2:0.5`` (both ends included) into ascending, distinct numbers.

    Raises ``InputError`` naming the part that does not parse.
    """
    values = {value + 0.0 for part in _parts(text, "--coef") for value in _coef_part(part, text)}
    return tuple(sorted(values))


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


def layers_label(layers: Sequence[int]) -> str:
    """Return how a choice of layers is written: ``layer 20``, ``layers 3+4``, ``layers 1-28``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + "+".join(str(layer) for layer in layers)


def steered_conditions(
    sources: Sequence[Source], grid: Grid, *, role: Literal["steered", "random"] = "steered"
) -> list[Condition]:
    """Return one condition per curve, choice of layers and coefficient.

    Coefficient 0 of ``add`` is the unsteered baseline and is left out here. Raises ``InputError``
    when doses in norm units are asked of a vector without residual norms.
    """
    groups = [tuple(sources)] if grid.together else [(source,) for source in sources]
    return [
        _condition(group, grid, layers=layers, coef=coef, role=role)
        for group in groups
        for layers in grid.layers
        for coef in _doses(grid)
    ]


def random_like(source: Source, *, seed: int) -> Source:
    """Return a random direction of the same norm as ``source`` at every layer.

    Rows are independent Gaussian directions. For all-layer incremental steering the increments, not
    the sums, must have the vector's norms: build it from the increments (``incremental_source``).
    """
    draw = np.random.default_rng(seed).standard_normal(source.rows.shape)
    lengths = np.linalg.norm(source.rows, axis=1, keepdims=True)
    rows = draw / np.linalg.norm(draw, axis=1, keepdims=True) * lengths
    return Source(
        label=f"random like {source.label}",
        rows=rows.astype(np.float32),
        mean_norms=source.mean_norms,
    )


def incremental_source(source: Source) -> Source:
    """Return ``source`` with row ``l`` replaced by ``v_l - v_(l-1)`` (paper, appendix J.3)."""
    rows = np.diff(source.rows, axis=0, prepend=0)
    rows[1] = source.rows[1]  # layer 0 is not steered: the additions up to l then sum to v_l
    return Source(label=source.label, rows=rows, mean_norms=source.mean_norms)


def _condition(
    group: Sequence[Source],
    grid: Grid,
    *,
    layers: tuple[int, ...],
    coef: float,
    role: Literal["steered", "random"],
) -> Condition:
    label = " + ".join(source.label for source in group)
    dose = f"{grid.operator} " if grid.operator != "add" else ""
    unit = " norms" if grid.unit == "norm" else ""
    amount = "" if grid.operator == "ablate" else f"coef {coef:g}{unit}"
    name = f"{label} · {layers_label(layers)} · {dose}{amount}".strip()
    steering = tuple(
        _instruction(source, grid, layer=layer, coef=coef) for source in group for layer in layers
    )
    return Condition(
        name=name, role=role, vector=label, layers=layers, coef=coef, steering=steering
    )


def _instruction(source: Source, grid: Grid, *, layer: int, coef: float) -> Instruction:
    vector = np.ascontiguousarray(source.rows[layer], dtype=np.float32)
    if grid.unit == "norm":
        if source.mean_norms is None:
            raise InputError(
                f"The vector {source.label!r} holds no residual norms, so doses cannot be in units "
                f"of them: use --coef-unit raw, or extract the vector again with pvec."
            )
        norm = float(source.mean_norms[layer])
        coef = _in_norm_units(coef, grid.operator, vector=vector, mean_norm=norm)
    return Instruction(
        vector=vector,
        layer=layer,
        coef=coef,
        positions=grid.positions,
        operator=grid.operator,
        name=source.label,
    )


def _in_norm_units(
    dose: float, operator: Operator, *, vector: NDArray[np.float32], mean_norm: float
) -> float:
    if operator == "cap":
        return dose * mean_norm  # the ceiling is a length along the unit vector
    length = float(np.linalg.norm(vector))
    if length == 0:
        raise InputError("A zero vector has no direction to scale: choose another layer.")
    return dose * mean_norm / length


def _doses(grid: Grid) -> tuple[float, ...]:
    if grid.operator == "ablate":
        return (1.0,)  # an ablation has no dose
    if grid.operator == "add":
        return tuple(coef for coef in grid.coefs if coef != 0)
    return grid.coefs


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
