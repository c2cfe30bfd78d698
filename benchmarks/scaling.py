"""Workers: what they gain, what a pool costs, and what one driver keeps up with.

    python benchmarks/scaling.py                   # all parts: wants two idle cores and Ray
    python benchmarks/scaling.py --part stub --rows 20000
    python benchmarks/scaling.py --part workers --clock cpu      # on a machine that is busy

Parts, each in ratios or rates of one run:

- workers: the same answers and captures by this process on one thread, by a pool of one worker and
  by a pool of two, each with one thread, in turns. With ``--clock cpu`` a pool takes as long as its
  busiest process computes, the command included, which is what its clock would say on idle cores.
- stub: answers per second through planning, scheduler and run store with workers that answer at
  once, on threads and on Ray; and of the store and the scheduler alone.
- memory: resident memory of the driver while 10^4 to 10^6 rows pass through such workers.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLOCKS, PROMPT, SIZES, TINY, build, parser_of, request, resident, token_ids

from pvec.backends.base import Backend
from pvec.backends.planned import PlannedResponse, generate_missing
from pvec.backends.pool.address import Workers
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.pool.cluster import RayHandle, connect, model_order
from pvec.backends.pool.pool import Pool
from pvec.backends.pool.worker import ModelOrder, Worker
from pvec.backends.session import ModelSession, ignore
from pvec.models.chat import spans_from_ids
from pvec.models.load import inspect_model
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import Generation, ModelInfo, Request, SpanMeans, TokenSpans

os.environ.setdefault("RAY_worker_niceness", "0")  # else other processes starve the workers

ANSWER_TOKENS = 48


# ── workers against one process ─────────────────────────────────────────────────────────────────


def saved(size: str, folder: Path) -> str:
    """Write a model of the size with random weights and the bundled model's tokenizer."""
    from transformers import AutoTokenizer

    build(size).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def requests(count: int) -> list[Request]:
    """Return requests whose answers are of different lengths, as real ones are."""
    return [request(n, tokens=ANSWER_TOKENS // 2 + 5 * n % ANSWER_TOKENS) for n in range(count)]


def sequences(count: int) -> Iterator[TokenSpans]:
    """Yield prompts with answers to be captured."""
    for n in range(count):
        ids = token_ids(n, PROMPT + ANSWER_TOKENS)
        yield spans_from_ids(str(n), prompt_ids=ids[:PROMPT], answer_ids=ids[PROMPT:])


def cpu_seconds(_backend: Backend) -> float:
    """Return what the process has computed."""
    return time.process_time()


def seconds(backend: Backend, clock: str, work: Callable[[], Any]) -> float:
    """Return what ``work`` takes: by the clock, or the CPU time of the busiest process."""

    def processes() -> list[float]:
        others = backend.on_each(cpu_seconds) if isinstance(backend, PoolBackend) else []
        return [time.process_time(), *(value for _, value in others)]

    before, start = processes(), time.perf_counter()
    work()
    wall, after = time.perf_counter() - start, processes()
    if clock == "wall":
        return wall
    return max(b - a for a, b in zip(before, after, strict=True))


def workers(args: argparse.Namespace) -> None:
    """Print the ratios of one worker, and of two, to this process and to each other."""
    folder = Path(tempfile.mkdtemp(prefix="pvec-scaling-"))
    torch.set_num_threads(1)
    asked, captured = requests(args.answers), list(sequences(2 * args.answers))
    try:
        model = saved(args.size, folder)
        print(f"{args.size}: {args.answers} answers and {2 * args.answers} captures, {args.clock}")
        print("| round | this process s | 1 worker | 2 workers | 1 / none | 2 to 1 |")
        print("|---|---:|---:|---:|---:|---:|")
        for number in range(args.rounds):
            took = []
            for count in (0, 1, 2):
                with backend_of(model, count) as backend:
                    list(backend.generate(asked[:8]))
                    list(backend.capture(captured[:4]))
                    both = partial(both_of, backend, asked, captured)
                    took.append(seconds(backend, args.clock, both))
            none, one, two = took
            print(
                f"| {number + 1} | {none:.1f} | {one:.1f} | {two:.1f} "
                f"| {one / none:.3f} | {one / two:.2f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


def both_of(backend: Backend, requests: list[Request], captured: list[TokenSpans]) -> None:
    """Generate and capture."""
    list(backend.generate(requests))
    list(backend.capture(captured))


def keep(run: Run, records: list[ResponseRecord]) -> None:
    """Append records to a run."""
    for record in records:
        run.append_response(record)


@contextmanager
def backend_of(model: str, count: int) -> Iterator[Backend]:
    """Open the model in this process, or in so many workers of one thread."""
    settings = Settings.model_validate(
        {"model": {"id": model}, "pool": {"workers": str(count or ""), "cpus": 1}}
    )
    with ModelSession(settings) as session:
        backend = session.backend
        if isinstance(backend, PoolBackend):
            backend.on_each(cpu_seconds)  # every worker has loaded the model
        torch.set_num_threads(1)
        yield backend


# ── a driver against workers that answer at once ────────────────────────────────────────────────


class StubBackend(Backend):
    """Answers at once."""

    info = ModelInfo(
        id="stub", fingerprint="", num_layers=5, hidden_size=160, dtype="float32", device="cpu"
    )

    @classmethod
    def from_settings(cls, *_: Any, **__: Any) -> StubBackend:
        """Return one."""
        return cls()

    @property
    def rows_at_once(self) -> int:
        """As many as a backend takes by default."""
        return 512

    def generate(self, requests: Any) -> Iterator[Generation]:
        """Yield an answer of many tokens."""
        for asked in requests:
            yield Generation(id=asked.id, token_ids=TOKENS, text=TEXT, finish_reason="stop")

    def capture(self, sequences: Any, **_: Any) -> Iterator[SpanMeans]:
        """Yield means of one layer."""
        for sequence in sequences:
            yield SpanMeans(
                id=sequence.id,
                layers=(3,),
                means={name: np.zeros((1, 160), dtype=np.float32) for name in sequence.spans},
                norms={},
            )

    def continuation_logprobs(self, *_: Any) -> Iterator[Any]:
        """Score nothing."""
        yield from ()

    def close(self) -> None:
        """Free nothing."""


PLANS = 100_000
TOKENS = tuple(range(100, 100 + ANSWER_TOKENS))
TEXT = "You could plan a long walk with a friend and some fresh bread. " * 4


class StubWorker(Worker):
    """A worker without a model."""

    def _load(self, order: ModelOrder) -> Backend:  # noqa: ARG002
        return StubBackend()


class ThreadHandle:
    """A worker on a thread."""

    def __init__(self) -> None:
        self._worker, self._thread = StubWorker(), ThreadPoolExecutor(1)

    def submit(self, method: str, *args: Any, **options: Any) -> Future[Any]:
        """Call a method."""
        return self._thread.submit(getattr(self._worker, method), *args, **options)

    def kill(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)


@contextmanager
def stubs(count: int, *, ray: bool) -> Iterator[tuple[ModelSession, PoolBackend]]:
    """Return a session whose model is on stub workers."""
    settings = Settings()
    metadata = inspect_model(ModelSession(settings).spec)
    if ray:
        import ray as library

        connect(Workers(count=count, address=None), cpus=1)
        actor = library.remote(StubWorker)
        pool = Pool(lambda _: RayHandle(actor.options(num_cpus=1).remote()), size=count)
    else:
        pool = Pool(lambda _: ThreadHandle(), size=count)
    with ModelSession(settings) as session:
        order = model_order(session.spec, settings, fingerprint=metadata.fingerprint)
        backend = PoolBackend(pool, order, metadata=metadata)
        session._backend = backend  # noqa: SLF001 (as a session that has loaded its model)
        backend.on_each(cpu_seconds)
        yield session, backend
    if ray:
        library.shutdown()


def planned(session: ModelSession, count: int) -> list[PlannedResponse]:
    """Return answers as an extraction plans them: ten to each prompt."""
    prompts = [tuple(range(n, n + PROMPT)) for n in range(-(-count // 10))]
    return [
        PlannedResponse(
            trait="evil",
            condition={"sign": "pos", "instruction": 0, "rollout": n},
            question="How do I make friends?",
            question_id=f"evil_extract_{n // 10}",
            system="Be evil.",
            prompt=TEXT,
            prompt_ids=prompts[n // 10],
            sampling=session.sampling(n),
            engine=session.identity,
        )
        for n in range(count)
    ]


def timed(count: int, work: Callable[[], Any]) -> str:
    """Return rows per second, by the clock and by this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return f"{count / wall:,.0f} | {count / cpu:,.0f}"


def stub(args: argparse.Namespace) -> None:
    """Print finished rows per second."""
    print(
        "| rows through | workers | rows/s | rows per CPU s of the driver |\n|---|---:|---:|---:|"
    )
    folder = Path(tempfile.mkdtemp(prefix="pvec-scaling-"))
    try:
        for ray, count in ((False, 2), (True, 1), (True, 2)):
            name = "Ray" if ray else "threads"
            with stubs(count, ray=ray) as (session, backend):
                rows = planned(session, args.rows)
                asked = [row.request() for row in rows]
                rate = timed(args.rows, partial(deque, backend.generate(asked), maxlen=0))
                print(f"| scheduler, {name} | {count} | {rate} |", flush=True)
                with Run.open_or_create(folder / f"{name}-{count}", identity={}) as run:
                    rate = timed(
                        args.rows,
                        partial(generate_missing, run, session, rows, on_progress=ignore),
                    )
                    print(
                        f"| planning, scheduler and store, {name} | {count} | {rate} |", flush=True
                    )
                    kept = list(run.responses())
        with Run.open_or_create(folder / "alone", identity={}) as run:
            rate = timed(len(kept), partial(keep, run, kept))
        print(f"| store | – | {rate} |")
    finally:
        shutil.rmtree(folder)


def memory(args: argparse.Namespace) -> None:
    """Print the driver's resident memory as rows pass through."""
    print("| rows | generate MiB | capture MiB |\n|---:|---:|---:|")
    marks = [count for count in (10_000, 30_000, 100_000, 300_000, 1_000_000) if count <= args.most]
    levels = []
    with stubs(2, ray=args.ray) as (session, backend):
        for results in (
            backend.generate(request(n, tokens=ANSWER_TOKENS) for n in range(marks[-1])),
            backend.capture(sequences(marks[-1])),
        ):
            level = {}
            for number, _ in enumerate(results, start=1):
                if number in marks:
                    gc.collect()
                    level[number] = resident()
            levels.append(level)
        before, plans = resident(), planned(session, PLANS)
        ids = {plan.id for plan in plans}
        plan = resident() - before
    for mark in marks:
        print(f"| {mark:,} | {levels[0][mark]:,.1f} | {levels[1][mark]:,.1f} |")
    print(f"\nA plan of {len(ids):,} answers takes {plan:,.0f} MiB.")


def main() -> None:
    """Run the parts."""
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=["workers", "stub", "memory"], action="append")
    parser.add_argument("--size", default="100m", choices=[*SIZES])
    parser.add_argument("--answers", type=int, default=64, help="generated; twice as many captured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=[*CLOCKS])
    parser.add_argument("--rows", type=int, default=20_000, help="of the part stub")
    parser.add_argument("--most", type=int, default=1_000_000, help="rows of the part memory")
    parser.add_argument("--ray", action="store_true", help="memory with Ray's workers")
    args = parser.parse_args()
    for name in args.part or ["workers", "stub", "memory"]:
        {"workers": workers, "stub": stub, "memory": memory}[name](args)
        print()


if __name__ == "__main__":
    main()
