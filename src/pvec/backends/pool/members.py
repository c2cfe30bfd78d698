"""The workers of a pool as the command sees them: where each runs, what it has loaded and holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from pvec.backends.pool.worker import Opened


class WorkerDied(Exception):  # noqa: N818 (it is an event, not a mistake)
    """A worker's process, or its machine, is gone. The message is the reason in a few words."""


class Handle(Protocol):
    """A ``Worker`` somewhere. Futures raise ``WorkerDied`` when it is gone."""

    def submit(self, method: str, *args: Any, **options: Any) -> Future[Any]:
        """Call a method of the worker; calls of one worker run in their order."""

    def kill(self) -> None:
        """End the worker's process."""


@dataclass(eq=False, kw_only=True)
class Held:
    """Something that a worker holds, and what the failures of workers say of it.

    A worker fails when it dies, or has no memory for a row. ``among``: at most so many may be in
    its worker, after one failed that held it. ``deaths`` counts workers that held nothing else.
    """

    among: int | None = None
    deaths: int = 0

    def outlived(self, held: int) -> None:
        """Note the failure of a worker with ``held`` of them: the next one holds half as many."""
        half = max(1, held // 2)
        self.among = min(half, self.among or half)
        self.deaths += held == 1


@dataclass(eq=False, kw_only=True)
class Member:
    """One worker of a pool; ``label`` names it in messages."""

    number: int
    handle: Handle
    label: str
    opened: dict[str, Opened] = field(default_factory=dict)
    opening: Future[Any] | None = None
    """The answer of a worker that starts, or that loads the model ``loading``."""
    loading: str = ""
    most: int | None = None
    """At most so many items at once, after a death that may have been for want of memory."""
    since: int = 0
    """Results since ``most`` was last changed."""

    def window(self, key: str, *, whole: bool) -> int:
        """Return how many items it may hold, so that it never waits for the command.

        Where it does not refill its batch by itself (not ``whole``), two chunks of moderate size.
        """
        rows = self.opened[key].rows
        room = rows + rows // 2 + 1 if whole else 1024
        return min(room, self.most or room)

    def died(self, held: int) -> None:
        """Hold half as much from now on as when it died; a death at rest says nothing."""
        self.opened = {}
        if held:
            self.most, self.since = max(1, held // 2), 0

    def finished(self, results: int) -> None:
        """Note results: a worker that lives on for long may hold more again."""
        self.since += results
        if self.most is not None and self.since >= 4 * self.most:
            self.most, self.since = 2 * self.most, 0


Spawn = Callable[[int], Handle]
"""Starts the worker of a number; the same number again after it died."""
