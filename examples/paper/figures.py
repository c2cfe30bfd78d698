"""Figures over seeds, and tables with all their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pvec.report.axes import XAxis, YAxis
from pvec.report.dots import Dot, scatter
from pvec.report.figure import Cell, Figure, Table
from pvec.report.grids import Grid, heat_map
from pvec.stats import Interval

HEAD = ("mean", "low_95", "high_95", "seeds")


def cells(interval: Interval) -> tuple[Cell, ...]:
    """Return an interval as table cells, under ``HEAD``."""
    bounds = (None if math.isnan(v) else v for v in (interval.low, interval.high))
    return (interval.mean, *bounds, interval.n)


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
        x=XAxis(label=x_label),
        y=YAxis(label=y_label),
        dots=points,
        style="joined" if joined else "plain",
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
        scale="signed",
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
