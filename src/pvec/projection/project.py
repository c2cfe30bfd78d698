"""``pvec project FILE``: every row of a file on any number of persona vectors, in one pass.

The file is read twice: once to check every row before anything is loaded, once to project and
write. Rows go through in chunks whose projections are logged beside the output as they finish, so
memory does not grow with the file and a killed job continues where it was. The output is put in
place as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Conversation
from pvec.data.spans import Counts, TemplateCheck
from pvec.data.table import Row
from pvec.errors import InputError, StoreError
from pvec.notebook import HtmlResult
from pvec.projection.columns import AddedColumns, ColumnSummary
from pvec.projection.inputs import Source, open_source
from pvec.projection.output import (
    TokenOutput,
    open_token_output,
    open_workplace,
    output_path,
    require_free,
    token_folder,
    token_settings,
)
from pvec.projection.projector import LoadedVectors, Values, open_vectors, projector
from pvec.runs.files import atomic_write
from pvec.runs.jsonl import JsonlLog, read_jsonl
from pvec.runs.names import model_label
from pvec.runs.responses import stable_hash
from pvec.settings import Settings
from pvec.types import DEFAULT_OUTPUT, OutputOptions, Progress
from pvec.vectors.projection import ProjectionPlan

UNIMPORTANT = {
    *("scale_out", "block_mb", "natural", "naturals", "subset", "percentile", "rollouts", "spans")
}
"""Settings that change no number of a projected file and not its place."""

OnProgress = Callable[[Progress], None]
Chunk = tuple[list[tuple[Row, Conversation]], list[list[Values]], dict[int, str]]
"""Rows of the file, their projections (a tuple per turn that counts), and why some have none."""


@dataclass(frozen=True, kw_only=True)
class ProjectResult(HtmlResult):
    """What projecting a file did. ``output`` is None when there was nothing to do.

    ``kept`` are columns that the file had already; ``resumed`` rows were done by an earlier call;
    ``left_out`` rows could not be read. ``tokens`` is the folder of single tokens, if any.
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
    tokens: Path | None = None


