"""Numbers in a grid of cells: layers by coefficients, cosines between vectors."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pvec.report.figure import Figure, Table
from pvec.report.style import CELLS, INK, name_marks, number, printable, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure as Canvas

_WRITTEN_CELLS = 150
"""Numbers are written into the cells of a grid of up to this many."""

_ROOMY = 24
"""Characters side by side that have room at full size."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """``values[row][column]`` (NaN: left blank) and what its sides and colours mean.

    ``columns`` and ``rows`` are an axis label and its ticks. ``limits`` end the colour scale.
    ``scale`` says what the colours mean: how much of a trait, how good, or a value with a sign,
    whose colours diverge from 0.
    """

    columns: tuple[str, Sequence[str | float]]
    rows: tuple[str, Sequence[str]]
    values: Sequence[Sequence[float]]
    value_label: str
    limits: tuple[float, float] = (0.0, 100.0)
    scale: Literal["trait", "quality", "signed"] = "trait"
    digits: int = 0
    first_row: Literal["top", "bottom"] = "bottom"

    @classmethod
    def of_pairs(
        cls, values: Mapping[tuple[str, str], float], *, rows: str, columns: str, value_label: str
    ) -> Grid:
        """Return the grid of values by (row, column), in the order in which each is named first."""
        row_ticks, column_ticks = (
            list(dict.fromkeys(names)) for names in zip(*values, strict=True)
        )
        return cls(
            columns=(columns, column_ticks),
            rows=(rows, row_ticks),
            values=[
                [values.get((row, col), math.nan) for col in column_ticks] for row in row_ticks
            ],
            value_label=value_label,
            first_row="top",
        )

    @classmethod
    def of_cosines(
        cls,
        side: str,
        names: Sequence[str],
        rows: Sequence[str],
        cosines: Sequence[Sequence[float]],
    ) -> Grid:
        """Return the grid of a matrix of cosines, from -1 to 1."""
        return cls(
            columns=(side, names),
            rows=(side, rows),
            values=cosines,
            value_label="cosine",
            limits=(-1.0, 1.0),
            scale="signed",
            digits=2,
            first_row="top",
        )


def heat_map(
    grid: Grid,
    *,
    name: str,
    title: str,
    caption: str,
    marked: tuple[int, int] | None = None,
    table: Table | None = None,
) -> Figure:
    """Draw a grid with the numbers written in its cells, while they fit.

    ``marked`` is the (row, column) of the cell to frame, the point that was picked. ``table``
    replaces the table of one row per cell.
    """

    def draw(canvas: Canvas) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        axis = canvas.subplots()
        axis.grid(visible=False)
        colours = ScalarMappable(Normalize(*grid.limits), cmap=CELLS[grid.scale])
        _draw_cells(axis, grid, colours)
        if marked is not None:
            _frame(axis, *marked)
        axis.set_xlim(0, len(grid.columns[1]))
        axis.set_ylim(*(0, len(grid.rows[1]))[:: -1 if grid.first_row == "top" else 1])
        _label_sides(axis, grid)
        bar = canvas.colorbar(colours, ax=axis, label=printable(grid.value_label), fraction=0.05)
        bar.outline.set_visible(False)

    (row_label, rows), (column_label, columns) = grid.rows, grid.columns
    cells = tuple(
        (y, x, grid.values[r][c]) for r, y in enumerate(rows) for c, x in enumerate(columns)
    )
    height = min(9.0, 1.3 + 0.42 * len(rows) + 0.06 * _longest(columns) * _upright(columns))
    return Figure(
        name=name,
        title=title,
        caption=caption,
        table=table or Table(columns=(row_label, column_label, grid.value_label), rows=cells),
        draw=draw,
        size=(5.0, height),
    )


def _draw_cells(axis: Axes, grid: Grid, colours: ScalarMappable) -> None:
    """Draw the cells, each with its value as title and, while they fit, as text."""
    import numpy as np
    from matplotlib.patches import Rectangle

    written = sum(len(row) for row in grid.values) <= _WRITTEN_CELLS
    (row_label, rows), (column_label, columns) = grid.rows, grid.columns
    longest = max((len(number(v, grid.digits)) for row in grid.values for v in row), default=0)
    size = 10 if longest * len(columns) <= _ROOMY else 8
    for r, row in enumerate(grid.values):
        for c, value in enumerate(row):
            if math.isnan(value):
                continue
            red, green, blue, _ = colours.to_rgba(np.array(value))
            cell = axis.add_patch(Rectangle((c, r), 1, 1, color=(red, green, blue), linewidth=0))
            where = f"{row_label} {rows[r]}, {column_label} {_tick(columns[c])}"
            name_marks(cell, [f"{where}: {grid.value_label} {number(value, grid.digits)}"])
            if written:
                light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
                tone = "#101418" if light > 0.18 else "#ffffff"
                text = number(value, grid.digits)
                axis.text(c + 0.5, r + 0.5, text, ha="center", va="center", color=tone, size=size)


def _frame(axis: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(
        Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=3, clip_on=False)
    )


def _tick(name: str | float) -> str:
    return name if isinstance(name, str) else short_number(name)


def _label_sides(axis: Axes, grid: Grid) -> None:
    """Label columns and rows; long column names stand upright, and of many only some are named."""
    (row_label, rows), (column_label, columns) = grid.rows, grid.columns
    names = [_tick(name) for name in columns]
    for setter, ticks in ((axis.set_xticks, names), (axis.set_yticks, list(rows))):
        places = range(0, len(ticks), math.ceil(len(ticks) / 40))
        setter([i + 0.5 for i in places], [_wrapped(ticks[i]) for i in places])
    if _upright(columns):
        axis.tick_params(axis="x", rotation=90)
    axis.set_xlabel(printable(column_label))
    axis.set_ylabel(printable(row_label))


def _wrapped(name: str) -> str:
    """Break a long name into lines, so that it leaves room for the cells."""
    return textwrap.fill(printable(name), 18) if len(name) > 18 else printable(name)


def _upright(names: Sequence[str | float]) -> bool:
    """Whether the names of columns have no room side by side."""
    return _longest(names) * len(names) > 36


def _longest(names: Sequence[str | float]) -> int:
    return max((len(name) for name in names if isinstance(name, str)), default=0)
