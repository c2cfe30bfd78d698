"""From a vector to steering instructions: which row, how strong, where, and with which operator.

Every command that steers (``steer-eval``, ``chat``, ``verify``, ``train``) makes its instructions
here, so that a layer, a coefficient and its unit mean the same in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from pvec.errors import InputError
from pvec.models.decoder import describe_layer
from pvec.types import (
    LIMITS,
    AnswerClass,
    Dose,
    Instruction,
    Operator,
    Percentile,
    Positions,
    VectorKind,
)
from pvec.vectors.projection import QUANTILES, stored_quantiles
from pvec.vectors.vector import DEFAULT_KIND

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvec.vectors.vector import PersonaVector

CoefUnit = Literal["raw", "norm"]
"""``raw``: the coefficient multiplies the vector as it is. ``norm``: it is a length in units of the
mean residual norm of the layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringVector:
    """One kind of a vector file as it steers: ``rows`` is ``[num_layers + 1, hidden_size]``.

    ``mean_norms`` ``[num_layers + 1]`` are the mean residual norms, which coefficients in units of
    them need. ``label`` is for people. A last row that was taken after the final norm
    (``normed_layer``) is no direction of the residual stream; it is zero here. ``quantiles`` are
    the projections of answers, ``[Q, num_layers + 1]``, that percentiles are read from.
    """

    label: str
    rows: NDArray[np.float32]
    mean_norms: NDArray[np.float32] | None = None
    normed_layer: int | None = None
    quantiles: Mapping[AnswerClass, NDArray[np.float32]] = field(default_factory=dict)

    def has(self, layer: int) -> bool:
        """Whether there is a direction to steer with at ``layer``."""
        return layer < len(self.rows) and bool(self.rows[layer].any())

    def instruction(
        self,
        layer: int,
        *,
        coef: Dose,
        positions: Positions = "response",
        operator: Operator = "add",
        unit: CoefUnit = "raw",
    ) -> Instruction:
        """Return the instruction that steers with this vector after block ``layer``.

        A percentile is the limit of a cap or floor at this layer. Raises ``InputError`` when the
        vector is zero or absent at that layer, when ``unit`` is ``norm`` and the residual norm of
        that layer is not known, and for percentiles that the file does not hold.
        """
        if layer == self.normed_layer:
            raise InputError(
                f"The vector {self.label!r} was taken after the final norm at "
                f"{describe_layer(layer)}, so it is no direction of the residual stream there: "
                f"choose a lower layer, or compute the vector with pvec."
            )
        if not self.has(layer):
            raise InputError(
                f"The vector {self.label!r} is zero at {describe_layer(layer)} and cannot steer "
                f"there: choose another layer."
            )
        return Instruction(
            vector=np.ascontiguousarray(self.rows[layer], dtype=np.float32),
            layer=layer,
            coef=self._raw(coef, layer, operator, unit),
            positions=positions,
            operator=operator,
            name=self.label,
        )

    def _raw(self, coef: Dose, layer: int, operator: Operator, unit: CoefUnit) -> float:
        if isinstance(coef, Percentile):
            if operator not in LIMITS or unit != "raw":
                raise InputError(
                    f"The percentile {coef} is the limit of a cap or floor and has no unit: use "
                    f"--operator cap or floor, without --coef-unit."
                )
            return self._limit(coef, layer)
        if unit == "raw":
            return coef
        norm = math.nan if self.mean_norms is None else float(self.mean_norms[layer])
        if not 0 < norm < math.inf:
            raise InputError(
                f"The vector {self.label!r} has no residual norm at {describe_layer(layer)}, so "
                f"coefficients cannot be in units of it: use --coef-unit raw, or extract the "
                f"vector again with pvec."
            )
        if operator in LIMITS:
            return coef * norm  # the limit is a length along the unit vector
        return raw_coefficient(coef, vector=self.rows[layer], mean_norm=norm)

    def _limit(self, percentile: Percentile, layer: int) -> float:
        """Return a percentile of projections at a layer, linear between those of the file."""
        values = self.quantiles.get(percentile.of)
        if values is None or not np.isfinite(values[:, layer]).all():
            remedy = "measure them with `pvec vector calibrate FILE`"
            if percentile.of != "unsteered":
                remedy = "compute the vector again with `pvec vector compute`"
            raise InputError(
                f"The vector {self.label!r} has no percentiles of {_WORDS[percentile.of]} answers "
                f"at {describe_layer(layer)}, which {percentile} asks for: {remedy}."
            )
        return float(np.interp(percentile.percent / 100, QUANTILES, values[:, layer]))


_WORDS: dict[AnswerClass, str] = {
    "pos": "positive", "neg": "negative", "unsteered": "unsteered",
}  # fmt: skip


def raw_coefficient(relative_norm: float, *, vector: np.ndarray, mean_norm: float) -> float:
    """Return the raw coefficient whose addition is ``relative_norm`` mean residual norms long."""
    length = float(np.linalg.norm(vector))
    if length == 0.0:
        raise InputError("A zero vector has no length to scale: use another layer.")
    return relative_norm * mean_norm / length


def steering_vector(
    vector: PersonaVector, *, kind: VectorKind, label: str = "", increments: bool = False
) -> SteeringVector:
    """Return one kind of ``vector`` to steer with; ``label`` defaults to its trait.

    ``increments`` replaces row ``l`` by ``v_l - v_(l-1)``, to steer at all layers at once (paper,
    appendix J.3). Raises ``InputError`` for a kind that the file does not have, and for increments
    of a file that holds them already or has no vector at some layer.
    """
    rows = vector.increments(kind) if increments else vector.kind(kind)
    if vector.last_row_is_normed:
        rows = rows.copy()
        rows[-1] = 0.0
    described = kind == DEFAULT_KIND and not increments
    stored = {name: stored_quantiles(vector.stats, name) for name in get_args(AnswerClass)}
    return SteeringVector(
        label=label or vector.trait,
        rows=rows,
        mean_norms=vector.mean_norm,
        normed_layer=vector.num_layers if vector.last_row_is_normed else None,
        quantiles={k: v for k, v in stored.items() if v is not None} if described else {},
    )


def random_like(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """Return independent Gaussian directions with the norms of ``vector`` at every layer.

    The control of incremental steering is made from the increments, so that it has their norms.
    """
    draw = np.random.default_rng(seed).standard_normal(vector.rows.shape)
    lengths = np.linalg.norm(vector.rows, axis=1, keepdims=True)
    rows = draw / np.linalg.norm(draw, axis=1, keepdims=True) * lengths
    return replace(vector, label=f"random like {vector.label}", rows=rows.astype(np.float32))


def instructions(
    vectors: Sequence[SteeringVector],
    layers: Sequence[int],
    *,
    coef: Dose,
    positions: Positions = "response",
    operator: Operator = "add",
    unit: CoefUnit = "raw",
) -> tuple[Instruction, ...]:
    """Return what steers with all ``vectors`` at all ``layers`` at once.

    Raises ``InputError`` as ``SteeringVector.instruction`` does.
    """
    return tuple(
        vector.instruction(layer, coef=coef, positions=positions, operator=operator, unit=unit)
        for vector in vectors
        for layer in layers
    )
