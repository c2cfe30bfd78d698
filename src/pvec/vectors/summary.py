"""What a vector file says of itself, layer by layer: norms, doses, quality, and where to steer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pvec.types import VectorKind
from pvec.vectors.quality import SIGNS, Sign
from pvec.vectors.suggest import suggest_layer
from pvec.vectors.vector import PersonaVector


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quality figure with its central 95 % over random halves of the questions; NaN unknown."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of a vector.

    ``norm`` is its length, ``dose`` the same in mean residual norms of that layer. ``auc`` is how
    well projections tell held-out positive from negative responses (0.5: not at all), ``stability``
    the cosine between vectors from two halves of the questions.
    """

    layer: int
    norm: float
    dose: float
    auc: Spread
    stability: Spread


@dataclass(frozen=True, kw_only=True)
class VectorSummary:
    """What a person wants to know of a vector before steering with it (``response_avg``)."""

    layers: tuple[LayerRow, ...]
    suggested_layer: int | None
    reason: str
    counts: Mapping[Sign, int]


def summarize(vector: PersonaVector, *, kind: VectorKind = "response_avg") -> VectorSummary:
    """Return what a vector file says of one of its kinds, layer by layer.

    The quality figures are of ``response_avg``. What the file does not hold is NaN; without mean
    norms the doses are, and no layer is suggested.
    """
    vectors = vector.kind(kind)
    norms = np.linalg.norm(vectors, axis=1)
    unknown = np.full(len(norms), np.nan, dtype=np.float32)
    mean_norm = unknown if vector.mean_norm is None else vector.mean_norm
    rows = tuple(
        LayerRow(
            layer=layer,
            norm=float(norm),
            dose=float(norm / mean_norm[layer]),
            auc=_spread(vector, "auc", layer),
            stability=_spread(vector, "stability", layer),
        )
        for layer, norm in enumerate(norms)
    )
    suggested = None
    if vector.mean_norm is not None:
        suggested = suggest_layer(
            vectors, mean_norm=vector.mean_norm, separation=[row.auc for row in rows]
        )
    return VectorSummary(
        layers=rows,
        suggested_layer=suggested.layer if suggested else None,
        reason=suggested.reason if suggested else "the file holds no residual norms",
        counts={sign: int(vector.metadata.get(f"kept_{sign}", 0)) for sign in SIGNS},
    )


def _spread(vector: PersonaVector, name: str, layer: int) -> Spread:
    mean, low, high = (
        float(vector.stats[key][layer]) if key in vector.stats else float("nan")
        for key in (name, f"{name}_low", f"{name}_high")
    )
    return Spread(mean=mean, low=low, high=high)
