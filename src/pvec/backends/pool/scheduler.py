"""Who does what: items go to workers, results come back, and what a dead worker held goes on.

Every worker is given a contiguous share at first, since neighbours share prompts, and more as it
finishes. After a death, or when memory ran out with a single row, what the worker held is run in
groups of half that size; so a row that no worker survives or has room for ends up alone, and is the
only one that fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from pvec.backends.pool.jobs import Job, Numbered
from pvec.backends.pool.members import Handle, Held, Member, WorkerDied
from pvec.backends.pool.pool import Pool
from pvec.backends.pool.worker import Exchange
from pvec.errors import InputError, ModelError, ModelMemoryError

_WAIT = 1.0
"""Seconds that an exchange waits for a result: so late at most does a worker get more items."""

_LOOK_AHEAD = 512
"""Items drawn before a worker has said how many it takes."""


@dataclass(eq=False, kw_only=True)
class Item(Held):
    """An item that somebody must do."""

    key: Any
    payload: Any


@dataclass(eq=False, kw_only=True)
class _Part:
    """A worker's part of the work: a ``job`` of its own, in the process of ``handle``.

    ``closed``: it was told that no items follow; ``ended``: it has said that it is through.
    """

    member: Member
    handle: Handle
    job: Job
    holds: dict[Any, Item] = field(default_factory=dict)
    exchanging: Future[Exchange] | None = None
    progress: Mapping[str, float] = field(default_factory=dict)
    closed: bool = False
    ended: bool = False


Failed = Callable[[Item, str], Any]
"""Returns the result of an item that cannot be done, for a reason; or raises."""


class Schedule:
    """One job on the workers of a pool.

    ``items`` are drawn as there is room for them. ``retries``: how many workers may fail
    that hold an item alone. ``unfinished`` tells results after which more of the same item follow.
    ``on_progress`` receives the number of items done, and the sums over the workers of what their
    backends report.
    """

    def __init__(
        self,
        pool: Pool,
        job: Job,
        items: Iterable[Numbered],
        *,
        retries: int,
        failed: Failed,
        unfinished: Callable[[Any], bool] = lambda _: False,
        on_progress: Callable[[int, Mapping[str, float]], None] = lambda _done, _extra: None,
    ) -> None:
        self._pool = pool
        self._job = job
        self._source = iter(items)
        self._drawn_all = False
        self._waiting: deque[Item] = deque()
        self._retries = retries
        self._failed = failed
        self._unfinished = unfinished
        self._on_progress = on_progress
        self._done = 0
        self._parts: dict[int, _Part] = {}

    def run(self) -> Iterator[Numbered]:
        """Yield results with their items' keys as they come; raises what a backend raises."""
        try:
            while True:
                ready = self._pool.ready(self._job.key)
                yield from self._missed()
                self._draw(ready)
                for member in ready:
                    self._give(member)
                if self._all_done():
                    return
                yield from self._collect()
        finally:
            self._stop()

    def _all_done(self) -> bool:
        """Whether every item is done, and every worker has said that nothing was wrong."""
        items = self._waiting or any(part.holds for part in self._parts.values())
        if items or not self._drawn_all:
            return False
        return all(part.ended for part in self._parts.values())

    def _draw(self, ready: list[Member]) -> None:
        """Draw as many items as the workers can take."""
        room = sum(self._window(member) for member in ready) or _LOOK_AHEAD
        room -= len(self._waiting)
        if room <= 0 or self._drawn_all:
            return
        drawn = [Item(key=key, payload=payload) for key, payload in islice(self._source, room)]
        self._drawn_all = len(drawn) < room
        self._waiting.extend(drawn)

    def _give(self, member: Member) -> None:
        """Hand items to a worker and ask what it has done, unless it is asked already."""
        part = self._parts.get(member.number)
        if part is not None and part.ended:  # what came back from a dead worker is another job
            part = None
        if part is not None and part.exchanging is not None:
            return
        items = [] if part and part.closed else self._share(member, part.holds if part else {})
        if part is None:
            if not items:
                return
            job = replace(self._job, number=self._pool.next_job())
            part = _Part(member=member, handle=member.handle, job=job)
            self._parts[member.number] = part
        for item in items:
            if item.key in part.holds:
                raise InputError(f"Two items are called {item.key!r}: give each an id of its own.")
            part.holds[item.key] = item
        part.closed = part.closed or (self._drawn_all and not self._waiting)
        if part.holds or part.closed:
            pairs = [(item.key, item.payload) for item in items]
            part.exchanging = part.handle.submit(
                "exchange", part.job, pairs, end=part.closed, wait=_WAIT
            )

    def _share(self, member: Member, holds: Mapping[Any, Item]) -> list[Item]:
        """Take from the queue what a worker that ``holds`` items may have now."""
        fair = -(-(len(self._waiting) + self._held()) // len(self._pool.members))
        if not self._job.whole:
            fair = -(-fair // 2)  # half at once: workers may be of different speed
        limits = [self._window(member), max(fair, 1)]
        limits += [item.among for item in holds.values() if item.among is not None]
        taken: list[Item] = []
        while self._waiting:
            among = self._waiting[0].among
            limits += [] if among is None else [among]
            if len(holds) + len(taken) >= min(limits):
                break
            taken.append(self._waiting.popleft())
        return taken

    def _held(self) -> int:
        return sum(len(part.holds) for part in self._parts.values())

    def _window(self, member: Member) -> int:
        return member.window(self._job.key, whole=self._job.whole)

    def _collect(self) -> Iterator[Numbered]:
        """Wait until a worker answers, and yield what it has done."""
        asked = {p.exchanging: p for p in self._parts.values() if p.exchanging is not None}
        futures: list[Future[Any]] = [*asked, *self._pool.opening]
        answered, _ = wait(futures, timeout=_WAIT, return_when=FIRST_COMPLETED)
        for future in answered:
            part = asked.get(future)
            if part is None:
                continue
            part.exchanging = None
            try:
                exchange = future.result()
            except WorkerDied as death:
                yield from self._lost(part, str(death))
                continue
            yield from self._take_in(part, exchange)

    def _take_in(self, part: _Part, exchange: Exchange) -> Iterator[Numbered]:
        for note in exchange.notes:
            self._pool.notify(f"{part.member.label}: {note}")
        part.progress, part.ended = exchange.progress, exchange.ended
        if exchange.results:
            self._pool.progressed(part.member, len(exchange.results))
        for key, result in exchange.results:
            if not self._unfinished(result):
                del part.holds[key]
                self._done += 1
            yield key, result
        sums = {"workers": float(len(self._parts))}
        for each in self._parts.values():
            for name, value in each.progress.items():
                sums[name] = sums.get(name, 0.0) + value
        self._on_progress(self._done, sums)
        if isinstance(exchange.error, ModelMemoryError):
            yield from self._again(part, str(exchange.error))
        elif exchange.error is not None:
            raise exchange.error
        elif part.ended and part.holds:
            raise ModelError(
                f"{part.member.label} returned nothing for {len(part.holds)} of its items: run the "
                f"same command again, and report this as a bug if it happens again."
            )

    def _missed(self) -> Iterator[Numbered]:
        """Give up parts whose worker was replaced while another job used it."""
        for part in list(self._parts.values()):
            if part.member.handle is not part.handle and part.exchanging is None:
                yield from self._lost(part, "its process ended")

    def _lost(self, part: _Part, reason: str) -> Iterator[Numbered]:
        """Let others do what a dead worker held."""
        self._pool.lost(part.member, part.handle, reason, held=len(part.holds))
        yield from self._again(part, reason)

    def _again(self, part: _Part, reason: str) -> Iterator[Numbered]:
        """Run what a worker failed at in smaller groups; what it failed at alone has failed."""
        held = list(part.holds.values())
        del self._parts[part.member.number]
        for item in held:
            item.outlived(len(held))
        self._waiting.extendleft(item for item in reversed(held) if item.deaths < self._retries)
        for item in held:
            if item.deaths >= self._retries:
                self._done += 1
                why = f"{item.deaths} workers failed that ran nothing else (last: {reason})"
                yield item.key, self._failed(item, why)

    def _stop(self) -> None:
        """Let the workers forget the job; what they still compute of it is thrown away."""
        for part in self._parts.values():
            with suppress(WorkerDied):
                part.handle.submit("stop", part.job.number)
