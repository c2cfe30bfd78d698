"""The kinds of picture that pvec's own reports do not have: bars, labelled points, a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.report.figures import INK, MARKERS, MUTED, SERIES, Cell, Figure, Table
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

HEAD = ("mean", "low_95", "high_95", "seeds")


def cells(interval: Interval) -> tuple[Cell, ...]:
    """Return an interval as table cells, under ``HEAD``."""
    bounds = (None if math.isnan(v) else v for v in (interval.low, interval.high))
    return (interval.mean, *bounds, interval.n)


def exactly(value: float) -> Interval:
    """Return a place on an axis, which is known."""
    return Interval(mean=value, low=value, high=value, n=1, groups=1)


def bars(
    *,
    name: str,
    title: str,
    caption: str,
    label: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Interval | None]],
) -> Figure:
    """Draw one bar per group and series with its 95 % interval; None leaves a gap.

    Groups stand one under the other, so that long names stay legible on a phone.
    """

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        thick = 0.8 / len(series)
        for number, (_, values) in enumerate(series.items()):
            places = [
                (row + (number - (len(series) - 1) / 2) * thick, value)
                for row, value in enumerate(values)
                if value is not None
            ]
            axis.barh(
                [y for y, _ in places],
                [value.mean for _, value in places],
                height=thick * 0.9,
                xerr=_spans([value for _, value in places]),
                color=SERIES[number % len(SERIES)],
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            )
        axis.set_yticks(range(len(groups)), list(groups))
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_xlabel(label)
        if len(series) > 1:
            _legend(canvas, list(series), marker="s")

    rows = tuple(
        (group, one, *cells(value))
        for one, values in series.items()
        for group, value in zip(groups, values, strict=True)
        if value is not None
    )
    table = Table(columns=("group", "series", *(f"{label}: {h}" for h in HEAD)), rows=rows)
    rows_drawn = len(groups) * (1 + 0.35 * (len(series) - 1))
    height = min(8.0, 1.1 + 0.27 * rows_drawn + 0.2 * math.ceil(len(series) / 2))
    return Figure(
        name=name, title=title, caption=caption, table=table, draw=draw, size=(5.0, height)
    )


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a scatter: its group gives colour and marker, ``text`` names it in the CSV."""

    group: str
    text: str
    x: Interval
    y: Interval


def dots(
    *,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    y_label: str,
    points: Sequence[Dot],
    lined: bool = False,
) -> Figure:
    """Draw points with intervals both ways; ``lined`` joins each group's points in their order."""
    groups = list(dict.fromkeys(point.group for point in points))

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for number, group in enumerate(groups):
            mine = [point for point in points if point.group == group]
            axis.errorbar(
                [point.x.mean for point in mine],
                [point.y.mean for point in mine],
                xerr=_spans([point.x for point in mine]),
                yerr=_spans([point.y for point in mine]),
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if lined else "",
                linewidth=1.4,
                elinewidth=0.7,
                label=group,
            )
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if len(groups) > 1:
            _legend(canvas, groups)

    rows = tuple((point.group, point.text, *cells(point.x), *cells(point.y)) for point in points)
    sides = (f"{label}: {head}" for label in (x_label, y_label) for head in HEAD)
    table = Table(columns=("group", "point", *sides), rows=rows)
    return Figure(name=name, title=title, caption=caption, table=table, draw=draw, size=(5.0, 4.0))


def matrix(
    *,
    name: str,
    title: str,
    caption: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    values: Sequence[Sequence[Interval]],
    limit: float,
    digits: int = 0,
) -> Figure:
    """Draw ``values[row][column]`` between ``-limit`` and ``limit``, numbers in the cells."""

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        axis.grid(visible=False)
        means = [[value.mean for value in row] for row in values]
        axis.pcolormesh(means, cmap="PuOr_r", vmin=-limit, vmax=limit)
        for r, row in enumerate(means):
            for c, value in enumerate(row):
                tone = "#ffffff" if abs(value) > 0.6 * limit else "#101418"
                text = f"{value:.{digits}f}"
                axis.text(c + 0.5, r + 0.5, text, ha="center", va="center", color=tone, size=8)
        places = [c + 0.5 for c in range(len(columns[1]))]
        axis.set_xticks(places, list(columns[1]), rotation=40, ha="right")
        axis.set_yticks([r + 0.5 for r in range(len(rows[1]))], list(rows[1]))
        axis.invert_yaxis()
        axis.set_xlabel(columns[0])
        axis.set_ylabel(rows[0])

    table = Table(
        columns=(rows[0], columns[0], *HEAD),
        rows=tuple(
            (one, other, *cells(values[r][c]))
            for r, one in enumerate(rows[1])
            for c, other in enumerate(columns[1])
        ),
    )
    height = min(6.0, 1.6 + 0.34 * len(rows[1]))
    return Figure(
        name=name, title=title, caption=caption, table=table, draw=draw, size=(5.0, height)
    )


def _spans(values: Sequence[Interval]) -> list[list[float]] | None:
    """Return how far intervals reach down and up, or None where there are none."""
    if any(math.isnan(value.low) for value in values):
        return None
    down = [value.mean - value.low for value in values]
    return [down, [value.high - value.mean for value in values]]


def _legend(canvas: Canvas, labels: Sequence[str], *, marker: str | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=SERIES[i % len(SERIES)],
            marker=marker or MARKERS[i % len(MARKERS)],
            linestyle="",
        )
        for i in range(len(labels))
    ]
    canvas.legend(handles, list(labels), loc="outside lower center", ncols=min(3, len(labels)))
