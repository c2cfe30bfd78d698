"""Between ``inspect_ai`` and pvec: settings, messages, errors, and samples answered together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ChatMessage

from pvec.errors import InputError, PvecError
from pvec.settings import Settings, load_dotenv, resolve
from pvec.types import Message

Item = TypeVar("Item")
Result = TypeVar("Result")

_GATHER_SECONDS = 0.02
"""How long the first of a batch waits for others: little beside an answer's time."""


@contextmanager
def prerequisites() -> Iterator[None]:
    """Turn pvec's errors into those that ``inspect`` shows as a sentence, without a traceback."""
    try:
        yield
    except PvecError as error:
        raise PrerequisiteError(str(error)) from None


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Return the settings of a task: what its arguments give, by dotted names, over the usual."""
    return resolve(given, dotenv=load_dotenv()).settings


def texts(value: Any) -> tuple[str, ...]:
    """Return an argument as texts: absent, one, or a list."""
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def spoken(message: ChatMessage) -> Message:
    """Return a message as pvec's parts take it, without reasoning. Raises ``InputError`` for one
    with tools or with anything but text.
    """
    content = message.content
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise InputError("pvec does not support 'tools' here: use pvec-serve on vLLM for them.")
    if not isinstance(content, str) and any(
        part.type not in ("text", "reasoning") for part in content
    ):
        raise InputError("pvec reads texts only: leave images, sound and files out.")
    return {"role": message.role, "content": message.text}


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
