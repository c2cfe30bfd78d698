"""A pool's workers on threads of this process, which die when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pvec.backends.pool.members import WorkerDied
from pvec.backends.pool.worker import Worker


class ThreadHandle:
    """A worker on a thread. ``dies(method, args)`` tells whether a call is its last."""

    def __init__(self, dies: Callable[[str, tuple[Any, ...]], bool]) -> None:
        self.worker = Worker()
        self._dies = dies
        self._dead = False
        self._thread = ThreadPoolExecutor(1)

    def submit(self, method: str, *args: Any, **options: Any) -> Future[Any]:
        return self._thread.submit(self._call, method, args, options)

    def kill(self) -> None:
        self._dead = True
        self._thread.shutdown(wait=False)
        for number in list(self.worker._running):
            self.worker.stop(number)

    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._dead = self._dead or self._dies(method, args)
        if self._dead:
            raise WorkerDied("killed by the test")
        return getattr(self.worker, method)(*args, **options)


def never(_method: str, _args: tuple[Any, ...]) -> bool:
    return False
