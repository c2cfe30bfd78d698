"""Users' tables, row by row in constant memory: CSV, JSON lines, Parquet.

Cells are what the file says: ``NA``, ``null`` and the empty string stay text. A row keeps its raw
form, so that writing it back with further columns changes nothing else in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pvec.errors import InputError, did_you_mean

_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its number among the rows (from 0), where it stands in the file, its cells.

    ``line`` is the line on which the row begins (from 1), or the row's number plus one for
    Parquet. Cells are text in a CSV and JSON values in JSON lines. ``raw`` is the table's own.
    """

    number: int
    line: int
    values: Mapping[str, Any]
    raw: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be read, and why."""

    line: int
    reason: str


OnBad = Callable[[BadRow], None]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over a table found: how many rows it has, and which are bad."""

    rows: int
    bad: tuple[BadRow, ...]


class TableWriter(ABC):
    """Writes rows of a table with some columns added or replaced; a context manager."""

    @abstractmethod
    def write(self, row: Row, values: Mapping[str, float | int | str | None]) -> None:
        """Write ``row`` with ``values`` for the writer's columns; None is an empty cell."""

    def close(self) -> None:  # noqa: B027
        """Write what is still held back (nothing, for most formats). The stream stays open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()


class Table(ABC):
    """A file of rows. ``columns`` are its columns; for JSON lines the keys of the first row."""

    def __init__(self, path: Path, *, columns: Iterable[str], need: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.need = tuple(need)
        require_columns(path, columns=self.columns, need=self.need)

    @abstractmethod
    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row in the file's order, bad ones included."""

    @abstractmethod
    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer of this table's rows; ``columns`` are replaced where they exist, else
        added at the end.
        """

    def rows(self, *, on_bad: OnBad | None = None) -> Iterator[Row]:
        """Yield the good rows. A bad one goes to ``on_bad``, or is an ``InputError`` without."""
        for row in self.read():
            if isinstance(row, Row):
                yield row
            elif on_bad is not None:
                on_bad(row)
            else:
                raise InputError(f"{self.path}:{row.line} {row.reason}; correct that line.")

    def scan(self) -> Scan:
        """Read the whole file once and return how many rows it has and which of them are bad."""
        bad: list[BadRow] = []
        rows = sum(1 for _ in self.rows(on_bad=bad.append))
        return Scan(rows=rows, bad=tuple(bad))

    def require_sound(self) -> int:
        """Return the number of rows. Raises ``InputError`` that counts and lists the bad ones."""
        found = self.scan()
        if not found.bad:
            return found.rows
        listed = "; ".join(f"{self.path}:{row.line} {row.reason}" for row in found.bad[:_LISTED])
        more = f"; and {len(found.bad) - _LISTED} more" if len(found.bad) > _LISTED else ""
        raise InputError(
            f"{len(found.bad)} of {found.rows + len(found.bad)} rows cannot be read: "
            f"{listed}{more}. Correct them, or leave them out with --skip-bad."
        )


def open_table(path: str | Path, *, need: Sequence[str] = ()) -> Table:
    """Open a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file whose columns include ``need``.

    Raises ``InputError`` for a missing or empty file, another format, and missing columns (which,
    what was found, the nearest).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        from pvec.data.csv_table import CsvTable

        return CsvTable(path, need=need, delimiter="\t" if suffix == ".tsv" else ",")
    if suffix in {".jsonl", ".ndjson"}:
        from pvec.data.jsonl_table import JsonlTable

        return JsonlTable(path, need=need)
    if suffix == ".parquet":
        from pvec.data.parquet_table import ParquetTable

        return ParquetTable(path, need=need)
    raise InputError(
        f"{path} is not a table that pvec reads: its name should end in .csv, .tsv, .jsonl or "
        ".parquet."
    )


def require_columns(path: Path, *, columns: Sequence[str], need: Sequence[str]) -> None:
    """Raise ``InputError`` naming the columns of ``need`` that are not among ``columns``."""
    missing = [name for name in need if name not in columns]
    if missing:
        hint = did_you_mean(missing[0], columns)
        raise InputError(
            f"{path} lacks the column {' and '.join(map(repr, missing))}.{hint} "
            f"It has: {', '.join(columns) or 'none'}."
        )
