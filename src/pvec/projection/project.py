"""``pvec project FILE``: every row of a file on any number of persona vectors, in one pass.

Rows go through in chunks whose results are logged beside the output as they finish, so memory does
not grow with the file and a killed job goes on where it was. The output is written at the end, in
the input's order, and put in place as a whole.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Counts
from pvec.errors import InputError, PvecError, StoreError
from pvec.projection.inputs import Entry, Source, count_rows, is_same_file, open_source
from pvec.projection.projector import Directions, Values, open_directions, projector
from pvec.runs.files import WriterLock, atomic_write, probe_writable
from pvec.runs.jsonl import JsonlLog, read_jsonl
from pvec.runs.names import model_label
from pvec.runs.responses import stable_hash
from pvec.settings import Settings
from pvec.types import Progress
from pvec.vectors.projection import ProjectionPlan

TURN = "turn"
"""Column that ``--turns each`` adds: which answer of the conversation a row is, from 1."""

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """One column that was added: its mean and standard deviation over ``n`` rows."""

    column: str
    mean: float
    deviation: float
    n: int
    missing: int


@dataclass(frozen=True, kw_only=True)
class ProjectResult:
    """What projecting a file did. ``output`` is None when there was nothing to do.

    ``kept`` are wanted columns that the file had already; ``resumed`` rows were done by an earlier
    call; ``left_out`` rows could not be read.
    """

    input: Path
    output: Path | None
    model: str
    rows: int
    columns: tuple[ColumnSummary, ...] = ()
    kept: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)
    resumed: int = 0
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How a file is written: to ``out``, or ``in_place``; ``overwrite`` replaces what is there,
    columns and output; ``skip_bad`` leaves rows out that cannot be read.
    """

    out: Path | None = None
    in_place: bool = False
    overwrite: bool = False
    skip_bad: bool = False


