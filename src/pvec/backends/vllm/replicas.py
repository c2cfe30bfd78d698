"""Several engines side by side (data parallel): each takes the next request when it has room.

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

from pvec.backends.vllm.client import EngineClient
from pvec.backends.vllm.requests import END, Drawn, EngineResult
from pvec.errors import InputError


class ReplicaPool:
    """Clients that share a stream of requests; ``run`` and ``call`` as of one ``EngineClient``."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self.clients = tuple(clients)
        self._turn = threading.Lock()  # one stream at a time drives the engines

    def run(self, requests: Iterable[Drawn]) -> Iterator[EngineResult]:
        """Yield every request as it finishes on any engine; see ``EngineClient.run``."""
        if len(self.clients) == 1:
            yield from self.clients[0].run(requests)
            return
        if not self._turn.acquire(blocking=False):
            raise InputError(
                "Engines side by side run one stream at a time: finish the first, or set "
                "backend.vllm.data_parallel_size to 1."
            )
        try:
            yield from self._run(requests)
        finally:
            self._turn.release()

    @property
    def running(self) -> int:
        """How many requests are in the engines."""
        return sum(client.running for client in self.clients)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a ``pvec_*`` method on every worker of every engine."""
        return [answer for client in self.clients for answer in client.call(method, *args)]

    def _run(self, requests: Iterable[Drawn]) -> Iterator[EngineResult]:
        source = _Shared(requests)
        results: queue.Queue[EngineResult | BaseException | None] = queue.Queue()
        threads = [
            threading.Thread(target=_drive, args=(client, source, results))
            for client in self.clients
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

    def __init__(self, requests: Iterable[Drawn]) -> None:
        self.stopped = False
        self._source = iter(requests)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Drawn]:
        while True:
            with self._lock:
                request = END if self.stopped else next(self._source, END)
            if request is END:
                return
            yield request


def _drive(
    client: EngineClient, source: _Shared, results: queue.Queue[EngineResult | BaseException | None]
) -> None:
    """Run one engine; whatever goes wrong is raised in the caller's thread."""
    stream = client.run(source)
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
    devices = visible[replica * per_replica : (replica + 1) * per_replica]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
