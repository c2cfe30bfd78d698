"""Figures over seeds: bars, which pvec's own reports do not have, and tables with all intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pvec.report.figure import Cell, Figure, Table
from pvec.report.figures import Dot, scatter, spans
from pvec.report.grids import Grid, heat_map
from pvec.report.style import INK, MUTED, SERIES
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

HEAD = ("mean", "low_95", "high_95", "seeds")


def cells(interval: Interval) -> tuple[Cell, ...]:
    """Return an interval as table cells, under ``HEAD``."""
    bounds = (None if math.isnan(v) else v for v in (interval.low, interval.high))
    return (interval.mean, *bounds, interval.n)


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
        for number, (label_of_series, values) in enumerate(series.items()):
            places = [
                (row + (number - (len(series) - 1) / 2) * thick, value)
                for row, value in enumerate(values)
                if value is not None
            ]
            axis.barh(
                [y for y, _ in places],
                [value.mean for _, value in places],
                height=thick * 0.9,
                xerr=spans([value for _, value in places]),
                color=SERIES[number % len(SERIES)],
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
                label=label_of_series,
            )
        axis.set_yticks(range(len(groups)), list(groups))
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_xlabel(label)
        if len(series) > 1:
            canvas.legend(loc="outside lower center", ncols=min(3, len(series)))

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


def dots(
    *,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    y_label: str,
    points: Sequence[Dot],
    joined: bool = False,
) -> Figure:
    """Draw points with intervals over seeds both ways; the table has all their numbers."""
    sides = (f"{label}: {head}" for label in (x_label, y_label) for head in HEAD)
    rows = tuple((dot.group, dot.label, *cells(dot.x), *cells(dot.y)) for dot in points)
    return scatter(
        name=name,
        title=title,
        caption=caption,
        x_label=x_label,
        y_label=y_label,
        dots=points,
        joined=joined,
        table=Table(columns=("group", "point", *sides), rows=rows),
    )


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
    """Draw means over seeds in a grid from ``-limit`` to ``limit``; the table has intervals too."""
    grid = Grid(
        rows=rows,
        columns=columns,
        values=[[value.mean for value in row] for row in values],
        value_label="mean over seeds",
        limits=(-limit, limit),
        digits=digits,
        first_row="top",
    )
    table = Table(
        columns=(rows[0], columns[0], *HEAD),
        rows=tuple(
            (row, column, *cells(values[r][c]))
            for r, row in enumerate(rows[1])
            for c, column in enumerate(columns[1])
        ),
    )
    return heat_map(grid, name=name, title=title, caption=caption, table=table)