def run(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    ways: Ways = Ways(),
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ProjectResult:
    """Project every row of ``path`` on ``vectors`` and write it back with a column for each.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for anything wrong with file, vectors
    or output before weights are loaded; the input is whole at every moment.
    """
    source = open_source(path, settings.project)
    target = _target(source, ways)
    with ModelSession(settings, notify=notify, on_progress=on_progress) as session:
        directions = open_directions(settings, vectors, session, notify=notify)
        job = _Job(settings, source, target, session, directions, ways, notify, on_progress)
        return job.run()


def model_name(session: ModelSession) -> str:
    """Return how columns name the model: after its place, or its adapter's."""
    return model_label(session.metadata.adapter or session.metadata.id)


class _Job:
    """One file on its way."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        target: Path,
        session: ModelSession,
        directions: Directions,
        ways: Ways,
        notify: Notify,
        on_progress: OnProgress,
    ) -> None:
        self.settings = settings
        self.source = source
        self.target = target
        self.session = session
        self.directions = directions
        self.ways = ways
        self.notify = notify
        self.on_progress = on_progress
        self.plan: ProjectionPlan = directions.plan(settings)
        self.columns = self.plan.columns(model=model_name(session))
        there = set() if ways.overwrite else set(source.columns)
        self.kept = tuple(name for name in self.columns if name in there)
        self.wanted = tuple(name for name in self.columns if name not in there)
        self.stamp = source.stamp()

    def run(self) -> ProjectResult:
        rows, bad = count_rows(
            self.source, skip_bad=self.ways.skip_bad, on_row=self._watch("reading", None)
        )
        if bad and self.ways.in_place:
            raise InputError(
                f"--in-place would delete {len(bad)} rows of {self.source.path} that cannot be "
                f"read: correct them, or write beside it."
            )
        result = ProjectResult(
            input=self.source.path,
            output=None,
            model=self.session.metadata.id,
            rows=rows,
            kept=self.kept,
            left_out=len(bad),
        )
        if not self.wanted:
            return result
        self._check_target()
        with _workplace(self.target) as folder:
            log = folder / "chunks.jsonl"
            resumed = self._compute(log, rows)
            summaries, counts = self._write(log)
        return ProjectResult(
            **{
                **vars(result),
                "output": self.target,
                "columns": summaries,
                "counts": counts,
                "resumed": resumed,
            }
        )

    def _check_target(self) -> None:
        probe_writable(self.target.parent)
        if self.target.exists() and not (self.ways.in_place or self.ways.overwrite):
            raise InputError(
                f"{self.target} is there already: give --overwrite to replace it, --out for "
                f"another place, or add columns to it with `pvec project {self.target} --in-place`."
            )

    def _compute(self, log: Path, rows: int) -> int:
        """Project chunk by chunk what the log does not hold yet; return how many rows it held."""
        self._check_log(log)
        with JsonlLog(log) as chunks:
            if next(read_jsonl(log), None) is None:
                chunks.append({"input": list(self.stamp), "identity": self._identity()})
            done = sum(len(record["rows"]) for _, record in _chunks(log))
            if done < rows:
                self._compute_rest(chunks, done=done, total=rows)
        return done

    def _check_log(self, log: Path) -> None:
        """Refuse another job's unfinished work; drop what was made from an input of the past."""
        _, head = next(read_jsonl(log), (0, {}))
        if head and head.get("input") != list(self.stamp):
            self.notify(f"{self.source.path} has changed: what was done of it before is done again")
            log.unlink()
        elif head and head.get("identity") != self._identity():
            raise StoreError(
                f"{log.parent} holds an unfinished projection of other settings: finish it with "
                f"those, or delete that folder."
            )

    def _compute_rest(self, log: JsonlLog, *, done: int, total: int) -> None:
        if done:
            self.notify(f"{done:,} of {total:,} rows were done before")
        project = projector(self.session, self.plan, self.settings)
        watch = self._watch("projecting", total)
        watch(done)
        entries = islice(self.source.entries(), done, None)
        while chunk := list(islice(entries, self.settings.project.chunk_rows)):
            made = project(
                [one.conversation for one in chunk],
                on_done=lambda n, done=done: watch(min(done + n, total)),  # type: ignore[misc]
            )
            log.append({"rows": made.rows, "counts": vars(made.counts)})
            done += len(chunk)
            watch(done)

    def _write(self, log: Path) -> tuple[tuple[ColumnSummary, ...], Counts]:
        """Write the output from the input and the log, row by row."""
        each = self.settings.project.turns == "each"
        columns = (*((TURN,) if each else ()), *self.wanted)
        places = [self.columns.index(name) for name in self.wanted]
        sums = _Sums(self.wanted)
        counts = Counts()
        for _, record in _chunks(log):
            counts += Counts(**record["counts"])
        with atomic_write(self.target) as stream:
            with self.source.writer(stream, columns=columns) as writer:
                for entry, turns in self._matched(log):
                    for turn, values in enumerate(turns, start=1):
                        cells = {n: values[p] for n, p in zip(self.wanted, places, strict=True)}
                        sums.add(cells)
                        cells = {n: self._kept_cell(entry, n, v) for n, v in cells.items()}
                        writer.write(entry.row, {TURN: turn, **cells} if each else cells)
            if self.source.stamp() != self.stamp:
                raise StoreError(
                    f"{self.source.path} was changed while it was projected: run the command again."
                )
        return sums.summaries(), counts

    def _kept_cell(self, entry: Entry, name: str, value: float | None) -> float | None:
        """Return a cell that the row has although its file's first row has not, or ``value``."""
        if self.ways.overwrite or name not in entry.row.values:
            return value
        kept: float | None = entry.row.values[name]
        return kept

    def _matched(self, log: Path) -> Iterator[tuple[Entry, list[Values]]]:
        results = (row for _, record in _chunks(log) for row in record["rows"])
        return zip(self.source.entries(), results, strict=True)

    def _identity(self) -> str:
        """Everything that could change a number or its place."""
        project = self.settings.project.model_dump(mode="json")
        for unimportant in ("scale_out", "workers", "natural", "subset", "percentile", "rollouts"):
            del project[unimportant]
        return stable_hash(
            {
                "model": self.session.identity,
                "vectors": self.directions.fingerprints,
                "layers": list(self.plan.layers),
                "columns": list(self.columns),
                "thinking": self.session.thinking,
                "skip_bad": self.ways.skip_bad,
                **project,
            }
        )

    def _watch(self, stage: str, total: int | None) -> Callable[[int], None]:
        def show(done: int) -> None:
            if done % 256 == 0 or done == total:
                self.on_progress(Progress(stage=stage, done=done, total=total, unit="rows"))

        return show


class _Sums:
    """Means of columns as their rows go by."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._sums = {name: [0.0, 0.0, 0, 0] for name in columns}

    def add(self, cells: dict[str, float | None]) -> None:
        for name, value in cells.items():
            sums = self._sums[name]
            if value is None:
                sums[3] += 1
            else:
                sums[0] += value
                sums[1] += value * value
                sums[2] += 1

    def summaries(self) -> tuple[ColumnSummary, ...]:
        made = []
        for name, (total, squares, n, missing) in self._sums.items():
            mean = total / n if n else math.nan
            spread = math.sqrt(max(squares / n - mean * mean, 0.0)) if n else math.nan
            made.append(
                ColumnSummary(
                    column=name, mean=mean, deviation=spread, n=int(n), missing=int(missing)
                )
            )
        return tuple(made)


def _target(source: Source, ways: Ways) -> Path:
    if ways.in_place:
        if ways.out is not None:
            raise InputError("--in-place and --out were both given: choose one.")
        if not source.replaceable:
            raise InputError(
                f"{source.path} is a folder, which --in-place cannot replace: leave it away, and "
                f"the results go to {source.output}."
            )
        return source.path
    target = ways.out or source.output
    if is_same_file(target, source.path):
        raise InputError(
            f"{target} is the input itself: give another --out, or --in-place to replace it."
        )
    if target.is_dir():
        raise InputError(f"--out {target} is a folder: give the output a name.")
    if target.suffix != source.output.suffix:
        raise InputError(
            f"{target} will be of the format of {source.path}: give --out a name that ends in "
            f"{source.output.suffix}."
        )
    return target


def _chunks(log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the log's chunks: ``rows`` (each with its turns' values) and ``counts``."""
    return islice(read_jsonl(log), 1, None)


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """Keep what is finished in a hidden folder beside the output until all of it is.

    It stays when the job stops half-way, and a job for the same output waits its turn.
    """
    folder = target.with_name(f".{target.name}.pvec")
    folder.mkdir(exist_ok=True)
    with WriterLock(folder / ".lock"):
        try:
            yield folder
        except PvecError:
            if not (folder / "chunks.jsonl").exists():
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
