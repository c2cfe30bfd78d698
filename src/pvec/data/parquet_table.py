"""Parquet files as tables, batch by batch; needs the ``data`` extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from pvec.data.tables import BadRow, Row, Table, TableWriter
from pvec.errors import InputError, install_command

_BATCH_ROWS = 1024


class ParquetTable(Table):
    """A Parquet file; types and values of the columns that are not touched stay what they are."""

    def __init__(self, path: Path, *, need: Sequence[str] = ()) -> None:
        """Read the schema. Raises ``InputError`` for a file that is not Parquet."""
        pyarrow, parquet = _packages()
        try:
            self.schema = parquet.read_schema(path)
        except (pyarrow.ArrowException, OSError) as exc:
            raise InputError(f"{path} is not a Parquet file that can be read ({exc}).") from exc
        super().__init__(path, columns=self.schema.names, need=need)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row; there are no bad ones."""
        _, parquet = _packages()
        number = 0
        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for index, values in enumerate(batch.to_pylist()):
                    yield Row(number=number, line=number + 1, values=values, raw=(batch, index))
                    number += 1

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer; new columns are double-precision numbers, or text if the first is."""
        return _ParquetWriter(self, stream, columns)


class _ParquetWriter(TableWriter):
    """Holds back the rows of one batch, so that they are copied as Arrow data, not as objects."""

    def __init__(self, table: ParquetTable, stream: IO[bytes], columns: Sequence[str]) -> None:
        self._table = table
        self._stream = stream
        self._columns = columns
        self._file: Any = None
        self._batch: Any = None
        self._indices: list[int] = []
        self._values: list[Mapping[str, float | int | str | None]] = []

    def write(self, row: Row, values: Mapping[str, float | int | str | None]) -> None:
        batch, index = row.raw
        if batch is not self._batch:
            self._flush()
            self._batch = batch
        self._indices.append(index)
        self._values.append(values)

    def close(self) -> None:
        self._flush()
        if self._file is None:  # no rows at all: the schema alone is still a file
            self._open(self._table.schema.empty_table())
        self._file.close()

    def _flush(self) -> None:
        if not self._indices:
            return
        pyarrow, _ = _packages()
        block = pyarrow.Table.from_batches([self._batch]).take(self._indices)
        for name in self._columns:
            block = self._with_column(block, name, [values[name] for values in self._values])
        if self._file is None:
            self._open(block)
        self._file.write_table(block.cast(self._file.schema))
        self._indices.clear()
        self._values.clear()

    def _with_column(self, block: Any, name: str, cells: list[float | int | str | None]) -> Any:
        pyarrow, _ = _packages()
        is_text = any(isinstance(cell, str) for cell in cells)
        column = pyarrow.array(cells, type=pyarrow.string() if is_text else pyarrow.float64())
        if name in block.column_names:
            return block.set_column(block.column_names.index(name), name, column)
        return block.append_column(name, column)

    def _open(self, block: Any) -> None:
        _, parquet = _packages()
        self._file = parquet.ParquetWriter(self._stream, block.schema)


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        raise InputError(
            f"Parquet files need the pyarrow package: {install_command('data')}."
        ) from exc
    return pa, parquet
