"""Data set folders of the ``datasets`` library as tables; needs the ``data`` extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pvec.data.parquet_table import ParquetTable
from pvec.data.tables import BadRow, Row, Table
from pvec.errors import InputError, install_command

_BATCH_ROWS = 1024


class DatasetTable(ParquetTable):
    """A folder that ``Dataset.save_to_disk`` wrote; what is written of it is a Parquet file."""

    def __init__(self, path: Path, *, need: Sequence[str] = ()) -> None:
        """Map the folder into memory. Raises ``InputError`` for any other folder."""
        self._data = _load(path)
        self.schema = self._data.data.schema
        Table.__init__(self, path, columns=self.schema.names, need=need)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every row; there are no bad ones."""
        number = 0
        for table in self._data.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            for batch in table.combine_chunks().to_batches():
                for index, values in enumerate(batch.to_pylist()):
                    yield Row(number=number, line=number + 1, values=values, raw=(batch, index))
                    number += 1


def _load(path: Path) -> Any:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise InputError(
            f"{path} is neither a run folder nor a data set saved with save_to_disk: give one of "
            "these, or a .csv, .jsonl or .parquet file."
        )
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as exc:
        raise InputError(
            f"Data set folders need the datasets package: {install_command('data')}."
        ) from exc
    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        splits = ", ".join(str(path / name) for name in found)
        raise InputError(f"{path} holds several splits; give one of them: {splits}.")
    return found
