"""What a figure is: a picture and the table of the numbers in it, never one without the other."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec import __version__
from pvec.data.csv_table import defused
from pvec.errors import InputError, StoreError
from pvec.report.style import STYLE, decimals, number, printable, themed, true_minus, with_titles
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Cell = str | int | float | Interval | None


class Difference(Interval):
    """An interval that is shown with its sign."""

    @classmethod
    def of(cls, interval: Interval | None) -> Difference | None:
        """Return the same interval as a difference; None for None."""
        return None if interval is None else cls(**vars(interval))


@dataclass(frozen=True, kw_only=True)
class Table:
    """Named columns and their rows; a missing number is ``None`` and an empty CSV cell."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """Return the table as CSV text with a header line."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_csv_cell(cell) for cell in row] for row in self.rows])
        return buffer.getvalue()

    def numeric(self) -> list[bool]:
        """Return which columns hold numbers."""
        return [any(isinstance(c, int | float | Interval) for c in column) for column in self._by()]

    def shown(self) -> list[list[str]]:
        """Return the cells for people: the numbers of a column with the same decimals, intervals
        as ``71.3 (68.0 to 74.1)``, what is missing as a dash.
        """
        columns = [[_shown(cell, _digits(column)) for cell in column] for column in self._by()]
        return [list(row) for row in zip(*columns, strict=True)]

    def _by(self) -> list[list[Cell]]:
        return [[row[i] for row in self.rows] for i in range(len(self.columns))]


_DPI = 200
"""Of the layout too: text is a little narrower at another resolution, and would be cut."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture with its numbers.

    ``name`` is a file stem, unique in a page. ``draw`` gets an empty matplotlib figure of ``size``
    inches (five wide: legible on a phone without scrolling) and draws exactly what ``table`` says.
    ``source`` names model, run and date in the footer of an exported file.
    """

    name: str
    title: str
    caption: str
    table: Table
    draw: Callable[[Canvas], None]
    size: tuple[float, float] = (5.0, 3.4)
    source: str = ""

    def svg(self) -> str:
        """Return a stand-alone SVG document with title, caption and footer."""
        return self._svg(self.canvas())

    def png(self) -> bytes:
        """Return a PNG at 200 dots per inch, with title, caption and footer."""
        buffer = io.BytesIO()
        with self._styled():
            about = {"Title": printable(self.title), "Source": self._footer()}
            self.canvas().savefig(buffer, format="png", dpi=_DPI, metadata=about)
        return buffer.getvalue()

    def themed_svg(self) -> str:
        """Return the ``<svg>`` element for a page, which has title and caption of its own: colours
        as CSS variables, scaling to its box.
        """
        return themed(self._svg(self.canvas(alone=False)), label=self.title)

    def canvas(self, *, alone: bool = True) -> Canvas:
        """Return the drawn matplotlib figure; ``alone`` adds title, caption and footer."""
        from matplotlib.figure import Figure as Canvas

        with self._styled():
            canvas = Canvas(figsize=self.size, dpi=_DPI, layout="constrained")
            self.draw(canvas)
            if alone:
                self._label(canvas)
        return canvas

    def _label(self, canvas: Canvas) -> None:
        title = textwrap.fill(printable(self.title), 46)
        below = [
            *textwrap.wrap(printable(self.caption), 84),
            *textwrap.wrap(self._footer(), 84),
        ]
        above, under = 0.1 + 0.22 * (title.count("\n") + 1), 0.1 + 0.145 * len(below)
        whole = above + self.size[1] + under
        canvas.draw_without_rendering()  # the layout of the axes, which then move up as they are
        canvas.set_layout_engine("none")
        canvas.set_size_inches(self.size[0], whole)
        canvas.text(0.02, 1 - 0.07 / whole, title, va="top", size=12.5, weight="bold")
        canvas.text(0.02, 0.05 / whole, "\n".join(below), va="bottom", size=7.5, linespacing=1.35)
        rest = (0, under / whole, 1, self.size[1] / whole)
        for axis in canvas.axes:
            place = axis.get_position()
            axis.set_position(
                (place.x0, rest[1] + place.y0 * rest[3], place.width, place.height * rest[3])
            )
        for legend in canvas.legends:
            legend.set_bbox_to_anchor(rest, transform=canvas.transFigure)

    def _footer(self) -> str:
        return printable(f"{self.source} · pvec {__version__}".removeprefix(" · "))

    def _svg(self, canvas: Canvas) -> str:
        buffer = io.StringIO()
        with self._styled():
            about = {"Date": None, "Title": printable(self.title), "Source": self._footer()}
            canvas.savefig(buffer, format="svg", metadata=about)
        return with_titles(buffer.getvalue())

    def _styled(self) -> Any:
        import matplotlib as mpl

        # The salt makes the identifiers inside the SVG the same every time and unlike those of the
        # page's other figures.
        style: Any = {**STYLE, "svg.hashsalt": self.name}
        return mpl.rc_context(style)


def write_figures(
    figures: Sequence[Figure], folder: Path, *, formats: Sequence[str] = ()
) -> list[Path]:
    """Write each figure's CSV, and its SVG or PNG when asked, into ``folder``.

    Returns the files written. Raises ``InputError`` for another format and ``StoreError`` when the
    folder cannot be written.
    """
    unknown = sorted(set(formats) - {"svg", "png"})
    if unknown:
        raise InputError(f"Figures are written as svg or png, not {unknown[0]!r}.")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            written.append(folder / f"{figure.name}.csv")
            written[-1].write_text(figure.table.csv(), encoding="utf-8")
            if "svg" in formats:
                written.append(folder / f"{figure.name}.svg")
                written[-1].write_text(figure.svg(), encoding="utf-8")
            if "png" in formats:
                written.append(folder / f"{figure.name}.png")
                written[-1].write_bytes(figure.png())
    except OSError as error:
        raise StoreError(f"The figures cannot be written to {folder}: {error.strerror}.") from error
    return written


def interval_text(value: Interval, digits: int | None = None, *, sign: bool = False) -> str:
    """Return ``71.3 (68.0 to 74.1)``, ``71.3`` without an interval, a dash without a number."""
    if digits is None:
        digits = decimals([value.mean, value.low, value.high])
    mean, low, high = (number(v, digits, sign=sign) for v in (value.mean, value.low, value.high))
    return mean if math.isnan(value.low) else f"{mean} ({low} to {high})"


def _digits(column: Sequence[Cell]) -> int:
    """Return the decimals of a column; those of intervals are read off their means and ends."""
    values: list[float] = []
    for cell in column:
        if isinstance(cell, Interval):
            values += [cell.mean, cell.low, cell.high]
        elif isinstance(cell, float):
            values.append(cell)
    return decimals(values)


def _shown(cell: Cell, digits: int) -> str:
    if isinstance(cell, Interval):
        return interval_text(cell, digits, sign=isinstance(cell, Difference))
    if isinstance(cell, str):
        return true_minus(printable(cell))
    return number(cell, 0 if isinstance(cell, int) else digits)


def _csv_cell(cell: Cell) -> str | int:
    if isinstance(cell, Interval):
        return interval_text(cell).replace("\u2212", "-")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, str):
        return defused(cell)
    return f"{cell:.6g}" if isinstance(cell, float) else cell
