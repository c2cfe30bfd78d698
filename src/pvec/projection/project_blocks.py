"""``pvec project --engine ray``: the columns of ``pvec project``, block by block."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.blocks import Block
from pvec.data.spans import Counts
from pvec.data.storage import location
from pvec.errors import InputError
from pvec.projection.block_folder import BlockFolder, Part
from pvec.projection.columns import AddedColumns, ColumnSummary
from pvec.projection.project import UNIMPORTANT, model_name
from pvec.projection.projector import open_vectors, projector
from pvec.projection.ray import (
    BlockJob,
    Execute,
    OnProgress,
    check_options,
    identity_of,
    open_blocks,
    output_place,
    run_blocks,
    worker_settings,
)
from pvec.settings import Settings
from pvec.types import DEFAULT_OUTPUT, OutputOptions
from pvec.vectors.projection import ProjectionPlan


@dataclass(frozen=True, kw_only=True)
class BlocksResult:
    """What projecting by block did: ``blocks`` part files in ``output``, in the input's order.

    ``resumed`` blocks were done by an earlier call; ``left_out`` rows could not be read; ``kept``
    are columns that the input had already.
    """

    input: str
    output: str
    model: str
    rows: int
    blocks: int
    resumed: int
    columns: tuple[ColumnSummary, ...]
    kept: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class ProjectJob(BlockJob):
    """Projects the rows of blocks on the vectors of ``plan``."""

    plan: ProjectionPlan
    added: Callable[[], AddedColumns]
    """Makes the columns of a block, or of all of them, before a row is counted."""

    def open(self, session: ModelSession) -> Callable[[Block], Part]:
        """Return what projects a block."""
        project = projector(session, self.plan)
        chunk_rows = self.settings.project.chunk_rows

        def work(block: Block) -> Part:
            table, rows, left_out = self.rows(block, session)
            added, counts, refused = self.added(), Counts(), 0
            stream = io.BytesIO()
            with table.writer(stream, columns=added.written) as writer:
                for start in range(0, len(rows), chunk_rows):
                    chunk = rows[start : start + chunk_rows]
                    done = project([conversation for _, conversation in chunk])
                    counts += done.counts
                    for number, reason in done.refused.items():
                        self.refuse(table, chunk[number][0].line, f"is refused: {reason}")
                    refused += len(done.refused)
                    added.write(writer, chunk, done.rows)
            return Part(
                content=stream.getvalue(),
                counts={
                    "rows": len(rows) - refused,
                    "left_out": left_out + refused,
                    "sums": added.state(),
                    "counts": vars(counts),
                },
            )

        return work


def run(
    settings: Settings,
    path: str | Path,
    vectors: Sequence[str | Path],
    *,
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
    execute: Execute | None = None,
) -> BlocksResult:
    """Project the rows of Parquet or JSON lines, a file or the files of a folder, block by block.

    Input and output may be URLs. The output is a folder of part files; a second call does the
    blocks that are missing in it. Raises ``InputError``, ``ModelError`` or ``StoreError`` for
    anything wrong with input, vectors or output before weights are loaded, except for bad rows,
    which are found block by block.
    """
    workers = check_options(settings, output, execute)
    source = location(path)
    place = output_place(source, output, ending="projected")
    blocks = open_blocks(source, settings, notify=notify)
    with ModelSession(worker_settings(settings), notify=notify) as session:
        loaded = open_vectors(session, vectors)
        plan = loaded.plan_of(*settings.project.span_types)
        columns = tuple(plan.columns(model=model_name(session)))
        kept = tuple(c for c in columns if c in blocks.columns and not output.overwrite)
        if set(columns) <= set(kept):
            raise InputError(f"{source} has every column already: --overwrite computes them again.")
        job = ProjectJob(
            settings=worker_settings(settings),
            folder=BlockFolder(place=place, suffix=blocks.suffix),
            skip_bad=output.skip_bad,
            plan=plan,
            added=partial(
                AddedColumns,
                columns,
                kept=kept,
                turns=settings.project.turns,
                overwrite=output.overwrite,
            ),
        )
        job.folder.begin(
            identity_of(
                blocks,
                session,
                settings,
                command="project",
                vectors=loaded.fingerprints,
                layers=list(plan.layers),
                columns=list(columns),
                **{"--skip-bad": output.skip_bad, "--overwrite": output.overwrite},
                options=settings.project.model_dump(mode="json", exclude=UNIMPORTANT),
            )
        )
    done, resumed = run_blocks(
        job, blocks.blocks, workers,
        stage="projecting", notify=notify, on_progress=on_progress, execute=execute,
    )  # fmt: skip
    added, counts = job.added(), Counts()
    for block in done.values():
        added.merge(block["sums"])
        counts += Counts(**block["counts"])
    result = BlocksResult(
        input=source,
        output=place,
        model=session.metadata.id,
        rows=sum(block["rows"] for block in done.values()),
        blocks=len(done),
        resumed=resumed,
        columns=added.summaries(),
        kept=kept,
        counts=counts,
        left_out=sum(block["left_out"] for block in done.values()),
    )
    job.folder.finish(dataclasses.asdict(result))
    return result
