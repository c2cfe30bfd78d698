"""How far an activation points along a persona vector (paper, sections 3.3 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, get_args

import numpy as np

from pvec.errors import InputError
from pvec.models.decoder import check_layer, describe_layer
from pvec.types import AnswerClass, ProjectionKind, SpanName

PROJECTION_KINDS: tuple[ProjectionKind, ...] = get_args(ProjectionKind)

SPAN_OF_PROJECTION: dict[ProjectionKind, SpanName] = {
    "proj": "response",
    "prompt_last_proj": "prompt_last",
    "cos_sim": "response",
    "prompt_avg": "prompt",
    "think_proj": "think",
    "think_cos_sim": "think",
}

QUANTILES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
"""Shares of a class's answers below the projections that vector files hold."""


def project(activations: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Return ``activations . vector / |vector|`` in float64; ``[..., H]`` and ``[H]`` → ``[...]``.

    NaN activations (an empty span) stay NaN. Raises ``InputError`` for a zero vector.
    """
    direction = np.asarray(vector, dtype=np.float64)
    length = np.linalg.norm(direction)
    if length == 0.0:
        raise InputError("A zero vector has no direction to project on: use another layer.")
    along: np.ndarray = np.asarray(activations, dtype=np.float64) @ (direction / length)
    return along


def project_layers(activations: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the projections ``[..., L + 1]`` of activations ``[..., L + 1, H]`` on the vector of
    each layer, ``[L + 1, H]``, in float64; NaN where that is zero.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    along: np.ndarray = np.einsum("...lh,lh->...l", activations, rows)
    return along / np.where(lengths > 0, lengths, np.nan)


def cosine(activations: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Return the cosine of ``activations`` ``[..., H]`` and ``vector`` ``[H]`` in float64."""
    lengths = np.linalg.norm(np.asarray(activations, dtype=np.float64), axis=-1)
    along = project(activations, vector)
    cosines: np.ndarray = np.full_like(along, np.nan)
    np.divide(along, lengths, out=cosines, where=lengths != 0)
    return cosines


def quantiles_of(answers: AnswerClass, places: np.ndarray) -> dict[str, np.ndarray]:
    """Return the quantiles of the projections ``[N, L + 1]`` of a class, as vector files have them.

    NaN where the projections are.
    """
    values = np.quantile(places, QUANTILES, axis=0).astype(np.float32)
    return dict(zip(_quantile_names(answers), values, strict=True))


def stored_quantiles(stats: Mapping[str, np.ndarray], answers: AnswerClass) -> np.ndarray | None:
    """Return the ``QUANTILES`` ``[Q, L + 1]`` that a vector file holds of a class, or None."""
    names = _quantile_names(answers)
    return np.stack([stats[name] for name in names]) if all(n in stats for n in names) else None


def _quantile_names(answers: AnswerClass) -> list[str]:
    return [f"proj_response_{answers}_q{round(100 * share):02}" for share in QUANTILES]


def column_name(*, model: str, vector: str, kind: ProjectionKind, layer: int) -> str:
    """Return the reference's column name: ``{model}_{vector}_{kind}_layer{layer}``."""
    return f"{model}_{vector}_{kind}_layer{layer}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectionPlan:
    """Every projection wanted of a row: each vector, by each kind, at each layer, in that order.

    ``units`` is float64 ``[layers, vectors, H]``, each of length 1.
    """

    vectors: tuple[str, ...]
    kinds: tuple[ProjectionKind, ...]
    layers: tuple[int, ...]
    units: np.ndarray

    @classmethod
    def make(
        cls,
        vectors: Mapping[str, np.ndarray],
        *,
        layers: Sequence[int],
        kinds: Sequence[ProjectionKind],
    ) -> Self:
        """Plan projections on ``vectors`` (name → ``[L + 1, H]``) at ``layers`` (0 … L).

        Raises ``InputError`` for a vector that is zero at a wanted layer and ``ModelError`` for a
        layer that a vector does not have.
        """
        units = []
        for layer in layers:
            for name, rows in vectors.items():
                if layer != 0:
                    check_layer(layer, len(rows) - 1)
                row = np.asarray(rows[layer], dtype=np.float64)
                length = np.linalg.norm(row)
                if length == 0.0:
                    raise InputError(
                        f"The vector {name!r} is zero at {describe_layer(layer)}, so nothing "
                        f"points along it: use another layer."
                    )
                units.append(row / length)
        shape = (len(layers), len(vectors), -1)
        return cls(
            vectors=tuple(vectors),
            kinds=tuple(kinds),
            layers=tuple(layers),
            units=np.array(units).reshape(shape),
        )

    @property
    def spans(self) -> tuple[SpanName, ...]:
        """The token spans whose means are needed."""
        return tuple(dict.fromkeys(SPAN_OF_PROJECTION[kind] for kind in self.kinds))

    def columns(self, *, model: str = "") -> tuple[str, ...]:
        """Return the reference's column names; without ``model`` they begin with the vector."""
        names = (
            column_name(model=model, vector=vector, kind=kind, layer=layer)
            for vector in self.vectors
            for kind in self.kinds
            for layer in self.layers
        )
        return tuple(name.removeprefix("_") for name in names)

    def values(self, means: Mapping[SpanName, np.ndarray]) -> np.ndarray:
        """Return all projections of ``B`` rows, float64 ``[B, columns]``; NaN for an empty span.

        ``means[span]`` is ``[B, layers, H]``, its layers in the plan's order.
        """
        along, lengths = {}, {}
        for span in self.spans:
            rows = np.asarray(means[span], dtype=np.float64)
            along[span] = np.einsum("blh,lvh->bvl", rows, self.units, optimize=True)
            lengths[span] = np.linalg.norm(rows, axis=-1)  # [B, layers]
        parts = []
        for kind in self.kinds:
            span = SPAN_OF_PROJECTION[kind]
            part = along[span]
            if kind.endswith("cos_sim"):
                length = np.where(lengths[span] == 0, np.nan, lengths[span])
                part = part / length[:, None]
            parts.append(part)
        stacked = np.stack(parts, axis=2)  # [B, vectors, kinds, layers]
        flat: np.ndarray = stacked.reshape(len(stacked), -1)
        return flat
