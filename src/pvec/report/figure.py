"""What a figure is: a picture and the table of the numbers in it, never one without the other."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.data.csv_table import defused
from pvec.errors import InputError, StoreError
from pvec.report.style import STYLE, themed

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Cell = str | int | float | None


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


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture with its numbers.

    ``name`` is a file stem, unique in a page. ``draw`` gets an empty matplotlib figure of ``size``
    inches (five wide: legible on a phone without scrolling) and draws exactly what ``table`` says.
    """

    name: str
    title: str
    caption: str
    table: Table
    draw: Callable[[Canvas], None]
    size: tuple[float, float] = (5.0, 3.4)

    def svg(self) -> str:
        """Return a stand-alone SVG document."""
        buffer = io.StringIO()
        self._save(buffer, "svg")
        return buffer.getvalue()

    def png(self) -> bytes:
        """Return a PNG at 200 dots per inch."""
        buffer = io.BytesIO()
        self._save(buffer, "png")
        return buffer.getvalue()

    def themed_svg(self) -> str:
        """Return the ``<svg>`` element for a page: colours as CSS variables, scaling to its box."""
        return themed(self.svg())

    def _save(self, target: io.StringIO | io.BytesIO, file_format: str) -> None:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas

        # The salt makes the identifiers inside the SVG the same every time and unlike those of the
        # page's other figures.
        style: Any = {**STYLE, "svg.hashsalt": self.name}
        with mpl.rc_context(style):
            canvas = Canvas(figsize=self.size, layout="constrained")
            self.draw(canvas)
            metadata = {"Date": None} if file_format == "svg" else None
            canvas.savefig(target, format=file_format, dpi=200, metadata=metadata)


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


def _csv_cell(cell: Cell) -> str | int:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, str):
        return defused(cell)
    return f"{cell:.6g}" if isinstance(cell, float) else cell
