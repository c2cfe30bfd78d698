"""``--engine ray``: a file that outgrows a machine, block by block on Ray Data's actor pool.

Ray schedules the list of blocks, replaces workers that die and gives their blocks to others. A
worker reads its block, works on it with a model of its own, and writes the block's part file.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pvec.backends.pool.address import Workers
from pvec.backends.pool.cluster import check_workers, connect, worker_count, worker_share
from pvec.backends.session import ModelSession, Notify
from pvec.data.blocks import Block, Blocks, BlockTable, list_blocks
from pvec.data.conversations import Conversation
from pvec.data.spans import TemplateCheck
from pvec.data.storage import location, url_of
from pvec.data.table import BadRow, Row
from pvec.errors import InputError, ModelError, PvecError, install_command
from pvec.projection.block_folder import BlockFolder, Part
from pvec.projection.inputs import Source, conversation_reader
from pvec.runs.responses import Json, stable_hash
from pvec.settings import Settings
from pvec.types import OutputOptions, Progress

_MIB = 2**20

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class BlockJob(ABC):
    """What is done with every block. It travels to the workers, so it holds no model."""

    settings: Settings
    folder: BlockFolder
    skip_bad: bool

    @abstractmethod
    def open(self, session: ModelSession) -> Callable[[Block], Part]:
        """Return what a worker with this model does with a block."""

    def rows(
        self, block: Block, session: ModelSession
    ) -> tuple[BlockTable, list[tuple[Row, Conversation]], int]:
        """Return a block's table, its good rows, and how many are left out.

        Raises ``InputError`` that names file and line of a bad row, unless they may be left out.
        """
        table = block.open()
        check = TemplateCheck(session.metadata.tokenizer, turns=self.settings.project.turns)
        reader = conversation_reader(self.settings.project)
        source = Source(table=table, conversation=reader).checked(check)
        good, bad = [], 0
        for row in source.read():
            if isinstance(row, BadRow):
                self.refuse(table, row.line, row.reason)
                bad += 1
            else:
                good.append(row)
        return table, good, bad

    def refuse(self, table: BlockTable, line: int, reason: str) -> None:
        """Raise ``InputError`` for a bad row, unless such rows are left out."""
        if not self.skip_bad:
            raise InputError(
                f"{table.block.file}:{table.rows_before() + line} {reason.removesuffix('.')}. "
                f"Correct it and run the same command again, or leave such rows out: --skip-bad."
            )


class BlockWorker:
    """One model, and blocks for it. Ray makes one per worker."""

    def __init__(self, job: BlockJob) -> None:
        self._job = job
        self._work: Callable[[Block], Part] | None = None

    def __call__(self, item: Mapping[str, str]) -> dict[str, str]:
        """Do a block and write its part; the reply says what was counted, or what is wrong."""
        block = Block(**json.loads(item["block"]))
        reply: dict[str, Any] = {"number": block.number}
        reply["worker"] = f"{platform.node()}, process {os.getpid()}"
        try:
            if self._work is None:
                self._work = self._job.open(ModelSession(self._job.settings))
            part = self._work(block)
            self._job.folder.keep(block.number, part)
            reply["counts"] = part.counts
        except PvecError as error:
            reply |= {"error": str(error), "kind": type(error).__name__}
        return {"reply": json.dumps(reply)}


Replies = Generator[dict[str, Any], None, None]
Execute = Callable[[BlockJob, Sequence[Block], Workers], Replies]
"""Does blocks, and yields the reply to each as it is done."""


def check_options(settings: Settings, output: OutputOptions, execute: Execute | None) -> Workers:
    """Return the workers to use. Raises ``InputError`` for what cannot go by block."""
    if output.tokens:
        raise InputError("--tokens has no effect with --engine ray: project the file here.")
    if output.in_place:
        raise InputError("--in-place has no effect here: --engine ray writes a folder of files.")
    one = Workers(count=1, address=None)
    if execute is not None:
        return one
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"--engine ray needs Ray: {install_command('ray')}.")
    return check_workers(settings) or one


def worker_settings(settings: Settings) -> Settings:
    """Return the settings of a worker, which runs its model itself; keys of judges stay here."""
    return Settings(
        model=settings.model,
        backend=settings.backend,
        pool=settings.pool.model_copy(update={"workers": ""}),
        generation=settings.generation,
        project=settings.project,
    )


def open_blocks(source: str, settings: Settings, *, notify: Notify) -> Blocks:
    """Divide the input into blocks. Raises ``InputError`` as ``list_blocks`` does."""
    blocks = list_blocks(source, size=max(1, int(settings.project.block_mb * _MIB)))
    if blocks.ignored:
        notify(f"{source}: {blocks.ignored} files are no .parquet or .jsonl and are not read")
    return blocks


def output_place(source: str, output: OutputOptions, *, ending: str) -> str:
    """Return the folder of the parts. Raises ``InputError`` for a place that cannot be."""
    if output.out is None and url_of(source):
        raise InputError(f"Say where the parts go: --out FOLDER, or a URL such as {source}.out.")
    place = location(source)
    default = f"{place.removesuffix(Path(place).suffix)}.{ending}"
    target = location(output.out) if output.out else default
    if target.startswith("hf://"):
        raise InputError(
            "The hub takes no part files one by one: give a folder or a store as --out, and upload "
            "it with `hf upload`."
        )
    if f"{target}/".startswith(f"{place.rstrip('/')}/"):
        raise InputError(f"{target} is in the input itself: give another --out.")
    return target


def identity_of(
    blocks: Blocks, session: ModelSession, settings: Settings, **further: Any
) -> dict[str, Any]:
    """Return what tells a job's parts from another's: parts differ where one of these does."""
    files: list[Json] = [[file.path, file.size, file.version] for file in blocks.files]
    return {
        "input": {"files": len(files), "hash": stable_hash({"files": files})},
        "block size": settings.project.block_mb,
        "model": session.identity,
        "thinking": session.thinking,
        **further,
    }


def run_blocks(
    job: BlockJob,
    blocks: Sequence[Block],
    workers: Workers,
    *,
    stage: str,
    notify: Notify,
    on_progress: OnProgress,
    execute: Execute | None = None,
) -> tuple[dict[int, dict[str, Any]], int]:
    """Do the blocks that the folder lacks. Return every block's counts, and how many were there.

    Raises the first ``PvecError`` that a worker met; what is done stays.
    """
    done = {n: counts for n, counts in job.folder.done().items() if n < len(blocks)}
    before = len(done)
    rows_before = sum(int(counts["rows"]) for counts in done.values())
    if before:
        notify(f"{before:,} of {len(blocks):,} blocks ({rows_before:,} rows) were done before")
    rows, first = 0, (0.0, 0)  # when the first block was done, and its rows

    def report() -> None:
        seconds = time.monotonic() - first[0]
        rate = f", {(rows - first[1]) / seconds:,.0f} rows/s" if rows > first[1] else ""
        on_progress(
            Progress(
                stage=stage, done=len(done), total=len(blocks), unit="blocks",
                detail=f"{rows_before + rows:,} rows{rate}",
            )
        )  # fmt: skip

    todo = [block for block in blocks if block.number not in done]
    report()
    seen: set[str] = set()
    if not todo:
        return dict(sorted(done.items())), before
    with closing((execute or on_ray)(job, todo, workers)) as replies:
        for reply in replies:
            if "error" in reply:
                raise _ERRORS.get(reply["kind"], PvecError)(reply["error"])
            if reply["worker"] not in seen:
                seen.add(reply["worker"])
                notify(f"worker {len(seen)} is at work ({reply['worker']})")
            done[reply["number"]] = reply["counts"]
            rows += int(reply["counts"]["rows"])
            first = first if first[1] else (time.monotonic(), rows)
            report()
    return dict(sorted(done.items())), before


_ERRORS = {kind.__name__: kind for kind in PvecError.__subclasses__()}


def on_ray(job: BlockJob, blocks: Sequence[Block], workers: Workers) -> Replies:
    """Do blocks on the workers of a Ray cluster, and yield the reply to each as it is done.

    Raises ``ModelError`` where workers cannot start or die again and again.
    """
    import ray
    import ray.data

    started = connect(workers, cpus=job.settings.pool.cpus)
    share = worker_share(job.settings, workers)
    count = worker_count(workers, share)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    warnings.filterwarnings("ignore", message=".*ray_remote_args")  # there is no other way yet
    items = [{"block": json.dumps(asdict(block))} for block in blocks]
    try:
        replies = ray.data.from_items(items, override_num_blocks=len(items)).map(
            BlockWorker,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=min(count, len(items))),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_task_retries=job.settings.pool.retries,
        )
        for row in replies.iter_rows():
            yield json.loads(row["reply"])
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ModelError(
            f"The workers stopped ({reason[0]}): see Ray's log, then run the same command again to "
            f"go on."
        ) from error
    finally:
        if started:
            ray.shutdown()
