"""CSV files as tables: cells stay text, rows keep their bytes."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pvec.data.storage import open_file
from pvec.data.table import BadRow, Cell, Row, Table, TableWriter
from pvec.errors import InputError
from pvec.runs.files import atomic_write

_BOM = b"\xef\xbb\xbf"


class CsvTable(Table):
    """A CSV file in UTF-8 with a header, as pandas and the reference write it."""

    def __init__(self, path: Path, *, need: Sequence[str] = (), delimiter: str = ",") -> None:
        """Read the header. Raises ``InputError`` for a file without one or without ``need``."""
        self.delimiter = delimiter
        with open_file(path) as stream:
            header = next(_records(stream, delimiter), None)
        if header is None:
            raise InputError(f"{path} is empty; a CSV file begins with its column names.")
        if header.problem:
            raise InputError(f"{path}:1 {header.problem}; correct the header.")
        twice = {name for name in header.cells if header.cells.count(name) > 1}
        if twice:
            raise InputError(
                f"{path} has two columns called {min(twice)!r}; rename or remove one of them."
            )
        self.header = header
        super().__init__(path, columns=header.cells, need=need)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row; blank lines are none."""
        with open_file(self.path) as stream:
            records = _records(stream, self.delimiter)
            next(records)
            number = 0
            for record in records:
                problem = record.problem
                if not problem and len(record.cells) != len(self.columns):
                    problem = f"has {len(record.cells)} cells, the header {len(self.columns)}"
                if problem:
                    yield BadRow(line=record.line, reason=problem)
                    continue
                values = dict(zip(self.columns, record.cells, strict=True))
                yield Row(number=number, line=record.line, values=values, raw=record.raw)
                number += 1

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer; rows to which columns are only added keep every byte of theirs."""
        return _CsvWriter(self, stream, columns)


class _CsvWriter(TableWriter):
    def __init__(self, table: CsvTable, stream: IO[bytes], columns: Sequence[str]) -> None:
        self._table = table
        self._stream = stream
        self._columns = columns
        self._added = [name for name in columns if name not in table.columns]
        self._replaced = [name for name in columns if name in table.columns]
        header: Mapping[str, str] = {name: name for name in (*table.columns, *columns)}
        self._write(table.header.raw, header, header)

    def write(self, row: Row, values: Mapping[str, Cell]) -> None:
        self._write(row.raw, row.values, {name: _cell(values[name]) for name in self._columns})

    def _write(self, raw: bytes, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        body = raw.rstrip(b"\r\n")
        end = raw[len(body) :] or b"\n"
        delimiter = self._table.delimiter
        if self._replaced:
            cells = [new.get(name, old[name]) for name in self._table.columns]
            body = encode_row(cells, delimiter=delimiter)
        if self._added:
            added = [new[name] for name in self._added]
            # one column, empty: a row of its own would be written as "", which is right here too
            body += delimiter.encode() + encode_row(added, delimiter=delimiter)
        self._stream.write(body + end)


class CsvRowWriter(TableWriter):
    """Writes rows that were no CSV as one: their ``own`` columns, found by ``cells``, then more."""

    def __init__(
        self,
        stream: IO[bytes],
        own: Sequence[str],
        columns: Sequence[str],
        cells: Callable[[Row], Mapping[str, Cell]],
        *,
        exact: bool = False,
    ) -> None:
        self._exact = exact
        self._stream = stream
        self._own = own
        self._columns = columns
        self._cells = cells
        stream.write(encode_row([*own, *columns]) + b"\n")

    def write(self, row: Row, values: Mapping[str, Cell]) -> None:
        """Write one row; a cell that ``cells`` lacks is empty."""
        by_name = self._cells(row)
        cells = [*(by_name.get(name) for name in self._own), *(values[n] for n in self._columns)]
        self._stream.write(_new_line(cells, exact=self._exact))


def write_csv(
    path: str | Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    exact: bool = False,
) -> int:
    """Write a new CSV file, replacing what is at ``path`` as a whole; return the number of rows.

    None and NaN are empty cells. Texts that a spreadsheet would execute are ``defused``, unless
    ``exact``. Raises ``StoreError`` when it cannot be written.
    """
    count = 0
    with atomic_write(path) as stream:
        stream.write(encode_row(columns) + b"\n")
        for row in rows:
            stream.write(_new_line(row, exact=exact))
            count += 1
    return count


def encode_row(cells: Sequence[str], *, delimiter: str = ",") -> bytes:
    """Return ``cells`` as one CSV row without its line end, quoted where that is needed."""
    # Python 3.11 to 3.12 quote no lone carriage return, and then cannot read it back
    quoting: Literal[0, 1] = (
        csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    )
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerow(cells)
    return buffer.getvalue().removesuffix("\n").encode("utf-8", "backslashreplace")


@dataclass(slots=True)
class _Record:
    """One CSV record: the line it begins on, its bytes, its cells or what is wrong with it."""

    line: int
    raw: bytes
    cells: list[str]
    problem: str = ""


class _Lines:
    """Feeds decoded lines to the csv module and remembers the bytes it took for a record."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.taken: list[bytes] = []
        self.line = 0
        self.undecodable = False
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.line += 1
            self.taken.append(line)
            text = line.removeprefix(_BOM) if self.line == 1 else line
            try:
                yield text.decode("utf-8")
            except UnicodeDecodeError:
                self.undecodable = True
                yield text.decode("utf-8", "replace")
        self.ended = True

    def take(self) -> bytes:
        """Return the bytes of the lines since the last call."""
        raw = b"".join(self.taken)
        self.taken.clear()
        return raw


def _records(stream: IO[bytes], delimiter: str) -> Iterator[_Record]:
    """Yield the records of a CSV file, each with the bytes that it was read from."""
    csv.field_size_limit(sys.maxsize)  # the default refuses answers over 128 KiB
    lines = _Lines(stream)
    reader = csv.reader(iter(lines), delimiter=delimiter)
    while True:
        first = lines.line + 1
        try:
            cells = next(reader, None)
            problem = ""
        except csv.Error as exc:
            cells, problem = [], f"is not valid CSV ({exc})"
        if cells is None:
            return
        raw = lines.take()
        if lines.undecodable:
            problem = "is not UTF-8 text"
            lines.undecodable = False
        elif lines.ended and not problem:  # the reader asked for more of this record
            problem = "has a quoted cell that is never closed"
        elif b"\0" in raw:
            problem = "holds NUL bytes, so it is not UTF-8 text (is it UTF-16?)"
        if cells or problem:
            yield _Record(first, raw, cells, problem)


_FORMULA = re.compile(r"""'*\s*([=@]|[+-][^(|]*[(|])""", re.DOTALL)
"""Text that a spreadsheet would execute: a formula, or a sum that calls a function or program."""


def defused(text: str) -> str:
    """Return ``text`` with an apostrophe in front where a spreadsheet would execute it."""
    return f"'{text}" if _FORMULA.match(text) else text


def restored(text: str) -> str:
    """Return what ``defused`` made this text of."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _new_line(cells: Sequence[Cell], *, exact: bool) -> bytes:
    texts = (defused(c) if isinstance(c, str) and not exact else _cell(c) for c in cells)
    return encode_row(list(texts)) + b"\n"


def _cell(value: Cell) -> str:
    """Return a value as pandas would write it: floats in full, a missing one empty."""
    return "" if value is None or value != value else str(value)  # noqa: PLR0124
