"""Parquet files and data sets of the ``datasets`` library as tables, batch by batch; needs the
``data`` extra.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pvec.data.storage import open_file
from pvec.data.table import BadRow, Cell, Row, Table, TableWriter
from pvec.errors import InputError, install_command

_BATCH_ROWS = 1024


class ArrowTable(Table):
    """Rows of Arrow batches; types and values of untouched columns stay what they are.

    It is written as a Parquet file.
    """

    schema: Any

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row; there are no bad ones. Raises ``InputError`` for damaged data."""
        number = 0
        for batch, rows in self._read_batches():
            for index, values in enumerate(rows):
                yield Row(number=number, line=number + 1, values=values, raw=(batch, index))
                number += 1

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer; new columns are double-precision numbers, or text if the first is."""
        return _ParquetWriter(self, stream, columns)

    def _read_batches(self) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        pyarrow = _pyarrow()
        batches = self._batches()
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as exc:
                reason = str(exc).split("\n", maxsplit=1)[0]
                raise InputError(
                    f"{self.path} holds data that cannot be read ({reason}): write it again."
                ) from exc
            if batch is None:
                return
            yield batch, rows

    @abstractmethod
    def _batches(self) -> Iterator[Any]:
        """Yield the file's record batches in order."""


class ParquetTable(ArrowTable):
    """A Parquet file."""

    def __init__(self, path: Path, *, need: Sequence[str] = ()) -> None:
        """Read the schema. Raises ``InputError`` for a file that is not Parquet."""
        self.schema = parquet_metadata(path).schema.to_arrow_schema()
        super().__init__(path, columns=self.schema.names, need=need)

    def _batches(self) -> Iterator[Any]:
        with self._file() as file:
            yield from self._read_groups(file, range(file.metadata.num_row_groups))

    @contextmanager
    def _file(self) -> Iterator[Any]:
        parquet = _pyarrow().parquet
        with open_file(self.path) as stream, parquet.ParquetFile(stream) as file:
            yield file

    def _read_groups(self, file: Any, groups: Sequence[int]) -> Iterator[Any]:
        """Yield the record batches of some row groups."""
        return iter(file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(groups)))


class DatasetTable(ArrowTable):
    """A folder that ``Dataset.save_to_disk`` wrote, or ``hf:NAME[:SPLIT]``."""

    def __init__(self, source: str | Path, *, need: Sequence[str] = ()) -> None:
        """Map the data into memory. Raises ``InputError`` where there is no such data set."""
        self._data = _from_hub(source) if isinstance(source, str) else _from_folder(source)
        self.schema = self._data.data.schema
        super().__init__(Path(source), columns=self.schema.names, need=need)

    @property
    def output(self) -> Path:
        """One Parquet file, beside the folder; that of a hub data set in the working folder."""
        parent = self.path.parent if self.path.is_dir() else Path()
        return parent / f"{self.path.name.replace(':', '-')}.projected.parquet"

    @property
    def replaceable(self) -> bool:
        """A folder is not."""
        return False

    def stamp(self) -> list[str | int]:
        """Return the data set's place, size and fingerprint."""
        return [str(self.path), len(self._data), str(self._data._fingerprint)]  # noqa: SLF001 (it has no other name)

    def _batches(self) -> Iterator[Any]:
        for table in self._data.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            yield from table.combine_chunks().to_batches()


class _ParquetWriter(TableWriter):
    """Holds back the rows of one batch, so that they are copied as Arrow data, not as objects."""

    def __init__(self, table: ArrowTable, stream: IO[bytes], columns: Sequence[str]) -> None:
        self._table = table
        self._stream = stream
        self._columns = columns
        self._file: Any = None
        self._batch: Any = None
        self._indices: list[int] = []
        self._values: list[Mapping[str, Cell]] = []

    def write(self, row: Row, values: Mapping[str, Cell]) -> None:
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
        pyarrow = _pyarrow()
        # slices, as taking rows by index fails for a struct whose fields are null
        runs = [self._batch.slice(start, length) for start, length in _runs(self._indices)]
        block = pyarrow.Table.from_batches(runs)
        for name in self._columns:
            block = with_column(block, name, [values[name] for values in self._values])
        if self._file is None:
            self._open(block)
        schema = self._file.schema
        columns = [  # only what differs: casting a struct whose fields are null fails
            column if column.type == field.type else column.cast(field.type)
            for column, field in zip(block.columns, schema, strict=True)
        ]
        self._file.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
        self._indices.clear()
        self._values.clear()

    def _open(self, block: Any) -> None:
        self._file = _pyarrow().parquet.ParquetWriter(self._stream, block.schema)


def parquet_metadata(path: str | Path) -> Any:
    """Return what the end of a Parquet file says of it. Raises ``InputError`` for another file."""
    pyarrow = _pyarrow()
    try:
        with open_file(path) as stream:
            return pyarrow.parquet.read_metadata(stream)
    except (pyarrow.ArrowException, OSError) as exc:
        raise InputError(f"{path} is not a Parquet file that can be read ({exc}).") from exc


def with_column(block: Any, name: str, cells: Sequence[Cell]) -> Any:
    """Return an Arrow table with a column of text, of numbers, or of truth values alone; replaced
    in place or added.
    """
    pyarrow = _pyarrow()
    kinds = {type(cell) for cell in cells}
    kind = pyarrow.string() if str in kinds else pyarrow.float64()
    column = pyarrow.array(cells, type=pyarrow.bool_() if kinds == {bool} else kind)
    if name in block.column_names:
        return block.set_column(block.column_names.index(name), name, column)
    return block.append_column(name, column)


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ``(start, length)`` of the consecutive indices."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield indices[start], place - start
            start = place


def _from_folder(path: Path) -> Any:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise InputError(
            f"{path} is neither a run folder nor a data set saved with save_to_disk: give one of "
            "these, or a .csv, .jsonl, .json or .parquet file."
        )
    datasets = _datasets()
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(str(path / name) for name in dataset)
        raise InputError(f"{path} holds several splits; give one of them: {splits}.")
    return dataset


def _from_hub(source: str) -> Any:
    datasets = _datasets()
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    _, name, *split = source.split(":", 2)
    try:
        return datasets.load_dataset(name, split=split[0] if split else "train")
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"The data set {source} cannot be read ({first}).") from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as exc:
        raise InputError(
            f"Data sets need the datasets package: {install_command('data')}."
        ) from exc
    return datasets


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as exc:
        raise InputError(
            f"Parquet files need the pyarrow package: {install_command('data')}."
        ) from exc
    return pyarrow
