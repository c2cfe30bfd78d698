"""The columns that projecting adds to a table: which they are, their cells, and their means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvec.data.conversations import Conversation
from pvec.data.spans import Turns
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


class AddedColumns:
    """The columns ``names`` of a table, but for those that are ``kept`` as they were.

    Their means and deviations are counted as rows are written, here or elsewhere.
    """

    def __init__(
        self, names: Sequence[str], *, kept: Collection[str], turns: Turns, overwrite: bool
    ) -> None:
        self.names = tuple(names)
        self._kept = kept
        self._overwrite = overwrite
        new = [name for name in names if name not in kept]
        self.written = (TURN, *new) if turns == "each" else (*new,)
        """The columns that a file is written with."""
        self._rows = 0
        self._n = np.zeros(len(names), dtype=np.int64)
        self._totals = np.zeros((2, len(names)))  # of values, of their squares

    def write(
        self,
        writer: TableWriter,
        rows: Sequence[tuple[Row, Conversation]],
        values: Sequence[Sequence[Values]],
    ) -> None:
        """Write rows with their values, a tuple and a row of the output for each turn.

        A cell stays that only this row of the file has already.
        """
        table = np.array([turn for turns in values for turn in turns], dtype=np.float64)
        table = table.reshape(-1, len(self.names))
        self._rows += len(table)
        self._n += np.isfinite(table).sum(axis=0)
        self._totals += np.nansum(np.stack([table, table**2]), axis=1)
        for (row, _), turns in zip(rows, values, strict=True):
            for number, turn in enumerate(turns, start=1):
                cells = dict(zip(self.names, turn, strict=True))
                if not self._overwrite:
                    cells |= {name: row.values[name] for name in cells if name in row.values}
                writer.write(row, {TURN: number, **cells})

    def state(self) -> dict[str, Any]:
        """Return what was counted, for ``merge``."""
        return {"rows": self._rows, "n": self._n.tolist(), "totals": self._totals.tolist()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another one counted."""
        self._rows += state["rows"]
        self._n += np.array(state["n"], dtype=np.int64)
        self._totals += np.array(state["totals"])

    def summaries(self) -> tuple[ColumnSummary, ...]:
        """Return the mean and deviation of every column that is not kept."""
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
            for place, name in enumerate(self.names)
            if name not in self._kept
        )
