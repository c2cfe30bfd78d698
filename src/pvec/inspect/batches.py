"""What concurrent samples ask for, done together by one thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_GATHER_SECONDS = 0.02
"""How long the first of a batch waits for others: little beside an answer's time."""


class Batches(Generic[Item, Result]):
    """Calls ``run`` in a thread with all that was asked for since its last call.

    ``run`` yields ``(place, result)`` as results come. What it raises, everybody gets who has no
    result yet.
    """

    def __init__(self, run: Callable[[Sequence[Item]], Iterator[tuple[int, Result]]]) -> None:
        self._run = run
        self._queue: SimpleQueue[tuple[Item, Future[Result]]] = SimpleQueue()
        self._thread: Thread | None = None

    async def __call__(self, item: Item) -> Result:
        """Return the result for ``item``."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="pvec-inspect", daemon=True)
            self._thread.start()
        future: Future[Result] = Future()
        self._queue.put((item, future))
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            time.sleep(_GATHER_SECONDS)
            try:
                while True:
                    batch.append(self._queue.get_nowait())
            except Empty:
                pass
            batch = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
            futures = [future for _, future in batch]
            try:
                for place, result in self._run([item for item, _ in batch]):
                    futures[place].set_result(result)
            except BaseException as error:  # it belongs to those who wait
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
