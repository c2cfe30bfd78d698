"""What every table of a user offers: rows one by one in constant memory, and a writer for them.

Cells are what the file says: ``NA``, ``null`` and the empty string stay text. A row keeps its raw
form, so that writing it back with further columns changes nothing else in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from pvec.data.storage import list_files, stamp_of, url_of
from pvec.errors import InputError, did_you_mean

_LISTED = 5
"""Bad rows that a message lists; the others are counted."""

Cell = float | int | str | None
"""What can be written into a column; None is an empty cell."""


Good = TypeVar("Good")
"""A row as its reader yields it: alone, or with what was read from it."""
Content = TypeVar("Content")
"""What is read from a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its number among the good rows (from 0), its line in the file, its cells.

    ``line`` is the line on which the row begins (from 1), or the row's number plus one where the
    file has no lines (Parquet, data sets). Cells are text in a CSV and JSON values elsewhere.
    ``raw`` belongs to the table that made the row.
    """

    number: int
    line: int
    values: Mapping[str, Any]
    raw: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be read, and why: the end of a sentence."""

    line: int
    reason: str


class TableWriter(ABC):
    """Writes rows of a table with some columns added or replaced; a context manager."""

    @abstractmethod
    def write(self, row: Row, values: Mapping[str, Cell]) -> None:
        """Write ``row`` with ``values`` for the writer's columns."""

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
    """Rows of a file or folder. ``columns`` are those of the file, or of its first row (JSON)."""

    def __init__(self, path: Path, *, columns: Iterable[str], need: Sequence[str] = ()) -> None:
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

    @property
    def output(self) -> Path:
        """Where a copy with further columns goes by default: ``data.projected.csv``; that of a URL
        in the working folder.
        """
        name = f"{self.path.stem}.projected{self.path.suffix}"
        return self.path.with_name(name) if self.replaceable else Path(name)

    @property
    def replaceable(self) -> bool:
        """Whether a new file can take the place of the table: not at a URL."""
        return url_of(self.path) is None

    def stamp(self) -> list[str | int]:
        """Return what tells this input from a changed one: its path, size and time."""
        return stamp_of(self.path)

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises ``InputError`` at the first bad one."""
        for row in self.read():
            if isinstance(row, BadRow):
                raise InputError(f"{self.path}:{row.line} {row.reason}; correct that line.")
            yield row


def read_rows(
    table: Table, read: Callable[[Row], Content]
) -> Iterator[tuple[Row, Content] | BadRow]:
    """Yield every row with what ``read`` makes of it; one for which it raises is a bad row.

    ``read`` raises ``InputError``, the end of a sentence.
    """
    for row in table.read():
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield row, read(row)
        except InputError as error:
            yield BadRow(line=row.line, reason=str(error))


def check_rows(
    path: Path,
    rows: Iterable[Good | BadRow],
    *,
    skip_bad: bool = False,
    on_row: Callable[[Good], None] | None = None,
) -> tuple[int, list[BadRow]]:
    """Return how many of ``rows`` are good, and the bad ones where they may be left out.

    ``on_row`` is given every good row. Raises ``InputError`` that counts the bad rows and lists the
    first.
    """
    good, bad = 0, []
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        good += 1
        if on_row is not None:
            on_row(row)
    if bad and not skip_bad:
        listed = "; ".join(f"{path}:{row.line} {row.reason}" for row in bad[:_LISTED])
        more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        raise InputError(
            f"{len(bad)} of {good + len(bad)} rows cannot be used: {listed}{more}. "
            "Correct them, or leave them out with --skip-bad."
        )
    return good, bad


def require_columns(path: Path, *, columns: Sequence[str], need: Sequence[str]) -> None:
    """Raise ``InputError`` naming the columns of ``need`` that are not among ``columns``."""
    missing = [name for name in need if name not in columns]
    if missing:
        hint = did_you_mean(missing[0], columns)
        raise InputError(
            f"{path} lacks the column {' and '.join(map(repr, missing))}.{hint} "
            f"It has: {', '.join(columns) or 'none'}."
        )


def require_file(path: Path) -> None:
    """Raise ``InputError`` for a path or URL without a file (with the nearest name), for a pipe."""
    if (url := url_of(path)) is not None and not list_files(url):
        raise InputError(f"there is no file {url}; check the URL.")
    if url is not None or path.is_file():
        return
    if path.exists():
        raise InputError(f"{path} is a pipe or a device: write its content into a file first.")
    siblings = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
    near = did_you_mean(path.name, (sibling.name for sibling in siblings))
    raise InputError(f"there is no file {path}; check the path.{near}")
