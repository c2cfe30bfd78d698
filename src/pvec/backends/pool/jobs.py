"""The jobs of a worker: a method of its backend, fed with items, as numbered results."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pvec.backends.base import Arrivals, Backend

Method = Literal[
    "generate", "generate_and_capture", "stream", "capture", "continuation_logprobs",
    "answer_logprobs", "divergences", "map",
]  # fmt: skip

Numbered = tuple[Any, Any]
"""A key with an item, or with a result of the item of that key."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of a backend's method. ``options`` are its other arguments; ``key`` names the
    model. ``number`` is its own in the worker.
    """

    key: str
    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0

    @property
    def whole(self) -> bool:
        """Whether a worker refills its batch by itself, and so is given all that it can hold."""
        return self.method in ("generate", "generate_and_capture", "stream")


class Feed(Arrivals[Any]):
    """Items that the command sends while the job runs.

    Waiting for them hands the ``turn`` to compute, which the job holds, to other jobs.
    """

    def __init__(self, turn: threading.Lock) -> None:
        self._turn = turn
        self._items: deque[Numbered] = deque()
        self._arrived = threading.Condition()
        self._ended = False

    def put(self, items: Sequence[Numbered]) -> None:
        """Add items."""
        with self._arrived:
            self._items.extend(items)
            self._arrived.notify_all()

    def end(self) -> None:
        """Say that no items follow."""
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def take_numbered(self, *, wait: bool) -> list[Numbered] | None:
        """Return what ``take`` does, with keys."""
        if wait and not self._items and not self._ended:
            self._turn.release()
            try:
                with self._arrived:
                    self._arrived.wait_for(lambda: self._items or self._ended)
            finally:
                self._turn.acquire()
        with self._arrived:
            items = list(self._items)
            self._items.clear()
        return items if items or not self._ended else None

    def take(self, *, wait: bool) -> list[Any] | None:
        """Return the items that have arrived; see ``Arrivals.take``."""
        numbered = self.take_numbered(wait=wait)
        return None if numbered is None else [item for _, item in numbered]


def run_job(backend: Backend, job: Job, feed: Feed) -> Generator[Numbered]:
    """Yield the results of the items that the feed brings, each with its item's key."""
    run = _BY_CHUNK.get(job.method)
    if run is None:
        yield from _BY_ID[job.method](backend, feed, **job.options)
        return
    while (chunk := feed.take_numbered(wait=True)) is not None:
        keys = [key for key, _ in chunk]
        for index, result in run(backend, [item for _, item in chunk], **job.options):
            yield keys[index], result


def _generate(backend: Backend, feed: Feed) -> Iterator[Numbered]:
    return ((answer.id, answer) for answer in backend.generate(feed))


def _generate_and_capture(backend: Backend, feed: Feed, **options: Any) -> Iterator[Numbered]:
    done = backend.generate_and_capture(feed, **options)
    return ((answer.id, (answer, means)) for answer, means in done)


def _stream(backend: Backend, feed: Feed) -> Iterator[Numbered]:
    while (requests := feed.take(wait=True)) is not None:
        yield from ((chunk.id, chunk) for chunk in backend.stream(requests))


_BY_ID: Mapping[str, Callable[..., Iterator[Numbered]]] = {
    "generate": _generate,
    "generate_and_capture": _generate_and_capture,
    "stream": _stream,
}
"""Methods whose results carry their items' ids, which are the keys."""


def _capture(backend: Backend, sequences: Sequence[Any], **options: Any) -> Iterator[Numbered]:
    index = {sequence.id: place for place, sequence in enumerate(sequences)}
    return ((index[means.id], means) for means in backend.capture(sequences, **options))


def _continuations(
    backend: Backend, prompts: Sequence[Any], *, continuations: Sequence[Any]
) -> Iterator[Numbered]:
    return backend.continuation_logprobs(prompts, continuations)


def _answers(backend: Backend, pairs: Sequence[Any]) -> Iterator[Numbered]:
    return backend.answer_logprobs(pairs)


def _divergences(
    backend: Backend, variants: Sequence[Any], *, reference: Any
) -> Iterator[Numbered]:
    index = {variant.id: place for place, variant in enumerate(variants)}
    return ((index[d.id], d) for d in backend.divergences(reference, variants))


def _map(
    backend: Backend, items: Sequence[Any], *, function: Callable[[Backend, Any], Any]
) -> Iterator[Numbered]:
    return ((place, function(backend, item)) for place, item in enumerate(items))


_BY_CHUNK: Mapping[str, Callable[..., Iterator[Numbered]]] = {
    "capture": _capture,
    "continuation_logprobs": _continuations,
    "answer_logprobs": _answers,
    "divergences": _divergences,
    "map": _map,
}
"""Methods that take what has arrived at once; their results carry its place."""
