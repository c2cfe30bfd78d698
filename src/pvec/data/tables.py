"""The one way to open a user's table: CSV, JSON lines, a JSON list, Parquet, data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pvec.data.csv_table import CsvTable
from pvec.data.json_table import JsonlTable, JsonTable
from pvec.data.storage import url_of
from pvec.data.table import Table, require_file
from pvec.errors import InputError

HUB = "hf:"
"""A source that begins with this is a data set of the hub: ``hf:NAME`` or ``hf:NAME:SPLIT``."""


def open_table(source: str | Path, *, need: Sequence[str] = ()) -> Table:
    """Open a table whose columns include ``need``.

    A ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file, here or at
    a URL (``s3://``, ``gs://``, ``hf://datasets/…``), a folder that ``Dataset.save_to_disk`` wrote,
    or ``hf:NAME[:SPLIT]``, a data set of the hub. Raises ``InputError`` for a missing or empty
    file, another format, and missing columns (which, what there is, the nearest).
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    is_dataset = str(source).startswith(HUB) and url_of(source) is None
    if is_dataset or path.is_dir():
        from pvec.data.arrow_table import DatasetTable

        return DatasetTable(str(source) if is_dataset else path, need=need)
    require_file(path)
    if suffix in {".csv", ".tsv"}:
        return CsvTable(path, need=need, delimiter="\t" if suffix == ".tsv" else ",")
    if suffix in {".jsonl", ".ndjson"}:
        return JsonlTable(path, need=need)
    if suffix == ".json":
        return JsonTable(path, need=need)
    if suffix == ".parquet":
        from pvec.data.arrow_table import ParquetTable

        return ParquetTable(path, need=need)
    raise InputError(
        f"{path} is not a table that pvec reads: its name should end in .csv, .tsv, .jsonl, .json "
        "or .parquet."
    )
