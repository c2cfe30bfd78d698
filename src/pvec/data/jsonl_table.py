"""JSON lines as tables: one object per line, order and bytes kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from pvec.data.tables import BadRow, Row, Table, TableWriter
from pvec.errors import InputError

_BOM = b"\xef\xbb\xbf"


class JsonlTable(Table):
    """A file of JSON objects, one per line, in UTF-8. A row without a needed key is a bad row."""

    def __init__(self, path: Path, *, need: Sequence[str] = ()) -> None:
        """Look at the first good row. Raises ``InputError`` when there is none."""
        self.path = path
        self.need = ()
        first: Row | None = None
        problem = "is empty"
        for row in self.read():
            if isinstance(row, Row):
                first = row
                break
            problem = f"has no row that can be read (line {row.line} {row.reason})"
        if first is None:
            raise InputError(f"{path} {problem}; give a file with one JSON object per line.")
        super().__init__(path, columns=first.values, need=need)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row; blank lines are none."""
        number = 0
        with self.path.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                text = raw.removeprefix(_BOM) if line == 1 else raw
                if not text.strip():
                    continue
                values = self._parse(text)
                if isinstance(values, str):
                    yield BadRow(line=line, reason=values)
                else:
                    yield Row(number=number, line=line, values=values, raw=raw)
                    number += 1

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer; rows to which keys are only added keep every byte of theirs."""
        return _JsonlWriter(stream, columns)

    def _parse(self, line: bytes) -> dict[str, object] | str:
        """Return the line's object, or what is wrong with it."""
        try:
            values = json.loads(line)
        except UnicodeDecodeError:
            return "is not UTF-8 text"
        except json.JSONDecodeError as exc:
            return f"is not valid JSON ({exc.msg} at column {exc.colno})"
        if not isinstance(values, dict):
            return "is not a JSON object"
        missing = [key for key in self.need if key not in values]
        return f"lacks the key {missing[0]!r}" if missing else values


class _JsonlWriter(TableWriter):
    def __init__(self, stream: IO[bytes], columns: Sequence[str]) -> None:
        self._stream = stream
        self._columns = columns

    def write(self, row: Row, values: Mapping[str, float | int | str | None]) -> None:
        self._stream.write(extended_line(row, {name: values[name] for name in self._columns}))


def extended_line(row: Row, new: Mapping[str, float | int | str | None]) -> bytes:
    """Return a row's line with ``new`` keys; one that is only added to keeps every byte."""
    raw: bytes = row.raw
    body = raw.rstrip()
    end = raw[len(body) :] or b"\n"
    if any(name in row.values for name in new):
        body = json.dumps({**row.values, **new}, ensure_ascii=False).encode()
    elif new:
        addition = json.dumps(new, ensure_ascii=False)[1:-1].encode()
        comma = b", " if row.values else b""
        body = body[:-1].rstrip() + comma + addition + b"}"
    return body + end