def run(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ProjectResult:
    """Project every row of ``path`` on ``vectors`` and write it back with a column for each.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for anything wrong with file, vectors
    or output before weights are loaded; the input is whole at every moment.
    """
    source = open_source(path, settings.project)
    target = output_path(source, output)
    if output.tokens:
        settings = token_settings(settings, notify=notify)
    with ModelSession(settings, notify=notify, on_progress=on_progress) as session:
        loaded = open_vectors(session, vectors)
        plan = loaded.plan_of(*settings.project.span_types)
        columns = plan.columns(model=model_name(session))
        there = () if output.overwrite else source.table.columns
        kept = tuple(name for name in columns if name in there)
        numbers, report = count(1), _reporter(on_progress, stage="reading")
        check = TemplateCheck(session.metadata.tokenizer, turns=settings.project.turns)
        source = source.checked(check)
        rows, bad = source.check(skip_bad=output.skip_bad, on_row=lambda _: report(next(numbers)))
        if bad and output.in_place:
            raise InputError(
                f"--in-place would delete {len(bad)} rows of {path} that cannot be read: correct "
                f"them, or write beside it."
            )
        result = ProjectResult(
            input=path,
            output=None,
            model=session.metadata.id,
            rows=rows,
            kept=kept,
            left_out=len(bad),
        )
        if len(kept) == len(columns) and not output.tokens:
            return result
        require_free(target, output)
        added = AddedColumns(
            columns, kept=kept, turns=settings.project.turns, overwrite=output.overwrite
        )
        job = _Job(source, target, session, loaded, plan, added, output)
        with open_workplace(target) as folder:
            return job.run(folder, result)


def model_name(session: ModelSession) -> str:
    """Return how columns name the model: after its place, or its adapter's."""
    return model_label(session.metadata.adapter or session.metadata.id)


@dataclass
class _Job:
    """One file on its way."""

    source: Source
    target: Path
    session: ModelSession
    loaded: LoadedVectors
    plan: ProjectionPlan
    added: AddedColumns
    output: OutputOptions
    counts: Counts = field(default_factory=Counts)
    resumed: int = 0
    left_out: int = 0
    tokens: TokenOutput | None = None

    def run(self, folder: Path, result: ProjectResult) -> ProjectResult:
        """Project what the log in ``folder`` does not hold yet, and write the output."""
        table, tokens = self.source.table, token_folder(self.target)
        stamp = table.stamp()
        path = folder / "chunks.jsonl"
        self._check_log(path, stamp)
        with ExitStack() as stack:
            log = stack.enter_context(JsonlLog(path))
            stream = stack.enter_context(atomic_write(self.target, aside=folder))
            if self.output.tokens:
                self.tokens = stack.enter_context(
                    open_token_output(
                        folder / "tokens",
                        self.session,
                        self.loaded,
                        path=self.source.path,
                        target=tokens,
                    )
                )
            if next(read_jsonl(path), None) is None:
                log.append({"input": stamp, "identity": self._identity()})
            with table.writer(stream, columns=self.added.written) as writer:
                for rows, values, refused in self._chunks(log, total=result.rows):
                    for number, reason in refused.items():
                        self._refuse(rows[number][0], reason)
                    self.added.write(writer, rows, values)
            if table.stamp() != stamp:
                raise StoreError(
                    f"{self.source.path} was changed while it was projected: run the command again."
                )
        return replace(
            result,
            output=self.target,
            columns=self.added.summaries(),
            counts=self.counts,
            resumed=self.resumed,
            rows=result.rows - self.left_out,
            left_out=result.left_out + self.left_out,
            tokens=tokens if self.output.tokens else None,
        )

    def _check_log(self, log: Path, stamp: Sequence[str | int]) -> None:
        """Refuse another job's unfinished work; drop what was made from an older input."""
        _, head = next(read_jsonl(log), (0, {}))
        if head and head.get("input") != list(stamp):
            self.session.notify(f"{self.source.path} has changed: its rows are projected again")
            log.unlink()
        elif head and head.get("identity") != self._identity():
            raise StoreError(
                f"{log.parent} holds an unfinished projection of other settings: finish it with "
                f"those, or delete that folder."
            )

    def _chunks(self, log: JsonlLog, *, total: int) -> Iterator[Chunk]:
        """Yield the file in chunks with their projections: from the log, then computed."""
        rows, chunks = self.source.rows(), count()
        for _, record in islice(read_jsonl(log.path), 1, None):
            self.counts += Counts(**record["counts"])
            self.resumed += len(record["rows"])
            refused = {int(number): reason for number, reason in record["refused"].items()}
            next(chunks)
            yield list(islice(rows, len(record["rows"]))), record["rows"], refused
        if self.resumed == total:
            return
        if self.resumed:
            self.session.notify(f"{self.resumed:,} of {total:,} rows were done before")
        project = projector(self.session, self.plan, tokens=self.tokens is not None)
        done, chunk_rows = self.resumed, self.session.settings.project.chunk_rows
        report = _reporter(self.session.on_progress, stage="projecting", total=total)
        report(done)
        while chunk := list(islice(rows, chunk_rows)):
            projections = project(
                [conversation for _, conversation in chunk],
                on_done=lambda n, done=done: report(min(done + n, total)),  # type: ignore[misc]
            )
            if self.tokens is not None:
                self.tokens.write(next(chunks), chunk, projections.tokens)
            log.append(
                {
                    "rows": projections.rows,
                    "counts": vars(projections.counts),
                    "refused": projections.refused,
                }
            )
            self.counts += projections.counts
            done += len(chunk)
            report(done)
            yield chunk, projections.rows, projections.refused

    def _refuse(self, row: Row, reason: str) -> None:
        """Count a row that the chat template refuses, where such rows may be left out."""
        if not self.output.skip_bad or self.output.in_place:
            raise InputError(
                f"{self.source.path}:{row.line} is refused: {reason.removesuffix('.')}. "
                f"Correct it, or leave such rows out with --skip-bad."
            )
        self.left_out += 1

    def _identity(self) -> str:
        """Everything that could change a number or its place."""
        options = self.session.settings.project.model_dump(mode="json", exclude=UNIMPORTANT)
        return stable_hash(
            {
                "model": self.session.identity,
                "vectors": self.loaded.fingerprints,
                "layers": list(self.plan.layers),
                "columns": list(self.added.names),
                "thinking": self.session.thinking,
                "skip_bad": self.output.skip_bad,
                **({"tokens": True} if self.output.tokens else {}),
                **options,
            }
        )


def _reporter(
    on_progress: OnProgress, *, stage: str, total: int | None = None
) -> Callable[[int], None]:
    """Return a function that reports how many rows are done, now and then."""

    def report(done: int) -> None:
        if done % 256 == 0 or done == total:
            on_progress(Progress(stage=stage, done=done, total=total, unit="rows"))

    return report
