"""The kinds of picture pvec draws. Each function takes plain numbers and returns a ``Figure``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.report.figures import GRID, INK, MARKERS, MUTED, SERIES, Cell, Figure, Table
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import Patch


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: ``points[i]`` belongs to ``x[i]``. ``control`` draws it dashed and grey."""

    label: str
    x: tuple[float, ...]
    points: tuple[Interval, ...]
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A horizontal line: a level that does not depend on x (a prompt baseline)."""

    label: str
    level: Interval


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of a figure's stacked axes: a metric with its lines and levels."""

    metric: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()


def curves(*, name: str, title: str, caption: str, x_label: str, panels: Sequence[Panel]) -> Figure:
    """Draw scores (0-100) over x, one panel per metric, all sharing x; bands are 95% intervals."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel)
        axes[-1].set_xlabel(x_label)
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=2)

    lines = max(len(panel.series) + len(panel.references) for panel in panels)
    height = 0.9 + 1.9 * len(panels) + 0.2 * math.ceil(lines / 2)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        table=_curves_table(x_label, panels),
        draw=draw,
        size=(5.0, height),
    )


def heat_map(
    *,
    name: str,
    title: str,
    caption: str,
    columns: tuple[str, Sequence[float]],
    rows: tuple[str, Sequence[str]],
    values: Sequence[Sequence[float]],
    value_label: str,
    marked: tuple[int, int] | None = None,
) -> Figure:
    """Draw ``values[row][column]`` (0-100, NaN left blank) with the numbers written in the cells.

    ``columns`` and ``rows`` are an axis label and its ticks. ``marked`` is the (row, column) of the
    cell to frame, the point that was picked.
    """

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        axis.grid(visible=False)
        mesh = axis.pcolormesh(
            [list(row) for row in values], cmap="YlGnBu", vmin=0, vmax=100, edgecolors="face"
        )
        for r, row in enumerate(values):
            for c, value in enumerate(row):
                if not math.isnan(value):
                    tone = "#ffffff" if value > 55 else "#101418"
                    axis.text(
                        c + 0.5, r + 0.5, f"{value:.0f}", ha="center", va="center", color=tone
                    )
        if marked is not None:
            row_index, column_index = marked
            axis.add_patch(_frame(column_index, row_index))
        axis.set_xticks([c + 0.5 for c in range(len(columns[1]))], [f"{x:g}" for x in columns[1]])
        axis.set_yticks([r + 0.5 for r in range(len(rows[1]))], list(rows[1]))
        axis.set_xlabel(columns[0])
        axis.set_ylabel(rows[0])
        bar = canvas.colorbar(mesh, ax=axis, label=value_label, fraction=0.05)
        bar.outline.set_visible(False)

    table = Table(
        columns=(rows[0], columns[0], value_label),
        rows=tuple(
            (y, x, values[r][c]) for r, y in enumerate(rows[1]) for c, x in enumerate(columns[1])
        ),
    )
    height = min(7.0, 1.3 + 0.42 * len(rows[1]))
    return Figure(
        name=name, title=title, caption=caption, table=table, draw=draw, size=(5.0, height)
    )


def layer_lines(
    *,
    name: str,
    title: str,
    caption: str,
    y_label: str,
    lines: Sequence[tuple[str, Sequence[float]]],
    bands: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    marked_layer: int | None = None,
    level: float | None = None,
) -> Figure:
    """Draw one or more quantities per layer; ``lines`` are (label, value of layer 0, 1, …).

    ``bands`` are the (low, high) ends of 95 % intervals of the first lines, drawn around them.
    ``marked_layer`` gets a vertical line, ``level`` a horizontal one (chance, for instance).
    """

    def draw(canvas: Canvas) -> None:
        from matplotlib.ticker import MaxNLocator

        axis = canvas.subplots()
        for i, (label, values) in enumerate(lines):
            axis.plot(
                range(len(values)),
                list(values),
                color=SERIES[i % len(SERIES)],
                marker=MARKERS[i % len(MARKERS)],
                label=label,
            )
        for i, (low, high) in enumerate(bands):
            axis.fill_between(
                range(len(low)), list(low), list(high), color=SERIES[i], alpha=0.15, linewidth=0
            )
        if level is not None:
            axis.axhline(level, color=MUTED, linewidth=1, linestyle=":")
        if marked_layer is not None:
            axis.axvline(marked_layer, color=MUTED, linewidth=1, linestyle="--")
        axis.set_xlabel("layer (0 = embedding)")
        axis.set_ylabel(y_label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) > 1:
            canvas.legend(loc="outside lower center", ncols=3)

    columns = [*lines]
    for (label, _), (low, high) in zip(lines, bands, strict=False):
        columns += [(f"{label} low_95", low), (f"{label} high_95", high)]
    depth = max(len(values) for _, values in columns)
    table = Table(
        columns=("layer", *(label for label, _ in columns)),
        rows=tuple(
            (layer, *(values[layer] if layer < len(values) else None for _, values in columns))
            for layer in range(depth)
        ),
    )
    return Figure(name=name, title=title, caption=caption, table=table, draw=draw)


def histogram(
    *,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    groups: Sequence[tuple[str, Sequence[float]]],
    threshold: float | None = None,
) -> Figure:
    """Draw how scores from 0 to 100 are distributed, one outline per (label, scores) group."""
    edges = [float(edge) for edge in range(0, 101, 5)]
    counts = [_count(scores, edges) for _, scores in groups]

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for i, (label, _) in enumerate(groups):
            colour = SERIES[i % len(SERIES)]
            axis.stairs(counts[i], edges, color=colour, linewidth=1.6, label=label)
            axis.stairs(counts[i], edges, color=colour, alpha=0.18, fill=True)
        if threshold is not None:
            axis.axvline(threshold, color=MUTED, linewidth=1, linestyle="--")
        axis.set_xlim(0, 100)
        axis.set_xlabel(x_label)
        axis.set_ylabel("responses")
        canvas.legend(loc="outside lower center", ncols=2)

    table = Table(
        columns=("from", "to", *(label for label, _ in groups)),
        rows=tuple(
            (edges[i], edges[i + 1], *(count[i] for count in counts)) for i in range(len(edges) - 1)
        ),
    )
    return Figure(name=name, title=title, caption=caption, table=table, draw=draw)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    styles = _styles(panel.series)
    for series, (colour, marker) in zip(panel.series, styles, strict=True):
        mean = [point.mean for point in series.points]
        axis.fill_between(
            series.x,
            [point.low for point in series.points],
            [point.high for point in series.points],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        line = "--" if series.control else "-"
        axis.plot(series.x, mean, color=colour, marker=marker, linestyle=line, label=series.label)
    for i, reference in enumerate(panel.references):
        dots = (":", "-.")[i % 2]
        level = reference.level.mean
        axis.axhline(level, color=INK, linewidth=1.2, linestyle=dots, label=reference.label)
    axis.axvline(0, color=GRID, linewidth=1.4, zorder=0.5)
    ticks = sorted({x for series in panel.series for x in series.x})
    if len(ticks) <= 9:
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_ylim(-4, 104)
    axis.set_yticks([0, 25, 50, 75, 100])
    axis.set_ylabel(panel.metric)


def _styles(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Give each line a colour and marker; controls share the muted colour."""
    styles: list[tuple[str, str]] = []
    used = 0
    for one in series:
        if one.control:
            styles.append((MUTED, "x"))
        else:
            styles.append((SERIES[used % len(SERIES)], MARKERS[used % len(MARKERS)]))
            used += 1
    return styles


def _curves_table(x_label: str, panels: Sequence[Panel]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for panel in panels:
        for series in panel.series:
            for x, point in zip(series.x, series.points, strict=True):
                rows.append((panel.metric, series.label, x, *_interval_cells(point)))
        rows.extend(
            (panel.metric, reference.label, None, *_interval_cells(reference.level))
            for reference in panel.references
        )
    columns = ("metric", "condition", x_label, "mean", "low_95", "high_95", "n", "missing")
    return Table(columns=columns, rows=tuple(rows))


def _interval_cells(point: Interval) -> tuple[Cell, ...]:
    return (point.mean, point.low, point.high, point.n, point.missing)


def _frame(column: int, row: int) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((column, row), 1, 1, fill=False, edgecolor=SERIES[0], linewidth=2.5)


def _count(scores: Sequence[float], edges: Sequence[float]) -> list[int]:
    import numpy as np

    return [int(count) for count in np.histogram(np.clip(list(scores), 0, 100), bins=edges)[0]]
