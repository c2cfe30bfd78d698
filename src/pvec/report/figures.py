"""The figures pvec draws, each a picture and the table of the numbers in it.

One grammar for all pages and commands: lines over x in stacked panels (``line_chart``), how values
are distributed (``histogram``), points (``scatter``); ``grids`` has numbers in cells. Each function
takes plain numbers and returns a ``Figure``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.report.figure import Cell, Figure, Table
from pvec.report.style import GRID, INK, MARKERS, MUTED, SERIES, printable
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_FEW = 40
"""Up to so many points are drawn with large markers."""

_LEGEND = 12
"""Most groups of points that a legend names; the table has them all."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: ``points[i]`` belongs to ``x[i]``. ``control`` draws it dashed and grey."""

    label: str
    x: Sequence[float]
    points: Sequence[Interval]
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line: a value that does not depend on x (a prompt baseline, chance)."""

    value: Interval
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of a figure's stacked axes: a quantity with its lines and levels.

    ``scores`` fixes the axis to 0-100 and marks x = 0, where nothing is steered.
    """

    label: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a scatter: its group gives colour and marker, ``label`` names it in the CSV."""

    group: str
    x: Interval
    y: Interval
    label: str = ""


def exact(value: float) -> Interval:
    """Return a number without uncertainty."""
    return Interval(mean=value, low=math.nan, high=math.nan, n=1, groups=1)


def line_chart(
    *,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    panels: Sequence[Panel],
    table: Table | None = None,
) -> Figure:
    """Draw lines over x, one panel per quantity, all sharing x; bands are 95 % intervals.

    ``table`` replaces the table of one row per point.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in _labels(panel)))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel)
        axes[-1].set_xlabel(printable(x_label))
        _x_ticks(axes[-1], sorted({x for p in panels for line in p.lines for x in line.x}))
        if len(labels) > 1:
            _legend(canvas, list(axes))

    height = 0.9 + 1.9 * len(panels) + 0.2 * math.ceil(len(labels) / 2)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        table=table or _line_table(x_label, panels),
        draw=draw,
        size=(5.0, height),
    )


def histogram(
    *,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    groups: Sequence[tuple[str, Sequence[float]]],
    y_label: str = "responses",
    threshold: float | None = None,
    scores: bool = False,
) -> Figure:
    """Draw how values are distributed, one outline per (label, values) group.

    ``scores`` bins by fives from 0 to 100; other values choose their own thirty bins.
    """
    import numpy as np

    values = [np.asarray(list(group), dtype=float) for _, group in groups]
    if scores:
        bins, values = np.arange(0.0, 101.0, 5.0), [np.clip(group, 0, 100) for group in values]
    else:
        bins = np.histogram_bin_edges(np.concatenate(values or [np.zeros(1)]), bins=30)
    edges = [float(edge) for edge in bins]
    counts = [[int(n) for n in np.histogram(group, bins=edges)[0]] for group in values]

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for i, (label, _) in enumerate(groups):
            colour = SERIES[i % len(SERIES)]
            axis.stairs(counts[i], edges, color=colour, linewidth=1.6, label=_legible(label))
            axis.stairs(counts[i], edges, color=colour, alpha=0.18, fill=True)
        if threshold is not None:
            axis.axvline(threshold, color=MUTED, linewidth=1, linestyle="--")
        if scores:
            axis.set_xlim(0, 100)
        else:
            axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_xlabel(printable(x_label))
        axis.set_ylabel(y_label)
        _legend(canvas, [axis])

    table = Table(
        columns=("from", "to", *(label for label, _ in groups)),
        rows=tuple(
            (edges[i], edges[i + 1], *(count[i] for count in counts)) for i in range(len(edges) - 1)
        ),
    )
    return Figure(name=name, title=title, caption=caption, table=table, draw=draw)


