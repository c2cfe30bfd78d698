"""The columns that projecting adds to a table: which they are, their cells, and their means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvec.data.table import Row, TableWriter
from pvec.projection.projector import Values

TURN = "turn"
"""Column that ``--turns each`` adds: which answer of the conversation a row is, from 1."""


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """One column that was added: its mean and standard deviation over ``n`` rows."""

    column: str
    mean: float
    deviation: float
    n: int
    missing: int


def added_columns(columns: Sequence[str], *, turns: str, kept: Collection[str]) -> tuple[str, ...]:
    """Return the columns that a file is written with: of ``columns`` those that are not kept."""
    turn = (TURN,) if turns == "each" else ()
    return (*turn, *(name for name in columns if name not in kept))


def write_turns(
    writer: TableWriter,
    row: Row,
    turns: Sequence[Values],
    *,
    columns: Sequence[str],
    overwrite: bool,
) -> None:
    """Write a row for each turn. A cell stays that only this row of the file has already."""
    for turn, values in enumerate(turns, start=1):
        cells = dict(zip(columns, values, strict=True))
        if not overwrite:
            cells |= {name: row.values[name] for name in cells if name in row.values}
        writer.write(row, {TURN: turn, **cells})


class ColumnSums:
    """Means of columns as their rows go by, or as parts of them are counted elsewhere."""

    def __init__(self, columns: int) -> None:
        self._rows = 0
        self._n = np.zeros(columns, dtype=np.int64)
        self._totals = np.zeros((2, columns))  # of values, of their squares

    def add(self, rows: Sequence[Sequence[Values]]) -> None:
        """Count rows, each with a tuple per turn."""
        table = np.array([turn for turns in rows for turn in turns], dtype=np.float64)
        table = table.reshape(-1, len(self._n))
        self._rows += len(table)
        self._n += np.isfinite(table).sum(axis=0)
        self._totals += np.nansum(np.stack([table, table**2]), axis=1)

    def state(self) -> dict[str, Any]:
        """Return what was counted, for ``merge``."""
        return {"rows": self._rows, "n": self._n.tolist(), "totals": self._totals.tolist()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another one counted."""
        self._rows += state["rows"]
        self._n += np.array(state["n"], dtype=np.int64)
        self._totals += np.array(state["totals"])

    def summaries(
        self, columns: Sequence[str], *, without: Sequence[str]
    ) -> tuple[ColumnSummary, ...]:
        """Return every column's mean and deviation but those of ``without``."""
        with np.errstate(invalid="ignore"):
            mean, squares = self._totals / self._n
        deviation = np.sqrt(np.maximum(squares - mean**2, 0.0))
        return tuple(
            ColumnSummary(
                column=name,
                mean=float(mean[place]),
                deviation=float(deviation[place]),
                n=int(self._n[place]),
                missing=int(self._rows - self._n[place]),
            )
            for place, name in enumerate(columns)
            if name not in without
        )
