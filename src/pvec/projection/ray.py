"""``pvec project --engine ray``: the same batches on the workers of a Ray cluster.

For data that outgrows a machine: blocks of Parquet or JSON lines are read, projected and written by
workers with one model each; a worker that dies is replaced and its blocks are done again. The
numbers are those of a local run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.backends.pool.address import Workers
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.arrow_table import with_column
from pvec.data.conversations import Conversation, conversation_of
from pvec.data.json_table import extended_line, parse_row
from pvec.data.spans import TemplateCheck
from pvec.data.table import BadRow
from pvec.errors import InputError, install_command
from pvec.projection.inputs import columns_of
from pvec.projection.project import model_name
from pvec.projection.projector import LoadedVectors, open_vectors, projector
from pvec.runs.files import probe_writable
from pvec.settings import Settings
from pvec.types import DEFAULT_OUTPUT, OutputOptions

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

_LINE = "text"
"""Name of the only column of JSON lines as Ray reads them: whole lines, so that nothing in them
changes.
"""


@dataclass(frozen=True, kw_only=True)
class RayResult:
    """Where the parts went: ``files`` in ``output``, in the input's order by name."""

    input: Path
    output: Path
    model: str
    rows: int
    columns: tuple[str, ...]
    files: tuple[Path, ...]
    workers: int


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What a worker needs to know; it travels to other processes."""

    settings: Settings
    vectors: tuple[str, ...]
    columns: tuple[str, ...]
    new: tuple[str, ...]
    lines: bool
    skip_bad: bool


class RayWorker:
    """One model, and batches of rows for it. Ray makes one per worker."""

    def __init__(self, job: RayJob) -> None:
        self.job = job
        self._session = ModelSession(job.settings)
        loaded = open_vectors(self._session, job.vectors)
        plan = loaded.plan_of(*job.settings.project.span_types)
        self._project = projector(self._session, plan)
        self._check = TemplateCheck(
            self._session.metadata.tokenizer, turns=job.settings.project.turns
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a block of rows with the wanted columns added."""
        return self._lines(batch) if self.job.lines else self._table(batch)

    def _table(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        kept, conversations = [], []
        for number, values in enumerate(batch.to_pylist()):
            if (conversation := self._conversation(values, "a row")) is not None:
                kept.append(number)
                conversations.append(conversation)
        table = batch.take(pa.array(kept, type=pa.int64()))
        projected = self._cells(conversations)
        for name in self.job.new:
            table = with_column(table, name, [cells[name] for cells in projected])
        return table

    def _lines(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        rows, conversations = [], []
        for number, line in enumerate(batch.column(_LINE).to_pylist()):
            row = parse_row(f"{line}\n".encode(), number=number, line=number + 1)
            if isinstance(row, BadRow):
                self._refuse(f"a line that {row.reason}: {line[:80]!r}")
            elif (
                conversation := self._conversation(row.values, f"a line ({line[:80]!r})")
            ) is not None:
                rows.append(row)
                conversations.append(conversation)
        written = [
            extended_line(row, cells).decode().rstrip("\n")
            for row, cells in zip(rows, self._cells(conversations), strict=True)
        ]
        return pa.table({_LINE: pa.array(written, type=pa.string())})

    def _conversation(self, values: Mapping[str, Any], what: str) -> Conversation | None:
        """Return a row's conversation, or None where bad rows may be left out."""
        try:
            conversation = conversation_of(values, columns_of(self.job.settings.project))
            self._check(conversation)
        except InputError as error:
            self._refuse(f"{what} that {error}")
            return None
        return conversation

    def _cells(self, conversations: Sequence[Conversation]) -> list[dict[str, float | None]]:
        rows = [
            dict(zip(self.job.columns, t[0], strict=True))
            for t in self._project(conversations).require_all()
        ]
        return [{name: row[name] for name in self.job.new} for row in rows]

    def _refuse(self, what: str) -> None:
        if not self.job.skip_bad:
            raise InputError(f"There is {what}. Correct it, or leave such rows out: --skip-bad.")


def run(
    settings: Settings,
    path: Path,
    vectors: Sequence[str],
    *,
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
    worker: type[RayWorker] = RayWorker,
) -> RayResult:
    """Project the rows of a Parquet or JSON lines file, or a folder of such, on Ray's workers.

    Uses the cluster that this process belongs to, or starts a local one. The output is a folder of
    part files. Raises ``InputError`` when Ray is missing, for other formats, for ``--turns each``,
    and for vectors that do not fit, before a worker starts.
    """
    if output.tokens:
        raise InputError("--tokens has no effect with --engine ray: project the file here.")
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"--engine ray needs Ray: {install_command('ray')}.")
    if output.in_place:
        raise InputError("--in-place has no effect here: --engine ray writes a folder of files.")
    if settings.project.turns == "each":
        raise InputError("--engine ray writes a row per row: use --turns last or all.")
    lines = _holds_lines(path)
    target = output.out or path.with_name(f"{path.stem}.projected")
    if target.exists():
        raise InputError(f"{target} is there already: delete it or give another --out.")
    probe_writable(target.parent)
    with ModelSession(settings, notify=notify) as session:
        loaded = open_vectors(session, vectors)
        columns = loaded.plan_of(*settings.project.span_types).columns(model=model_name(session))
    import ray

    if not ray.is_initialized():
        # a CPU per worker, and one that reads and writes: without it nothing would ever arrive
        cpus = _workers(settings) + 1
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    data = _read(path, lines=lines)
    there = _columns(data, lines=lines)
    new = tuple(name for name in columns if output.overwrite or name not in there)
    job = RayJob(
        settings=_pinned(settings, loaded),
        vectors=tuple(str(Path(name).resolve()) for name in vectors),
        columns=columns,
        new=new,
        lines=lines,
        skip_bad=output.skip_bad,
    )
    rows = _write(_projected(data, job, worker), target, lines=lines)
    files = tuple(sorted(p for p in target.iterdir() if p.is_file()))
    return RayResult(
        input=path,
        output=target,
        model=session.metadata.id,
        rows=rows,
        columns=new,
        files=files,
        workers=_workers(settings),
    )


def _workers(settings: Settings) -> int:
    workers = Workers.parse(settings.pool.workers)
    return (workers.count if workers else None) or 1


def _projected(data: ray.data.Dataset, job: RayJob, worker: type[RayWorker]) -> ray.data.Dataset:
    import ray
    import torch

    project = job.settings.project
    return data.map_batches(
        worker,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        batch_size=project.chunk_rows,
        compute=ray.data.ActorPoolStrategy(size=_workers(job.settings)),
        num_gpus=1 if torch.cuda.is_available() else 0,
    )


def _read(path: Path, *, lines: bool) -> ray.data.Dataset:
    import ray

    # Before anything is read: a dataset keeps the options of the moment it was made.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    place = str(path.resolve())
    return ray.data.read_text(place) if lines else ray.data.read_parquet(place)


def _columns(data: ray.data.Dataset, *, lines: bool) -> tuple[str, ...]:
    if not lines:
        return tuple(data.schema().names)
    first = data.take(1)
    text = f"{first[0][_LINE]}\n" if first else ""
    row = parse_row(text.encode(), number=0, line=1)
    if isinstance(row, BadRow):
        raise InputError(f"The first line {row.reason}: give a file with one JSON object per line.")
    return tuple(row.values)


def _write(data: ray.data.Dataset, target: Path, *, lines: bool) -> int:
    """Write the parts, named so that their order is the input's; return how many rows there are."""
    if lines:
        from pvec.projection.ray_sink import LinesSink

        data.write_datasink(LinesSink(str(target), file_format="jsonl"))
    else:
        data.write_parquet(str(target))
    return sum(_rows_of(path, lines=lines) for path in target.iterdir())


def _rows_of(path: Path, *, lines: bool) -> int:
    if lines:
        with path.open("rb") as stream:
            return sum(1 for _ in stream)
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def _holds_lines(path: Path) -> bool:
    names = _files(path)
    suffixes = {name.suffix.lower() for name in names}
    if suffixes and suffixes <= {".jsonl", ".ndjson"}:
        return True
    if suffixes == {".parquet"}:
        return False
    raise InputError(
        f"--engine ray reads .parquet and .jsonl files, or a folder of one kind; {path} is not: "
        f"use --engine local."
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")]
    if not path.exists():
        raise InputError(f"there is no file {path}; check the path.")
    return [path]


def _pinned(settings: Settings, vectors: LoadedVectors) -> Settings:
    """Return the settings with the layers that were chosen, so that every worker takes the same."""
    project = settings.project.model_copy(update={"layers": vectors.layers})
    return settings.model_copy(update={"project": project})
