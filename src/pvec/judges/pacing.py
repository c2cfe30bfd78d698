"""How fast a server may be asked: concurrency that adapts, and waits between tries."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often a request is tried before it counts as failed. Times in seconds."""

    tries: int = 8
    """Server errors, time-outs, dropped connections and garbled replies before giving up."""

    first_wait: float = 0.5
    """Wait after the first failure; it doubles with every further one."""

    longest_wait: float = 30.0
    timeout: float = 60.0
    """Time one reply may take."""

    rate_limit: float = 600.0
    """Total time a request may spend waiting for a rate limit, which costs no tries."""

    jitter: random.Random = field(default_factory=random.Random, repr=False, compare=False)

    def wait(self, failures: int) -> float:
        """Return the wait after ``failures`` (>= 1) failures: exponential, with jitter."""
        longest = min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 30))
        return longest * self.jitter.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Return the seconds that ``Retry-After`` asks for: milliseconds, seconds or an HTTP date."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000.0
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None or value is None:
        return seconds
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.astimezone(UTC) - (now or datetime.now(UTC))).total_seconds())


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else -1.0
    except ValueError:
        return None
    return value if 0.0 <= value < float("inf") else None


class Pacer:
    """Requests in flight: one more per round of successes, half as many when overloaded.

    Belongs to one event loop. ``limit`` is the current ceiling, between 1 and ``most``.
    """

    def __init__(self, *, start: int = 8, most: int = 64) -> None:
        self.limit = float(max(1, min(start, most)))
        self.most = most
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._resume_at = 0.0
        self._last_cut = 0.0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End every wait at once, for good: nothing more is going to be sent."""
        self._stopped.set()
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)
        self._waiting.clear()

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until ``stop``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait for a turn and hold it; yields the time at which it began."""
        await self._enter()
        try:
            yield time.monotonic()
        finally:
            self._in_flight -= 1
            self._wake()

    def succeeded(self) -> None:
        """Note a reply: the limit grows by one per ``limit`` replies."""
        self.limit = min(float(self.most), self.limit + 1.0 / self.limit)
        self._wake()

    def overloaded(self, *, began: float, pause: float) -> None:
        """Note a 429 for a request that ``began`` then: slow down, and send nothing for ``pause``.

        Requests that left before the last cut say nothing new: one burst halves the limit once.
        """
        now = time.monotonic()
        if began >= self._last_cut:
            self.limit = max(1.0, self.limit / 2.0)
            self._last_cut = now
        self._resume_at = max(self._resume_at, now + pause)

    async def _enter(self) -> None:
        while not self._stopped.is_set():
            pause = self._resume_at - time.monotonic()
            if pause > 0:
                await self.sleep(pause)
            elif self._in_flight >= int(self.limit):
                turn = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                await turn
            else:
                break
        self._in_flight += 1

    def _wake(self) -> None:
        room = int(self.limit) - self._in_flight
        while room > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # a cancelled one needs no turn
                turn.set_result(None)
                room -= 1
