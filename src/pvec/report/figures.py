"""The figures pvec draws, each a picture and the table of the numbers in it.

One grammar for all pages, commands and notebooks: lines over x in stacked panels (``line_chart``)
and how values are distributed (``histogram``); ``dots`` has points and bars, ``grids`` numbers in
cells. Each function takes plain numbers and returns a ``Figure``. Whatever has an interval is drawn
with it, and the caption says so, with n; every mark says its numbers in a title.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pvec.report.axes import (
    Scale,
    XAxis,
    cover,
    draw_legend,
    draw_x,
    interval_note,
    legend_height,
    legible,
    mark_x,
    says,
    second_scale,
    spans,
)
from pvec.report.figure import Cell, Figure, Table
from pvec.report.style import (
    GRID,
    INK,
    MARKERS,
    MUTED,
    name_marks,
    printable,
    series_colours,
    short_number,
)
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_BARS = 12
"""Up to so many values of x have error bars; more have a band."""

_FEW = 40
"""Up to so many points are drawn with large markers."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: ``points[i]`` belongs to ``x[i]``. A control is dashed, in the colour of the line
    labelled ``control_of``, or grey where there is none.
    """

    label: str
    x: Sequence[float]
    points: Sequence[Interval]
    control_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line: a value that does not depend on x (a prompt baseline, an alarm)."""

    value: Interval
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of a figure's stacked axes: a quantity with its lines and levels.

    ``limits`` are what the axis covers at least (``SCORE_AXIS``, 0 to 1 for a cosine), so that
    noise is not drawn as structure. ``right`` is the second scale of the quantity.
    """

    label: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    limits: tuple[float, float] | None = None
    right: Scale | None = None


def line_chart(
    *,
    name: str,
    title: str,
    caption: str,
    x: XAxis,
    panels: Sequence[Panel],
    ordered: bool = False,
    columns: int = 1,
    table: Table | None = None,
) -> Figure:
    """Draw lines over x, one panel per quantity, all sharing x.

    Panels of several ``columns`` are small multiples: of one quantity, under their labels, with one
    scale. ``ordered`` lines (layers, doses) get the colours of the ramp. ``table`` replaces the
    table of one row per point.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in _labels(panel)))
    rows = math.ceil(len(panels) / columns)
    colours = _line_colours(panels, ordered=ordered)
    places = sorted({place for panel in panels for line in panel.lines for place in line.x})

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(rows, columns, sharex=True, sharey=columns > 1, squeeze=False)
        axes, empty = grid.flat[: len(panels)], grid.flat[len(panels) :]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, x_label=x.label, colours=colours, labels=labels)
        for axis in empty:
            axis.set_axis_off()
        if columns > 1:
            _label_multiples(grid, panels, x)
        else:
            draw_x(list(axes), x)
        mark_x(axes[-1], places)
        if len(labels) > 1:
            draw_legend(canvas, list(axes), labels)

    points = [point for panel in panels for line in panel.lines for point in line.points]
    shape = "Bands" if len(places) > _BARS else "Bars"
    height = 0.9 + (1.9 if columns == 1 else 1.5) * rows + legend_height(labels)
    return Figure(
        name=name,
        title=title,
        caption=f"{caption}{interval_note(points, shape=shape)}",
        table=table or _line_table(x.label, panels),
        draw=draw,
        size=(5.0, height + (0.3 if x.top or x.references else 0.0)),
    )


