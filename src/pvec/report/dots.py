"""Points and bars: what goes with what, and values by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pvec.report.axes import (
    XAxis,
    YAxis,
    cover,
    draw_legend,
    draw_x,
    interval_note,
    legend_height,
    legible,
    says,
    spans,
)
from pvec.report.figure import Cell, Figure, Table, interval_text
from pvec.report.style import (
    INK,
    MARKERS,
    MUTED,
    decimals,
    name_marks,
    number,
    printable,
    series_colours,
)
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_FEW = 40
"""Up to so many points are drawn with large markers."""

_NAMED = 12
"""Up to so many points have their labels written beside them."""

_LEGEND = 12
"""Most groups of points that a legend names; the table has them all."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a scatter: its group gives colour and marker, ``label`` is its own name."""

    group: str
    x: Interval
    y: Interval
    label: str = ""


def scatter(
    *,
    name: str,
    title: str,
    caption: str,
    x: XAxis,
    y: YAxis,
    dots: Sequence[Dot],
    style: Literal["plain", "ordered", "joined"] = "plain",
    table: Table | None = None,
) -> Figure:
    """Draw points with their intervals both ways, a colour and marker per group.

    ``ordered`` groups (degrees) get the colours of the ramp, in the order of ``dots``; ``joined``
    ones a line through their points. Points that are few have their labels beside them. ``table``
    replaces the table of group, x and y.
    """
    groups = list(dict.fromkeys(dot.group for dot in dots))

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for i, (group, colour) in enumerate(
            zip(groups, series_colours(len(groups), ordered=style == "ordered"), strict=True)
        ):
            own = [dot for dot in dots if dot.group == group]
            draw_group(
                axis, own, (x.label, y.label), i, colour,
                joined=style == "joined", small=len(dots) > _FEW,
            )  # fmt: skip
        if style != "joined" and len(dots) <= _NAMED and any(d.label != d.group for d in dots):
            _name_dots(axis, dots)
        draw_x([axis], x)
        axis.set_ylabel(printable(y.label))
        if y.limits is not None:
            cover(axis, y.limits)
        if 1 < len(groups) <= _LEGEND:
            draw_legend(canvas, [axis], groups)

    rows = tuple((dot.group, dot.x.mean, dot.y.mean) for dot in dots)
    ends = [end for dot in dots for end in (dot.x, dot.y)]
    return Figure(
        name=name,
        title=title,
        caption=f"{caption}{interval_note(ends)}",
        table=table or Table(columns=("group", x.label, y.label), rows=rows),
        draw=draw,
        size=(5.0, 3.5 + (legend_height(groups) if len(groups) <= _LEGEND else 0.0)),
    )


def bars(
    *,
    name: str,
    title: str,
    caption: str,
    label: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Interval | None]],
    ordered: bool = False,
    table: Table | None = None,
) -> Figure:
    """Draw one bar per group and series with its value and interval; None leaves a gap.

    Groups stand one under the other, so that long names stay legible on a phone. ``table`` replaces
    the table of one row per bar.
    """

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        colours = series_colours(len(series), ordered=ordered)
        for number_, (series_name, values) in enumerate(series.items()):
            _draw_bars(
                axis, list(zip(groups, values, strict=True)), label, name=series_name,
                series=number_, of=len(series), colour=colours[number_], digits=digits,
            )  # fmt: skip
        axis.set_yticks(range(len(groups)), [legible(group) for group in groups])
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.margins(x=0.2 if any(value.mean < 0 for value in drawn) else 0.14)
        axis.set_xlabel(printable(label))
        if len(series) > 1:
            draw_legend(canvas, [axis], list(series))

    drawn = [value for values in series.values() for value in values if value is not None]
    digits = decimals([value.mean for value in drawn])
    rows_drawn = len(groups) * (1 + 0.45 * (len(series) - 1))
    height = min(9.0, 1.0 + 0.32 * rows_drawn + legend_height(list(series)))
    return Figure(
        name=name,
        title=title,
        caption=f"{caption}{interval_note(drawn)}",
        table=table or _bar_table(label, groups, series),
        draw=draw,
        size=(5.0, height),
    )


