"""Figures of vector files: norm, separation and stability by layer, and cosines between vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pvec.report.axes import Reference, XAxis, exact
from pvec.report.figure import Figure, Table
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.runs.files import atomic_write
from pvec.stats import Interval
from pvec.types import VectorKind
from pvec.vectors.quality import Spread, suggest_layer, summarize
from pvec.vectors.vector import PersonaVector

_PANELS = {
    "norm": "norm",
    "relative_norm": "norm / residual",
    "auc": "separation (AUC)",
    "stability": "split-half cosine",
}
"""Quantity by layer → label of its axis."""

_CHANCE = {"auc": 0.5, "stability": 0.0}

_LIMITS = {"norm": (0.0, 0.0), "relative_norm": (0.0, 0.0), "auc": (0.5, 1.0), "stability": (0, 1)}
"""What an axis covers at least: a difference of 0.001 is no structure."""


def layer_figure(
    lines: Sequence[tuple[str, PersonaVector, VectorKind]],
    *,
    name: str = "vectors",
    title: str = "Vectors by layer",
) -> Figure:
    """Draw what is known by layer, a panel per quantity and a line per (label, vector, kind).

    Norms are of the raw vectors, also in units of the mean residual norm; separation (AUC on
    questions that the vector was not made from) and stability are of a file's main kind. What no
    file holds has no panel. The layer suggested for steering is marked, of one file.
    """
    files = list({id(vector): (vector, kind) for _, vector, kind in reversed(lines)}.values())
    suggested = suggest_layer(files[0][0], kind=files[0][1])[0] if len(files) == 1 else None
    by_layer = [(label, _by_layer(vector, kind)) for label, vector, kind in lines]
    panels = [
        Panel(
            label=text,
            lines=[
                Line(label=label, x=range(len(values[quantity])), points=values[quantity])
                for label, values in by_layer
                if quantity in values
            ],
            levels=[Level(value=exact(_CHANCE[quantity]))] if quantity in _CHANCE else [],
            limits=_LIMITS[quantity],
        )
        for quantity, text in _PANELS.items()
        if any(quantity in values for _, values in by_layer)
    ]
    return line_chart(
        name=name,
        title=title,
        caption="Norms are of the raw vectors, which a coefficient multiplies; separation is the "
        "AUC of projections on questions that the vector was not made from; stability is the "
        "cosine between the vectors of two halves of the questions.",
        x=XAxis(
            label="layer (0 = embedding)",
            references=[] if suggested is None else [Reference(x=suggested, label="suggested")],
        ),
        panels=panels,
        table=_table(by_layer),
    )


def cosine_figure(labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> Figure:
    """Draw a matrix of cosines from -1 to 1, with the numbers in the cells while they fit."""
    return heat_map(
        Grid.of_cosines("", labels, labels, cosines),
        name="cosines",
        title="Cosines",
        caption="Cosine between each two vectors.",
        table=Table(
            columns=("vector", *labels),
            rows=tuple((label, *row) for label, row in zip(labels, cosines, strict=True)),
        ),
    )


def write_figure(figure: Figure, *, png: Path | None = None, svg: Path | None = None) -> None:
    """Write a figure to the files asked for. Raises ``StoreError`` when one cannot be written."""
    if png is not None:
        with atomic_write(png) as stream:
            stream.write(figure.png())
    if svg is not None:
        with atomic_write(svg, mode="w") as stream:
            stream.write(figure.svg())


def _by_layer(vector: PersonaVector, kind: VectorKind) -> dict[str, list[Interval]]:
    """Return what is known per layer, by quantity."""
    rows = summarize(vector, kind=kind).layers
    known = {"norm": [exact(row.norm) for row in rows]}
    if vector.mean_norm is not None:
        known["relative_norm"] = [exact(row.relative_norm) for row in rows]
    if kind == vector.main_kind and "auc" in vector.stats:
        known["auc"] = [_interval(row.auc) for row in rows]
    if kind == vector.main_kind and "stability" in vector.stats:
        known["stability"] = [_interval(row.stability) for row in rows]
    return known


def _interval(spread: Spread) -> Interval:
    return Interval(mean=spread.mean, low=spread.low, high=spread.high, n=1, groups=1)


def _table(by_layer: Sequence[tuple[str, dict[str, list[Interval]]]]) -> Table:
    """Return one row per vector and layer."""
    held = [name for name in _PANELS if any(name in values for _, values in by_layer)]
    columns = [end for name in held for end in _ends(name)]
    rows = []
    for label, values in by_layer:
        for layer in range(len(values["norm"])):
            cells: list[float | None] = []
            for name in held:
                point = values[name][layer] if name in values else exact(math.nan)
                cells += [point.mean, point.low, point.high][: len(_ends(name))]
            rows.append((label, layer, *cells))
    return Table(columns=("vector", "layer", *columns), rows=tuple(rows))


def _ends(name: str) -> tuple[str, ...]:
    return (name, f"{name}_low", f"{name}_high") if name in _CHANCE else (name,)
