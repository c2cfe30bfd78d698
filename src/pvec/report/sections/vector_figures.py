"""Figures of a vector file: norms, norm / residual, separation and stability per layer."""

from __future__ import annotations

from collections.abc import Iterator

from pvec.report.figures import Figure
from pvec.report.plots import layer_lines
from pvec.vectors.vector import PersonaVector


def vector_figures(name: str, vector: PersonaVector) -> Iterator[Figure]:
    """Yield the figures that a vector file has numbers for; ``name`` begins their file names."""
    yield layer_lines(
        name=f"{name}_norms",
        title=f"{vector.trait}: norm by layer",
        caption="Length of the raw vector; a coefficient multiplies it.",
        y_label="norm",
        lines=[(kind, vector.norms(kind).tolist()) for kind in vector.kinds],
    )
    if vector.mean_norm is not None:
        yield layer_lines(
            name=f"{name}_relative_norms",
            title=f"{vector.trait}: norm / residual by layer",
            caption="The vector's length in units of the mean residual norm of its layer.",
            y_label="norm / residual",
            lines=[(kind, vector.relative_norms(kind).tolist()) for kind in vector.kinds],
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
            lines=[("AUC", vector.stats["auc"].tolist())],
            bands=_bands(vector, "auc"),
            level=0.5,
        )
    if "stability" in vector.stats:
        yield layer_lines(
            name=f"{name}_stability",
            title=f"{vector.trait}: stability by layer",
            caption="Cosine between vectors made from two halves of the questions.",
            y_label="cosine",
            lines=[("split-half cosine", vector.stats["stability"].tolist())],
            bands=_bands(vector, "stability"),
        )


def _bands(vector: PersonaVector, stat: str) -> list[tuple[list[float], list[float]]]:
    if f"{stat}_low" not in vector.stats:
        return []
    return [(vector.stats[f"{stat}_low"].tolist(), vector.stats[f"{stat}_high"].tolist())]