def draw_group(
    axis: Axes, dots: Sequence[Dot], labels: tuple[str, str], series: int, colour: str, *,
    joined: bool, small: bool,
) -> None:  # fmt: skip
    """Draw the points of one group with their intervals; ``labels`` are those of x and y."""
    x, y = [dot.x.mean for dot in dots], [dot.y.mean for dot in dots]
    marker = MARKERS[(series + series // len(MARKERS)) % len(MARKERS)]
    bars_ = axis.errorbar(
        x, y, xerr=spans([dot.x for dot in dots]), yerr=spans([dot.y for dot in dots]),
        fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.8,
    )  # fmt: skip
    lines = axis.plot(
        x, y, color=colour, linewidth=1.4, linestyle="-" if joined else "", marker=marker,
        markersize=0, label=legible(dots[0].group),
    )  # fmt: skip
    for artist in (*bars_.lines[2], *lines):
        name_marks(artist, series=series)
    shown = [dot for dot in dots if math.isfinite(dot.x.mean) and math.isfinite(dot.y.mean)]
    points = axis.scatter(
        [dot.x.mean for dot in shown], [dot.y.mean for dot in shown], s=14 if small else 40,
        marker=marker, color=colour, linewidths=0, alpha=1 if joined else 0.8, zorder=3,
    )  # fmt: skip
    titles = [
        f"{says(dot.label or dot.group, labels[1], dot.y)}; {labels[0]} {interval_text(dot.x)}"
        for dot in shown
    ]
    name_marks(points, titles, series=series)


def _name_dots(axis: Axes, dots: Sequence[Dot]) -> None:
    """Write each point's label beside it, on the side that has room."""
    places = [dot.x.mean for dot in dots]
    middle = (min(places) + max(places)) / 2
    for dot in dots:
        left = dot.x.mean > middle
        axis.annotate(
            legible(dot.label), (dot.x.mean, dot.y.mean), xytext=(-6 if left else 6, 5),
            textcoords="offset points", ha="right" if left else "left", size=9.5, color=INK,
        )  # fmt: skip


def _draw_bars(
    axis: Axes, values: Sequence[tuple[str, Interval | None]], label: str, *, name: str,
    series: int, of: int, colour: str, digits: int,
) -> None:  # fmt: skip
    thick = 0.8 / of
    rows = [
        (row, group, value)
        for row, (group, value) in enumerate(values)
        if value is not None and math.isfinite(value.mean)
    ]
    for row, group, value in rows:
        place = row + (series - (of - 1) / 2) * thick
        reach = spans([value])
        bar = axis.barh(
            place, value.mean, height=thick * 0.88, xerr=reach, color=colour,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            label=legible(name) if row == rows[0][0] else "_",
        )  # fmt: skip
        own = group if of == 1 else f"{group}, {name}"
        name_marks(bar.patches[0], [says(own, label, value)], series=series)
        if bar.errorbar is not None:
            for artist in (*bar.errorbar.lines[1], *bar.errorbar.lines[2]):
                name_marks(artist, series=series)
        far = value.low if value.mean < 0 else value.high
        end = value.mean if reach is None else far
        vanishes = reach is None and round(value.mean, digits) == 0
        written = number(value.mean, None if vanishes else digits)
        text = axis.annotate(
            written, (end, place), xytext=(4 if value.mean >= 0 else -4, 0),
            textcoords="offset points", va="center", ha="left" if value.mean >= 0 else "right",
            size=9.5 if of < 3 else 8.5, color=INK,
        )  # fmt: skip
        name_marks(text, series=series)


def _bar_table(
    label: str, groups: Sequence[str], series: Mapping[str, Sequence[Interval | None]]
) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (group, name, value.mean, value.low, value.high, value.n)
        for name, values in series.items()
        for group, value in zip(groups, values, strict=True)
        if value is not None
    ]
    return Table(columns=("group", "series", label, "low_95", "high_95", "n"), rows=tuple(rows))
