"""Pictures of vector files for ``pvec vector show`` and ``compare``, one picture per command."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pvec.report.figures import MARKERS, MUTED, SERIES, Figure, Table
from pvec.runs.files import atomic_write
from pvec.types import VectorKind
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WRITTEN_CELLS = 12
"""Cosines are written into their cells up to this many rows."""


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One quantity by layer; ``level`` is a line to compare with (chance)."""

    name: str
    label: str
    level: float | None = None


_PANELS = (
    _Panel(name="norm", label="norm"),
    _Panel(name="relative_norm", label="norm / residual"),
    _Panel(name="auc", label="separation (AUC)", level=0.5),
    _Panel(name="stability", label="split-half cosine", level=0.0),
)


def vector_picture(vectors: Sequence[tuple[str, PersonaVector]], *, kind: VectorKind) -> Figure:
    """Draw norm, norm / residual, separation and stability by layer, one line per (label, vector).

    Bands are 95 % intervals. What no file holds has no panel.
    """
    lines = [(label, _by_layer(vector, kind)) for label, vector in vectors]
    panels = [panel for panel in _PANELS if any(panel.name in values for _, values in lines)]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, lines)
        axes[-1].set_xlabel("layer (0 = embedding)")
        if len(lines) > 1:
            handles, names = axes[0].get_legend_handles_labels()
            canvas.legend(handles, names, loc="outside lower center", ncols=2)

    columns = [name for panel in panels for name in (panel.name, *_ends(panel.name))]
    held = [name for name in columns if any(name in values for _, values in lines)]
    return Figure(
        name="vectors",
        title=f"{kind} by layer",
        caption="Norms are of the raw vectors; bands are 95 % intervals.",
        table=Table(
            columns=("vector", "layer", *held),
            rows=tuple(
                (label, layer, *(values[n][layer] if n in values else None for n in held))
                for label, values in lines
                for layer in range(len(values["norm"]))
            ),
        ),
        draw=draw,
        size=(5.0, 0.9 + 1.7 * len(panels)),
    )


def cosine_picture(labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> Figure:
    """Draw a matrix of cosines from -1 to 1, with the numbers in the cells while they fit."""
    count = len(labels)

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        axis.grid(visible=False)
        mesh = axis.pcolormesh(
            [list(row) for row in cosines], cmap="RdBu_r", vmin=-1, vmax=1, edgecolors="face"
        )
        axis.invert_yaxis()
        axis.set_aspect("equal")
        step = math.ceil(count / 40)  # labels stay apart
        ticks = list(range(0, count, step))
        names = [labels[i] for i in ticks]
        axis.set_xticks([i + 0.5 for i in ticks], names, rotation=90)
        axis.set_yticks([i + 0.5 for i in ticks], names)
        for r, c in _written(cosines):
            tone = "#ffffff" if abs(cosines[r][c]) > 0.6 else "#101418"
            axis.text(
                c + 0.5, r + 0.5, f"{cosines[r][c]:.2f}", ha="center", va="center", color=tone
            )
        canvas.colorbar(mesh, ax=axis, label="cosine", fraction=0.05).outline.set_visible(False)

    side = min(9.0, max(3.4, 1.8 + 0.5 * count))
    return Figure(
        name="cosines",
        title="Cosines",
        caption="Cosine between each two vectors.",
        table=Table(
            columns=("vector", *labels),
            rows=tuple((label, *row) for label, row in zip(labels, cosines, strict=True)),
        ),
        draw=draw,
        size=(side + 0.8, side),
    )


def write_picture(figure: Figure, *, png: Path | None = None, svg: Path | None = None) -> None:
    """Write a figure to the files asked for. Raises ``StoreError`` when one cannot be written."""
    if png is not None:
        with atomic_write(png) as stream:
            stream.write(figure.png())
    if svg is not None:
        with atomic_write(svg, mode="w") as stream:
            stream.write(figure.svg())


def _by_layer(vector: PersonaVector, kind: VectorKind) -> dict[str, list[float]]:
    """Return what is known per layer, by name; intervals as ``NAME_low`` and ``NAME_high``."""
    arrays = {"norm": vector.norms(kind)}
    if vector.mean_norm is not None:
        arrays["relative_norm"] = vector.relative_norms(kind)
    names = [name for panel in _PANELS for name in (panel.name, *_ends(panel.name))]
    arrays |= {name: vector.stats[name] for name in names if name in vector.stats}
    return {name: [float(value) for value in values] for name, values in arrays.items()}


def _draw_panel(
    axis: Axes, panel: _Panel, lines: Sequence[tuple[str, dict[str, list[float]]]]
) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (label, values) in enumerate(lines):
        if panel.name not in values:
            continue
        colour = SERIES[number % len(SERIES)]
        layers = range(len(values[panel.name]))
        axis.plot(
            layers,
            values[panel.name],
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.5,
            label=label,
        )
        low, high = _ends(panel.name)
        if low in values and high in values:
            axis.fill_between(
                layers, values[low], values[high], color=colour, alpha=0.15, linewidth=0
            )
    if panel.level is not None:
        axis.axhline(panel.level, color=MUTED, linewidth=1, linestyle=":")
    axis.set_ylabel(panel.label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _ends(name: str) -> tuple[str, str]:
    return f"{name}_low", f"{name}_high"


def _written(cosines: Sequence[Sequence[float]]) -> Iterator[tuple[int, int]]:
    """Yield the cells whose number is written."""
    if len(cosines) > _WRITTEN_CELLS:
        return
    for r, row in enumerate(cosines):
        yield from ((r, c) for c, value in enumerate(row) if not math.isnan(value))