def histogram(
    *,
    name: str,
    title: str,
    caption: str,
    x: XAxis,
    groups: Sequence[tuple[str, Sequence[float]]],
    y_label: str = "responses",
    scores: bool = False,
) -> Figure:
    """Draw how values are distributed, one outline per (label, values) group; the caption has n.

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
    labels = [label for label, _ in groups]

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for i, colour in enumerate(series_colours(len(groups))):
            for fill in (True, False):
                stairs = axis.stairs(
                    counts[i], edges, color=colour, linewidth=1.6, fill=fill,
                    alpha=0.18 if fill else None, label="_" if fill else legible(labels[i]),
                )  # fmt: skip
                name_marks(stairs, series=i)
        _bin_titles(axis, edges, dict(zip(labels, counts, strict=True)), y_label)
        axis.set_xlim(edges[0], edges[-1])
        draw_x([axis], x)
        axis.set_ylabel(y_label)
        draw_legend(canvas, [axis], labels)

    table = Table(
        columns=("from", "to", *labels),
        rows=tuple(
            (edges[i], edges[i + 1], *(count[i] for count in counts)) for i in range(len(edges) - 1)
        ),
    )
    sizes = ", ".join(f"{label} {len(group):,}" for label, group in groups)
    return Figure(
        name=name,
        title=title,
        caption=f"{caption} n: {sizes}.",
        table=table,
        draw=draw,
        size=(5.0, 3.0 + legend_height(labels)),
    )


def _label_multiples(grid: Any, panels: Sequence[Panel], x: XAxis) -> None:
    """Write each panel's label over it, and name x under the last panel of each column."""
    for axis, panel in zip(grid.flat, panels, strict=False):
        axis.set_title(textwrap.fill(printable(panel.label), 60 // grid.shape[1]), size=9.5)
        axis.set_ylabel("")
    for axis in grid.flat[: len(panels)][-grid.shape[1] :]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(printable(x.label), size=10)


def _line_colours(panels: Sequence[Panel], *, ordered: bool) -> dict[str, str]:
    """Return the colour of each line: a control has that of the line it is a control of."""
    lines = [line for panel in panels for line in panel.lines]
    own = list(dict.fromkeys(line.label for line in lines if line.control_of is None))
    colours = dict(zip(own, series_colours(len(own), ordered=ordered), strict=True))
    for line in lines:
        if line.control_of is not None:
            colours[line.label] = colours.get(line.control_of, MUTED)
    return colours


def _draw_panel(
    axis: Axes, panel: Panel, *, x_label: str, colours: Mapping[str, str], labels: Sequence[str]
) -> None:
    own = list(colours)
    for place, line in enumerate(panel.lines):
        _draw_line(
            axis, line, panel.label, x_label=x_label, series=labels.index(line.label),
            colour=colours[line.label], marker=MARKERS[own.index(line.label) % len(MARKERS)],
            shift=place - (len(panel.lines) - 1) / 2,
        )  # fmt: skip
    for i, level in enumerate(panel.levels):
        series = labels.index(level.label) if level.label else None
        drawn = [axis.axhline(
            level.value.mean,
            color=INK if level.label else MUTED,
            linewidth=1.2,
            linestyle=(":", "-.")[i % 2],
            label=legible(level.label) if level.label else "_",
        )]  # fmt: skip
        name_marks(drawn[0], [says(level.label or "level", panel.label, level.value)],
                   series=series)  # fmt: skip
        if not math.isnan(level.value.low):
            band = axis.axhspan(level.value.low, level.value.high, color=INK, alpha=0.06, zorder=0)
            name_marks(band, series=series)
    axis.set_ylabel(printable(panel.label))
    if panel.limits is not None:
        cover(axis, panel.limits)
    if panel.right is not None:
        second_scale(axis, panel.right, side="right")
    if axis.get_xlim()[0] < 0 < axis.get_xlim()[1]:
        axis.axvline(0, color=GRID, linewidth=1.4, zorder=0.5)


def _draw_line(
    axis: Axes, line: Line, quantity: str, *, x_label: str, series: int, colour: str, marker: str,
    shift: float,
) -> None:  # fmt: skip
    """Draw one line with the intervals of its points; bars of several lines stand side by side."""
    known = [(x, p) for x, p in zip(line.x, line.points, strict=True) if not math.isnan(p.mean)]
    if not known:
        return
    control = line.control_of is not None
    banded = len(known) > _BARS
    step = 0.0 if banded else 0.009 * (known[-1][0] - known[0][0])
    x = [value + shift * step for value, _ in known]
    y = [point.mean for _, point in known]
    reach = spans([point for _, point in known])
    drawn: list[Any] = [*axis.plot(
        x, y, color=colour, linestyle="--" if control else "-", linewidth=1.2 if control else 1.8,
        marker=marker if len(x) <= _FEW else "", markersize=0, label=legible(line.label),
        markerfacecolor="none" if control else colour,
    )]  # fmt: skip
    if reach is not None and banded:
        low = [value - down for value, down in zip(y, reach[0], strict=True)]
        high = [value + up for value, up in zip(y, reach[1], strict=True)]
        drawn.append(axis.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0))
    elif reach is not None:
        bars = axis.errorbar(x, y, yerr=reach, fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)
        drawn += bars.lines[2]
    for artist in drawn:
        name_marks(artist, series=series)
    face = "none" if control else colour
    dots = axis.scatter(
        x, y, s=26 if len(x) <= _FEW else 5, marker=marker, facecolors=face, edgecolors=colour,
        linewidths=1.2 if control else 0, zorder=3,
    )  # fmt: skip
    name_marks(
        dots,
        [f"{says(line.label, quantity, p)}, {x_label} {short_number(value)}" for value, p in known],
        series=series,
    )


def _bin_titles(
    axis: Axes, edges: Sequence[float], counts: Mapping[str, Sequence[int]], unit: str
) -> None:
    """Put a column over each bin that shows nothing and says its counts."""
    from matplotlib.patches import Rectangle

    top = axis.get_ylim()[1]
    for i, (low, high) in enumerate(pairwise(edges)):
        column = axis.add_patch(Rectangle((low, 0), high - low, top, alpha=0.002, facecolor=INK))
        held = ", ".join(f"{label} {count[i]:,}" for label, count in counts.items())
        name_marks(column, [f"{short_number(low)} to {short_number(high)}: {held} {unit}"])


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
