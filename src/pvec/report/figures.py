"""What a figure is: a picture and the table of the numbers in it, never one without the other.

Matplotlib draws; the page must also work in the dark, so the handful of structural colours below
are replaced by CSS variables when an SVG is put into a page (``Figure.themed_svg``). Files on disk
keep the plain colours.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.errors import InputError, StoreError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Cell = str | int | float | None

INK = "#1c2330"
MUTED = "#66707f"
GRID = "#dfe3ea"
PAPER = "#fdfdfe"
SERIES = ("#c2452d", "#2563a8", "#3d8350", "#8a5fb0", "#b07a1e", "#1f8a94", "#a83f74", "#5c6470")
"""Line colours, in the order in which series are drawn; told apart also by marker."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


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
        svg = self.svg()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        for colour, variable in _VARIABLES.items():
            svg = svg.replace(colour, f"var(--{variable}, {colour})")
        svg = re.sub(r"font: ?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
        return re.sub(
            r'<svg ([^>]*?)width="[^"]*" ?([^>]*?)height="[^"]*"',
            r'<svg role="img" \1\2',
            svg,
            count=1,
        )

    def _save(self, target: io.StringIO | io.BytesIO, file_format: str) -> None:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas

        # The salt makes the identifiers inside the SVG the same every time and unlike those of the
        # page's other figures.
        style: Any = {**_STYLE, "svg.hashsalt": self.name}
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
    return f"{cell:.6g}" if isinstance(cell, float) else cell
