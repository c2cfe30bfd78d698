"""``pvec screen --engine ray``: training data that outgrows a machine, screened block by block.

A sample's projection difference needs nothing but the sample and the base model's own response to
its prompt, so blocks are screened apart; scores and thresholds are then over all of them. Of each
sample 8 bytes per column, and 8 more, are read back for that.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pvec.backends.planned import PromptCache, generate_records
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.arrow_table import ParquetTable
from pvec.data.blocks import Block, Blocks
from pvec.data.json_table import JsonlTable
from pvec.data.storage import location, read_files
from pvec.data.table import Cell
from pvec.errors import InputError, StoreError
from pvec.projection import base_responses
from pvec.projection.block_folder import BlockFolder, Part
from pvec.projection.inputs import answer_text, columns_of, conversation_reader, prompt_of
from pvec.projection.projector import LoadedVectors, open_vectors
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
from pvec.projection.screen_scores import (
    ColumnScore,
    by_column,
    furthest,
    project_samples,
    sample_kinds,
    score_columns,
)
from pvec.runs.responses import Json, stable_hash
from pvec.settings import Settings
from pvec.types import DEFAULT_OUTPUT, OutputOptions
from pvec.vectors.projection import ProjectionPlan

BASE_RESPONSE = "base_response"
REMOVED = "removed"


@dataclass(frozen=True, kw_only=True)
class BlockSample:
    """One of the samples furthest along a vector: a row (from 1) of a part file."""

    part: str
    row: int
    question: str
    response: str
    natural: str
    differences: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ScreenBlocksResult:
    """The result of screening by block: ``blocks`` part files in ``output`` with a column
    ``removed`` where there is a clean reference set.
    """

    input: str
    reference: str | None
    output: str
    model: str
    natural: base_responses.Source
    rows: int
    blocks: int
    resumed: int
    unanswered: int
    left_out: int
    percentile: float
    columns: tuple[ColumnScore, ...]
    suspicious: tuple[BlockSample, ...]
    removed_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScreenJob(BlockJob):
    """Screens blocks along the ``columns`` (vector and layer) of the vectors.

    ``limits`` are the thresholds; ``writes`` is false for the reference set, which is only counted.
    """

    plan: ProjectionPlan
    base_plan: ProjectionPlan
    columns: tuple[tuple[str, int], ...]
    limits: tuple[float, ...] | None = None
    writes: bool = True

    @property
    def new_columns(self) -> tuple[str, ...]:
        """The columns that every part has beside those of the input."""
        numbers = [
            f"{vector}_layer{layer}_{part}"
            for vector, layer in self.columns
            for part in ("response", "natural", "difference")
        ]
        generated = self.settings.project.natural == "generate"
        return (
            *numbers,
            *((BASE_RESPONSE,) if generated else ()),
            *((REMOVED,) if self.limits is not None else ()),
        )

    def open(self, session: ModelSession) -> Callable[[Block], Part]:
        """Return what screens a block."""
        return lambda block: self._screen(block, session)

    def _screen(self, block: Block, session: ModelSession) -> Part:
        table, rows, left_out = self.rows(block, session)
        cache = PromptCache(session)
        conversations = [conversation for _, conversation in rows]
        prompts = [prompt_of(conversation, session, cache) for conversation in conversations]
        responses, base = project_samples(session, self.plan, conversations, total=len(rows))
        answers: Mapping[str, str] = {}
        if self.settings.project.natural == "generate":
            distinct = {prompt.key: prompt for prompt in prompts}
            planned = base_responses.planned_responses(session, distinct.values())
            order = {response.id: number for number, response in enumerate(planned)}
            records = sorted(generate_records(session, planned), key=lambda r: order[r.id])
            answers = {record.question_id: record.answer for record in reversed(records)}
            keys = [prompt.key for prompt in prompts]
            base = base_responses.mean_projections(session, self.base_plan, records, keys=keys)
        differences = responses - base
        removed = None
        if self.limits is not None:
            removed = np.any(differences > np.array(self.limits), axis=1)
        stream = io.BytesIO()
        if self.writes:
            values = np.stack([responses, base, differences], axis=2).reshape(len(rows), -1)
            with table.writer(stream, columns=self.new_columns) as writer:
                for n, (row, _) in enumerate(rows):
                    numbers: list[Cell] = [
                        v if np.isfinite(v) else None for v in values[n].tolist()
                    ]
                    cells = dict(zip(self.new_columns, numbers, strict=False))
                    cells[BASE_RESPONSE] = answers.get(prompts[n].key, "")
                    cells[REMOVED] = removed is not None and bool(removed[n])
                    writer.write(row, cells)
        arrays = io.BytesIO()
        hashes = np.array([int(prompt.key[:16], 16) for prompt in prompts], dtype=np.uint64)
        np.savez(arrays, differences=differences, prompts=hashes)
        return Part(
            content=stream.getvalue() if self.writes else None,
            arrays=arrays.getvalue(),
            counts={
                "rows": len(rows),
                "left_out": left_out,
                "unanswered": sum(not answer_text(c, session) for c in conversations),
                "removed": None if removed is None else int(removed.sum()),
            },
        )


def run(
    settings: Settings,
    path: str | Path,
    vectors: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
    execute: Execute | None = None,
) -> ScreenBlocksResult:
    """Screen the samples of Parquet or JSON lines, a file or the files of a folder, block by block.

    The numbers are those of ``screen.run``. A base response is generated once per prompt and block.
    The output is a folder of part files; a second call does the blocks that are missing in it.
    Raises ``InputError``, ``ModelError`` or ``StoreError`` as ``project_blocks.run`` does, and for
    ``--natural subset``, which predicts from all rows.
    """
    workers = check_options(settings, output, execute)
    if settings.project.natural == "subset":
        raise InputError(
            "--natural subset predicts from the rows of the whole file: with --engine ray use "
            "--natural generate or prompt."
        )
    source = location(path)
    place = output_place(source, output, ending="screened")
    blocks = open_blocks(source, settings, notify=notify)
    clean = None if reference is None else open_blocks(location(reference), settings, notify=notify)
    work = partial(
        run_blocks, workers=workers, notify=notify, on_progress=on_progress, execute=execute
    )
    with ModelSession(worker_settings(settings), notify=notify) as session:
        loaded = open_vectors(session, vectors)
        job = ScreenJob(
            settings=worker_settings(settings),
            folder=BlockFolder(place=place, suffix=blocks.suffix),
            skip_bad=output.skip_bad,
            plan=loaded.plan_of(*sample_kinds(settings.project.natural)),
            base_plan=loaded.plan_of("proj"),
            columns=tuple(loaded.columns),
        )
        _check_columns(job, blocks, source, output, clean=clean is not None)
        job.folder.begin(_identity(job, blocks, clean, session, loaded, output))
        clean_differences: np.ndarray | None = None
        clean_prompts: list[int] = []
        if clean is not None:
            folder = dataclasses.replace(job.folder, name="reference", suffix="")
            counting = dataclasses.replace(job, folder=folder, writes=False)
            done, _ = work(counting, clean.blocks, stage="reference")
            clean_differences, clean_prompts = _arrays(folder, done)
            limits = np.nanpercentile(clean_differences, settings.project.percentile, axis=0)
            job = dataclasses.replace(job, limits=tuple(limits.tolist()))
        done, resumed = work(job, blocks.blocks, stage="screening")
        differences, prompts = _arrays(job.folder, done)
        result = ScreenBlocksResult(
            input=source,
            reference=None if reference is None else location(reference),
            output=place,
            model=session.metadata.id,
            natural=settings.project.natural,
            rows=sum(block["rows"] for block in done.values()),
            blocks=len(done),
            resumed=resumed,
            unanswered=sum(block["unanswered"] for block in done.values()),
            left_out=sum(block["left_out"] for block in done.values()),
            percentile=settings.project.percentile,
            columns=score_columns(
                job.columns,
                differences,
                prompts=prompts,
                clean=clean_differences,
                clean_prompts=clean_prompts,
                percentile=settings.project.percentile,
            ),
            suspicious=_suspicious(job, differences, done, session),
            removed_rows=sum(b["removed"] for b in done.values()) if clean is not None else None,
        )
    job.folder.finish(dataclasses.asdict(result))
    return result


def _check_columns(
    job: ScreenJob, blocks: Blocks, source: str, output: OutputOptions, *, clean: bool
) -> None:
    new = {*job.new_columns, *((REMOVED,) if clean else ())}
    if (twice := sorted(new & set(blocks.columns))) and not output.overwrite:
        raise InputError(f"{source} has the column {twice[0]!r} already: --overwrite replaces it.")


def _identity(
    job: ScreenJob,
    blocks: Blocks,
    clean: Blocks | None,
    session: ModelSession,
    loaded: LoadedVectors,
    output: OutputOptions,
) -> dict[str, Any]:
    settings = session.settings
    files: list[Json] = [] if clean is None else [[f.path, f.size, f.version] for f in clean.files]
    project = settings.project
    return identity_of(
        blocks,
        session,
        settings,
        command="screen",
        vectors=loaded.fingerprints,
        layers=list(job.plan.layers),
        reference=stable_hash({"files": files}),
        percentile=project.percentile,
        natural=[project.natural, project.naturals],
        columns=vars(columns_of(project)),
        generation=[
            settings.generation.temperature, settings.generation.top_p, session.max_tokens,
            settings.generation.seed,
        ],
        **{"--skip-bad": output.skip_bad, "--overwrite": output.overwrite},
    )  # fmt: skip


def _arrays(
    folder: BlockFolder, done: Mapping[int, Mapping[str, Any]]
) -> tuple[np.ndarray, list[int]]:
    """Return the differences ``[rows, columns]`` of all blocks, and the rows' prompts."""
    differences, prompts = [], []
    for number in done:
        place = folder.arrays(number)
        content = read_files([place])[place]
        try:
            with np.load(io.BytesIO(content)) as arrays:
                differences.append(arrays["differences"])
                prompts.append(arrays["prompts"])
        except (ValueError, LookupError, EOFError, BadZipFile):
            raise StoreError(
                f"{place} is damaged: delete the block's .json beside it, and the same command "
                f"does the block again."
            ) from None
    return np.concatenate(differences), np.concatenate(prompts).tolist()


def _suspicious(
    job: ScreenJob,
    differences: np.ndarray,
    done: Mapping[int, Mapping[str, Any]],
    session: ModelSession,
) -> tuple[BlockSample, ...]:
    """Return the samples furthest out, read from the part files."""
    numbers = list(done)
    ends = np.cumsum([done[number]["rows"] for number in numbers])
    read = conversation_reader(job.settings.project)
    samples = []
    for n in furthest(differences):
        index = int(np.searchsorted(ends, n, side="right"))
        place = n - int(ends[index]) + done[numbers[index]]["rows"]
        part = job.folder.part(numbers[index])
        kind = JsonlTable if job.folder.suffix == ".jsonl" else ParquetTable
        row = next(islice(kind(Path(part)).rows(), place, None))
        conversation = read(row)
        samples.append(
            BlockSample(
                part=part,
                row=place + 1,
                question=prompt_of(conversation, session, PromptCache(session)).question,
                response=answer_text(conversation, session),
                natural=str(row.values.get(BASE_RESPONSE) or ""),
                differences=by_column(job.columns, differences[n]),
            )
        )
    return tuple(samples)
