"""Figures of a vector file: norms, doses, separation and stability per layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pvec.report.figures import Figure
from pvec.report.plots import layer_lines
from pvec.vectors.vector import PersonaVector


def vector_figures(name: str, vector: PersonaVector) -> Iterator[Figure]:
    """Yield the figures that a vector file has numbers for; ``name`` begins their file names."""
    norms = {
        kind: [float(norm) for norm in np.linalg.norm(array, axis=1)]
        for kind, array in vector.kinds.items()
    }
    yield layer_lines(
        name=f"{name}_norms",
        title=f"{vector.trait}: norm by layer",
        caption="Length of the raw vector; a coefficient multiplies it.",
        y_label="norm",
        lines=list(norms.items()),
    )
    if vector.mean_norm is not None:
        residual = [float(norm) or math.nan for norm in vector.mean_norm]
        yield layer_lines(
            name=f"{name}_dose",
            title=f"{vector.trait}: dose of coefficient 1",
            caption="The vector's length in units of the mean residual norm of its layer.",
            y_label="residual norms",
            lines=[
                (kind, [n / r for n, r in zip(lengths, residual, strict=True)])
                for kind, lengths in norms.items()
            ],
        )
    if "auc" in vector.stats:
        yield layer_lines(
            name=f"{name}_separation",
            title=f"{vector.trait}: separation by layer",
            caption=(
                "How well projections tell positive from negative answers to questions that the "
                "vector was not made from (AUC; 0.5 is chance, 1 is perfect)."
            ),
            y_label="AUC",
            lines=[("AUC", [float(value) for value in vector.stats["auc"]])],
            bands=_bands(vector, "auc"),
            level=0.5,
        )
    if "stability" in vector.stats:
        yield layer_lines(
            name=f"{name}_stability",
            title=f"{vector.trait}: stability by layer",
            caption="Cosine between vectors made from two halves of the questions.",
            y_label="cosine",
            lines=[("split-half cosine", [float(value) for value in vector.stats["stability"]])],
            bands=_bands(vector, "stability"),
        )


def _bands(vector: PersonaVector, stat: str) -> list[tuple[list[float], list[float]]]:
    if f"{stat}_low" not in vector.stats:
        return []
    low, high = vector.stats[f"{stat}_low"], vector.stats[f"{stat}_high"]
    return [([float(v) for v in low], [float(v) for v in high])]