def scatter(
    *,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    y_label: str,
    dots: Sequence[Dot],
    joined: bool = False,
    table: Table | None = None,
) -> Figure:
    """Draw points with their intervals both ways, a colour and marker per group.

    ``joined`` draws a line through each group's points in their order. ``table`` replaces the table
    of group, x and y.
    """
    groups = list(dict.fromkeys(dot.group for dot in dots))

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for i, group in enumerate(groups):
            own = [dot for dot in dots if dot.group == group]
            axis.errorbar(
                [dot.x.mean for dot in own],
                [dot.y.mean for dot in own],
                xerr=spans([dot.x for dot in own]),
                yerr=spans([dot.y for dot in own]),
                color=SERIES[i % len(SERIES)],
                marker=MARKERS[(i + i // len(SERIES)) % len(MARKERS)],
                markersize=4 if len(dots) > _FEW else 6.5,
                markeredgewidth=0,
                alpha=1 if joined else 0.75,
                linestyle="-" if joined else "",
                linewidth=1.4,
                elinewidth=0.7,
                label=_legible(group),
            )
        axis.set_xlabel(printable(x_label))
        axis.set_ylabel(printable(y_label))
        if 1 < len(groups) <= _LEGEND:
            _legend(canvas, [axis])

    rows = tuple((dot.group, dot.x.mean, dot.y.mean) for dot in dots)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        table=table or Table(columns=("group", x_label, y_label), rows=rows),
        draw=draw,
        size=(5.0, 3.4 + 0.1 * min(len(groups), _LEGEND)),
    )


def spans(values: Sequence[Interval]) -> list[list[float]] | None:
    """Return how far intervals reach down and up, or None where one has none."""
    if any(math.isnan(value.low) for value in values):
        return None
    down = [value.mean - value.low for value in values]
    return [down, [value.high - value.mean for value in values]]


def _draw_panel(axis: Axes, panel: Panel) -> None:
    styles = iter(zip(SERIES * 9, MARKERS * 9, strict=False))
    for line in panel.lines:
        colour, marker = (MUTED, "x") if line.control else next(styles)
        low, high = [point.low for point in line.points], [point.high for point in line.points]
        if not all(map(math.isnan, low)):
            axis.fill_between(line.x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.plot(
            line.x,
            [point.mean for point in line.points],
            color=colour,
            marker=marker if len(line.x) <= _FEW else "",
            linestyle="--" if line.control else "-",
            label=_legible(line.label),
        )
    for i, level in enumerate(panel.levels):
        axis.axhline(
            level.value.mean,
            color=INK if level.label else MUTED,
            linewidth=1.2,
            linestyle=(":", "-.")[i % 2],
            label=_legible(level.label) if level.label else "_",
        )
    axis.set_ylabel(printable(panel.label))
    if panel.scores:
        axis.axvline(0, color=GRID, linewidth=1.4, zorder=0.5)
        axis.set_ylim(-4, 104)
        axis.set_yticks([0, 25, 50, 75, 100])


def _x_ticks(axis: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(values) <= 9:
        axis.set_xticks(values, [f"{x:g}" for x in values])
    elif all(float(x).is_integer() for x in values):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _labels(panel: Panel) -> list[str]:
    labels = [*(line.label for line in panel.lines), *(level.label for level in panel.levels)]
    return [label for label in labels if label]


def _line_table(x_label: str, panels: Sequence[Panel]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for panel in panels:
        for line in panel.lines:
            for x, point in zip(line.x, line.points, strict=True):
                rows.append((panel.label, line.label, x, *_interval_cells(point)))
        rows.extend(
            (panel.label, level.label, None, *_interval_cells(level.value))
            for level in panel.levels
        )
    columns = ("metric", "condition", x_label, "mean", "low_95", "high_95", "n", "missing")
    return Table(columns=columns, rows=tuple(rows))


def _interval_cells(point: Interval) -> tuple[Cell, ...]:
    return (point.mean, point.low, point.high, point.n, point.missing)


def _legend(canvas: Canvas, axes: Sequence[Axes]) -> None:
    """Name every line of the axes once, below them."""
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    canvas.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)


def _legible(label: str, *, limit: int = 40) -> str:
    """Return a name for a legend: short, and shown although it begins with an underscore."""
    text = printable(label)
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return f"\u200b{text}" if text.startswith("_") else text
