"""Several engines side by side (data parallel): each takes the next job when it has room.

vLLM's own data parallelism hands requests out in a process of its own and answers calls to workers
from one engine only; pvec needs every engine's accounts, so it keeps the engines apart. Each runs
in a process of its own with its share of the GPUs; here a thread per engine moves its traffic.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pvec.backends.vllm.flow import Done, Flow, Job
from pvec.errors import InputError


class Fleet:
    """Flows that share a stream of jobs; ``run`` and ``call`` as of one ``Flow``."""

    def __init__(self, flows: Sequence[Flow]) -> None:
        self.flows = tuple(flows)
        self._turn = threading.Lock()  # one stream at a time drives the engines

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Yield every job as it finishes on any engine; see ``Flow.run``."""
        if len(self.flows) == 1:
            yield from self.flows[0].run(jobs)
            return
        if not self._turn.acquire(blocking=False):
            raise InputError(
                "Engines side by side run one stream at a time: finish the first, or set "
                "backend.vllm.data_parallel to 1."
            )
        try:
            yield from self._run(jobs)
        finally:
            self._turn.release()

    @property
    def running(self) -> int:
        """How many jobs are in the engines."""
        return sum(flow.running for flow in self.flows)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a ``pvec_*`` method on every worker of every engine."""
        return [answer for flow in self.flows for answer in flow.call(method, *args)]

    def _run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        source = _Shared(jobs)
        results: queue.Queue[Done | BaseException | None] = queue.Queue()
        threads = [
            threading.Thread(target=_drive, args=(flow, source, results)) for flow in self.flows
        ]
        for thread in threads:
            thread.start()
        failure: BaseException | None = None
        running = len(threads)
        try:
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                elif isinstance(result, BaseException):
                    failure = failure or result
                    source.stopped = True
                else:
                    yield result
        finally:
            source.stopped = True
            for thread in threads:
                thread.join()
        if failure is not None:
            raise failure


class _Shared:
    """An iterable that several threads draw from; once ``stopped`` it is at its end."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.stopped = False
        self._source = iter(jobs)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Job]:
        while True:
            with self._lock:
                job = None if self.stopped else next(self._source, None)
            if job is None:
                return
            yield job


def _drive(flow: Flow, source: _Shared, results: queue.Queue[Done | BaseException | None]) -> None:
    """Run one engine; whatever goes wrong is raised in the caller's thread."""
    stream = flow.run(source)
    try:
        for done in stream:
            results.put(done)
            if source.stopped:
                break
    except BaseException as error:
        results.put(error)
    finally:
        stream.close()  # type: ignore[attr-defined]
        results.put(None)


@contextmanager
def gpus_of(replica: int, *, per_replica: int, replicas: int) -> Iterator[None]:
    """Show an engine that starts now its share of the GPUs."""
    if replicas == 1:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else [str(i) for i in range(replicas * per_replica)]
    mine = visible[replica * per_replica : (replica + 1) * per_replica]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
