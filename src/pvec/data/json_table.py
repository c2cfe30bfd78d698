"""JSON lines and JSON lists as tables: one object per row, order and bytes kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from pvec.data.storage import open_file
from pvec.data.table import BadRow, Cell, Row, Table, TableWriter
from pvec.documents import DocumentError, parse_json
from pvec.errors import InputError

_BOM = b"\xef\xbb\xbf"


class JsonlTable(Table):
    """A file of JSON objects, one per line, in UTF-8. A row without a needed key is a bad row."""

    def __init__(self, path: Path, *, need: Sequence[str] = ()) -> None:
        """Look at the first good row. Raises ``InputError`` when there is none."""
        self.path = path
        self.need = ()
        problem = "is empty"
        for first in self.read():
            if isinstance(first, Row):
                break
            problem = f"has no row that can be read (line {first.line} {first.reason})"
        else:
            raise InputError(f"{path} {problem}; give a file of JSON objects.")
        super().__init__(path, columns=first.values, need=need)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row; blank lines are none."""
        number = 0
        for line, raw in self._texts():
            row = parse_row(raw, number=number, line=line)
            if isinstance(row, Row):
                missing = [key for key in self.need if key not in row.values]
                if missing:
                    row = BadRow(line=line, reason=f"lacks the key {missing[0]!r}")
            yield row
            number += isinstance(row, Row)

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer; rows to which keys are only added keep every byte of theirs."""
        return _LinesWriter(stream, columns)

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        """Yield line and text of every object."""
        with self._open() as stream:
            for line, raw in enumerate(stream, start=1):
                if raw.removeprefix(_BOM).strip():
                    yield line, raw

    def _open(self) -> IO[bytes]:
        return open_file(self.path)


class JsonTable(JsonlTable):
    """A file that is one JSON list of objects. The file is held in memory, its objects are not."""

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer of a list, an object per line; objects keep their bytes as in lines."""
        return _ListWriter(stream, columns)

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self._open() as stream:
                text = stream.read().removeprefix(_BOM).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path} is not UTF-8 text: convert it.") from None
        decoder, place, line = json.JSONDecoder(), _space(text, 0), 1
        if text[place : place + 1] != "[":
            raise InputError(f"{self.path} must hold a list of rows: one JSON list of objects.")
        counted, place = 0, _space(text, place + 1)
        while text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            counted = place
            try:
                _, end = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{self.path}:{error.lineno} is not valid JSON ({error.msg}): correct it."
                ) from None
            except (RecursionError, ValueError):
                raise InputError(
                    f"{self.path}:{line} holds a row that is nested too deeply or a number that is "
                    f"too long: correct it."
                ) from None
            yield line, text[place:end].encode("utf-8", "surrogatepass")
            place = _space(text, end)
            if text[place : place + 1] == ",":
                place = _space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise InputError(f"{self.path} is cut off after line {line}: restore the file.")


class _LinesWriter(TableWriter):
    def __init__(self, stream: IO[bytes], columns: Sequence[str]) -> None:
        self._stream = stream
        self._columns = columns

    def write(self, row: Row, values: Mapping[str, Cell]) -> None:
        self._stream.write(self._line(row, values))

    def _line(self, row: Row, values: Mapping[str, Cell]) -> bytes:
        """Return a row's line with the new keys; one that is only added to keeps every byte."""
        new = {name: values[name] for name in self._columns}
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


class _ListWriter(_LinesWriter):
    _begun = False

    def write(self, row: Row, values: Mapping[str, Cell]) -> None:
        line = self._line(row, values).rstrip()
        self._stream.write((b",\n" if self._begun else b"[\n") + line)
        self._begun = True

    def close(self) -> None:
        self._stream.write(b"\n]\n" if self._begun else b"[]\n")


def parse_row(raw: bytes, *, number: int, line: int) -> Row | BadRow:
    """Return the JSON object in ``raw`` as a row, or as a bad one that says what is wrong."""
    try:
        values = parse_json(raw.removeprefix(_BOM).decode(), where="row")
    except UnicodeDecodeError:
        return BadRow(line=line, reason="is not UTF-8 text")
    except DocumentError as error:
        return BadRow(line=line, reason=error.problem)
    if not isinstance(values, dict):
        return BadRow(line=line, reason="is not a JSON object")
    return Row(number=number, line=line, values=values, raw=raw)


def _space(text: str, place: int) -> int:
    """Return where the white space that begins at ``place`` ends."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place
