"""Numbers in a grid of cells: layers by coefficients, cosines between vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pvec.report.figure import Figure, Table
from pvec.report.style import SERIES, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WRITTEN_CELLS = 150
"""Numbers are written into the cells of a grid of up to this many."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """``values[row][column]`` (NaN: left blank) and what its sides and colours mean.

    ``columns`` and ``rows`` are an axis label and its ticks. ``limits`` end the colour scale; on
    both sides of 0 it diverges.
    """

    columns: tuple[str, Sequence[str | float]]
    rows: tuple[str, Sequence[str]]
    values: Sequence[Sequence[float]]
    value_label: str
    limits: tuple[float, float] = (0.0, 100.0)
    digits: int = 0
    first_row: Literal["top", "bottom"] = "bottom"


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
        axis = canvas.subplots()
        axis.grid(visible=False)
        low, high = grid.limits
        mesh = axis.pcolormesh(
            [list(row) for row in grid.values],
            cmap="RdBu_r" if low < 0 else "YlGnBu",
            vmin=low,
            vmax=high,
            edgecolors="face",
        )
        _write_cells(axis, grid)
        if marked is not None:
            _frame(axis, *marked)
        if grid.first_row == "top":
            axis.invert_yaxis()
        _label_sides(axis, grid)
        bar = canvas.colorbar(mesh, ax=axis, label=printable(grid.value_label), fraction=0.05)
        bar.outline.set_visible(False)

    (row_label, rows), (column_label, columns) = grid.rows, grid.columns
    cells = tuple(
        (y, x, grid.values[r][c]) for r, y in enumerate(rows) for c, x in enumerate(columns)
    )
    height = min(9.0, 1.3 + 0.42 * len(rows) + 0.06 * _longest(columns))
    return Figure(
        name=name,
        title=title,
        caption=caption,
        table=table or Table(columns=(row_label, column_label, grid.value_label), rows=cells),
        draw=draw,
        size=(5.0, height),
    )


def _write_cells(axis: Axes, grid: Grid) -> None:
    low, high = grid.limits
    if sum(len(row) for row in grid.values) > _WRITTEN_CELLS:
        return
    for r, row in enumerate(grid.values):
        for c, value in enumerate(row):
            if not math.isnan(value):
                share = abs(value) / high if low < 0 else (value - low) / (high - low)
                tone = "#ffffff" if share > 0.58 else "#101418"
                text = f"{value:.{grid.digits}f}"
                axis.text(c + 0.5, r + 0.5, text, ha="center", va="center", color=tone, size=8)


def _frame(axis: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=SERIES[0], linewidth=2.5))


def _label_sides(axis: Axes, grid: Grid) -> None:
    """Label columns and rows; long column names stand upright, and of many only some are named."""
    (row_label, rows), (column_label, columns) = grid.rows, grid.columns
    names = [x if isinstance(x, str) else f"{x:g}" for x in columns]
    for setter, ticks in ((axis.set_xticks, names), (axis.set_yticks, list(rows))):
        places = range(0, len(ticks), math.ceil(len(ticks) / 40))
        setter([i + 0.5 for i in places], [printable(ticks[i]) for i in places])
    if _longest(columns) > 6:
        axis.tick_params(axis="x", rotation=90)
    axis.set_xlabel(printable(column_label))
    axis.set_ylabel(printable(row_label))


def _longest(names: Sequence[str | float]) -> int:
    return max((len(name) for name in names if isinstance(name, str)), default=0)
