"""Pieces of work that are done once: each has a folder, a key, and a result that is kept as JSON.

A step's key covers its function's name, its arguments, the bundled model and the keys of the
steps it builds on, so that a changed setting does that step again and whatever follows from it,
and nothing else. It does not cover the code: after changing that, begin in another folder.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pvec.tiny

Result = dict[str, Any]
Work = Callable[..., Result]

RECORD = "step.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step: ``work(folder, **arguments)`` returns what is kept (plain JSON).

    ``after`` are the steps that must be done before; their results reach it as files.
    """

    folder: Path
    work: Work
    arguments: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[Step, ...] = ()

    @cached_property
    def key(self) -> str:
        """16 hex digits over everything that the result depends on."""
        parts = (
            _model(),
            self.work.__qualname__,
            json.dumps(self.arguments, sort_keys=True),
            *(step.key for step in self.after),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The last two parts of the folder: the seed and what is done."""
        return f"{self.folder.parent.name} {self.folder.name}"

    def result(self) -> Result | None:
        """Return what was kept under this key, or None."""
        record = _read(self.folder)
        return record["result"] if record.get("key") == self.key else None

    def run(self) -> Result:
        """Do the step and keep its result; a half-done one of the same key goes on."""
        if _read(self.folder).get("key") != self.key and self.folder.exists():
            shutil.rmtree(self.folder)  # made with other settings
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder, {"key": self.key, "result": None})
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.work(self.folder, **self.arguments)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        record = {"key": self.key, "arguments": dict(self.arguments), "seconds": seconds}
        _write(self.folder, {**record, "result": result})
        return result


def run_steps(steps: Sequence[Step], *, jobs: int, notify: Callable[[str], None]) -> int:
    """Do what is not done yet, ``jobs`` at a time, and return how many steps that were.

    An error stops everything after the steps in work; what is done stays done.
    """
    waiting = [step for step in steps if step.result() is None]
    total, count, running = len(waiting), 0, dict[Future[Result], Step]()
    if not waiting:
        return 0
    with _workers(jobs) as pool:
        while waiting or running:
            blocked = {id(one) for one in (*waiting, *running.values())}
            ready = [p for p in waiting if not any(id(one) in blocked for one in p.after)]
            for step in ready[: max(0, jobs - len(running))]:
                waiting.remove(step)
                running[pool.submit(step.run)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                future.result()
                count += 1
                notify(f"[{count:3}/{total}] {step.name}")
    return count


@contextmanager
def _workers(jobs: int) -> Iterator[Executor]:
    """Return processes of one thread each; they end with this one, however it ends."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # one core each
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _model() -> str:
    """Return a hash of the bundled model and judge."""
    digest = hashlib.sha256(pvec.__version__.encode())
    for path in sorted(Path(pvec.tiny.__file__).parent.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(folder: Path) -> Result:
    path = folder / RECORD
    if not path.is_file():
        return {}
    record: Result = json.loads(path.read_text(encoding="utf-8"))
    return record


def _write(folder: Path, record: Result) -> None:
    aside = folder / f"{RECORD}.new"
    aside.write_text(json.dumps(record, indent=1), encoding="utf-8")
    aside.replace(folder / RECORD)
