"""Blocks of files that outgrow a machine: rows of Parquet files, byte ranges of JSON lines.

The same files and the same size give the same blocks, in the order of the files' names and of
their rows.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pvec.data.arrow_table import ParquetTable, parquet_metadata
from pvec.data.json_table import JsonlTable
from pvec.data.storage import StoredFile, list_files, location, open_file
from pvec.data.table import Table
from pvec.errors import InputError, did_you_mean

Kind = Literal["lines", "parquet"]

SUFFIXES: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
_SCANNED = 2**23
"""Bytes that are read at once where lines are counted."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Part of a file, by its number in the input: rows from ``start`` to ``end`` of Parquet, the
    lines that begin at the bytes from ``start`` to ``end`` otherwise.
    """

    number: int
    file: str
    kind: Kind
    start: int
    end: int

    def open(self) -> BlockTable:
        """Return the block's rows as a table. Raises ``InputError`` for what cannot be read."""
        return LinesBlock(self) if self.kind == "lines" else ParquetBlock(self)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of an input. ``columns`` are those of Parquet files, or of the first JSON line;
    ``ignored`` counts files of other formats.
    """

    kind: Kind
    files: tuple[StoredFile, ...]
    blocks: tuple[Block, ...] = field(repr=False)
    columns: tuple[str, ...]
    ignored: int

    @property
    def suffix(self) -> str:
        """What names of parts end in."""
        return ".jsonl" if self.kind == "lines" else ".parquet"


class BlockTable(Table):
    """A block as a table; the lines of its rows are counted from its own beginning."""

    block: Block

    @abstractmethod
    def rows_before(self) -> int:
        """Return how many lines or rows of the file come before the block."""


class LinesBlock(JsonlTable, BlockTable):
    """The JSON lines that begin in a range of bytes."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.path = Path(block.file)
        self.need = ()
        self.columns = ()
        self._first = block.start

    def rows_before(self) -> int:
        """Count the lines before the first that begins in the block."""
        count, left = 0, self._first
        with open_file(self.block.file) as stream:
            while left > 0 and (content := stream.read(min(left, _SCANNED))):
                left -= len(content)
                count += content.count(b"\n")
        return count

    def _open(self) -> Any:
        start, end = self.block.start, self.block.end
        with open_file(self.block.file) as stream:
            if start:  # the line that the byte before belongs to is another block's
                stream.seek(start - 1)
                stream.readline()
                self._first = stream.tell()
            content = stream.read(max(0, end - self._first))
            if content and not content.endswith(b"\n"):
                content += stream.readline()
        return io.BytesIO(content)


class ParquetBlock(ParquetTable, BlockTable):
    """Some rows of a Parquet file."""

    def __init__(self, block: Block) -> None:
        super().__init__(Path(block.file))
        self.block = block

    def rows_before(self) -> int:
        """Return the block's first row."""
        return self.block.start

    def _batches(self) -> Iterator[Any]:
        with self._file() as file:
            meta, groups, first, before = file.metadata, [], None, 0
            for group in range(meta.num_row_groups):
                rows = meta.row_group(group).num_rows
                if before < self.block.end and before + rows > self.block.start:
                    groups.append(group)
                    first = before if first is None else first
                before += rows
            place = first or 0
            for batch in self._read_groups(file, groups):
                low = max(self.block.start - place, 0)
                high = min(self.block.end - place, batch.num_rows)
                place += batch.num_rows
                if low < high:
                    yield batch.slice(low, high - low)
                if place >= self.block.end:
                    return


def list_blocks(source: str | Path, *, size: int) -> Blocks:
    """Divide a file, or the files of a folder, into blocks of about ``size`` bytes uncompressed.

    Raises ``InputError`` for an empty folder, other formats or two of them, a file that is not
    what its name says, and Parquet files of different schemas.
    """
    files = _data_files(source)
    known = [file for file in files if Path(file.path).suffix.lower() in SUFFIXES]
    kinds = {SUFFIXES[Path(file.path).suffix.lower()] for file in known}
    if len(kinds) != 1:
        has = "files of both kinds" if kinds else "none of these"
        raise InputError(
            f"--engine ray reads .parquet and .jsonl files, or a folder of one kind; {source} has "
            f"{has}: give others, or use --engine local."
        )
    kind = kinds.pop()
    blocks, columns = (_of_lines if kind == "lines" else _of_parquet)(known, size)
    if not blocks:
        raise InputError(f"{source} has no rows to project.")
    return Blocks(
        kind=kind,
        files=tuple(known),
        blocks=tuple(
            Block(number=number, file=file, kind=kind, start=start, end=end)
            for number, (file, start, end) in enumerate(blocks)
        ),
        columns=columns,
        ignored=len(files) - len(known),
    )


def _data_files(source: str | Path) -> list[StoredFile]:
    files = list_files(source)
    if files:
        return files
    place = Path(location(source))
    if place.is_dir():
        raise InputError(f"{source} is an empty folder: give one with .parquet or .jsonl files.")
    siblings = (p.name for p in place.parent.iterdir()) if place.parent.is_dir() else ()
    near = did_you_mean(place.name, siblings)
    raise InputError(f"there is no file or folder {source}; check the path.{near}")


_Ranges = tuple[list[tuple[str, int, int]], tuple[str, ...]]


def _of_lines(files: list[StoredFile], size: int) -> _Ranges:
    ranges = [
        (file.path, start, min(start + size, file.size))
        for file in files
        for start in range(0, file.size, size)
    ]
    filled = next((file for file in files if file.size), None)
    if filled is None:
        return [], ()
    first = JsonlTable(Path(filled.path))  # refuses a file without any good row
    return ranges, first.columns


def _of_parquet(files: list[StoredFile], size: int) -> _Ranges:
    ranges: list[tuple[str, int, int]] = []
    schema = None
    for file in files:
        metadata = parquet_metadata(file.path)
        if schema is None:
            schema = metadata.schema.to_arrow_schema()
        elif not metadata.schema.to_arrow_schema().equals(schema):
            raise InputError(
                f"{file.path} has other columns, or columns of other types, than {files[0].path}: "
                f"write the files with one schema, or give them one by one."
            )
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        weight = sum(group.total_byte_size for group in groups)
        rows = metadata.num_rows
        each = max(1, int(size * rows / weight)) if weight else rows
        ranges += [
            (file.path, start, min(start + each, rows)) for start in range(0, rows, max(1, each))
        ]
    return ranges, tuple(schema.names) if schema is not None else ()
