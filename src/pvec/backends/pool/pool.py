"""The workers of a command: started, given models, replaced when they die."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import count
from typing import Any

from pvec.backends.pool.members import Handle, Member, Spawn, WorkerDied
from pvec.backends.pool.worker import ModelOrder, Opened
from pvec.closing import Closing
from pvec.errors import InputError, ModelError, PvecError
from pvec.models.costs import Machine
from pvec.runs.manifest import package_versions

_COMPARED = ("python", "pvec", "torch", "transformers", "peft", "vllm")
"""What must be the same on every machine for results to be."""

_BARREN = 10
"""Deaths in a row without a result, per worker, after which the command gives up."""

_POLL = 1.0
"""Seconds after which the clock is looked at."""


class Pool(Closing):
    """Workers without a model at first; ``open`` loads one in each.

    ``spawn`` starts a worker. ``notify`` receives a sentence when one joins, dies or is replaced.
    Held by several sessions of a process: each ``hold`` goes with a ``close``, and the last one
    ends the workers.
    """

    def __init__(
        self,
        spawn: Spawn,
        *,
        size: int,
        start_timeout: float = 600.0,
        notify: Callable[[str], None] = lambda _: None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self.notify = notify
        self._spawn = spawn
        self._start_timeout = start_timeout
        self._end = end
        self._orders: dict[str, ModelOrder] = {}
        self._users: Counter[str] = Counter()
        self._barren = 0
        self._holders = 0
        self._jobs = count(1)
        self.members = [
            Member(number=number, handle=spawn(number), label=f"worker {number}")
            for number in range(1, size + 1)
        ]
        for member in self.members:
            member.opening = member.handle.submit("describe")

    def hold(self) -> Pool:
        """Keep the workers until one more ``close``."""
        self._holders += 1
        return self

    def close(self) -> None:
        """End the workers when nobody holds them any more."""
        self._holders -= 1
        if self._holders > 0:
            return
        for member in self.members:
            member.handle.kill()
        self._end()

    def next_job(self) -> int:
        """Return a number that no other job has."""
        return next(self._jobs)

    def dtype(self, order: ModelOrder) -> str:
        """Return the number format that the workers choose for a model."""
        return str(self._first("dtype", order)).removeprefix("torch.")

    def machine(self, order: ModelOrder) -> tuple[Machine, int]:
        """Return how fast a device of a worker is, and how many GPUs each has; see ``Worker``."""
        measured: tuple[Machine, int] = self._first("machine", order)
        return measured

    def _first(self, method: str, order: ModelOrder) -> Any:
        """Return what the first worker that is there answers, or raise it."""
        while True:
            member = self._wait_for(lambda m: m.opening is None)
            try:
                answer = member.handle.submit(method, order).result()
            except WorkerDied as death:
                self.lost(member, member.handle, str(death))
                continue
            if isinstance(answer, PvecError):
                raise answer
            return answer

    def open(self, order: ModelOrder) -> Opened:
        """Load a model in every worker and return what the first says of it.

        Raises ``ModelError`` or ``InputError`` when a worker cannot use the model.
        """
        self._orders[order.key] = order
        self._users[order.key] += 1
        return self._wait_for(lambda m: order.key in m.opened).opened[order.key]

    def drop(self, key: str) -> None:
        """Free a model in every worker, when nobody who opened it needs it any more."""
        self._users[key] -= 1
        if self._users[key] > 0:
            return
        self._orders.pop(key, None)
        for member in self.members:
            if member.opened.pop(key, None) is not None:
                with suppress(WorkerDied):
                    member.handle.submit("drop", key)

    def ready(self, key: str) -> list[Member]:
        """Return the workers that have a model, and let the others load it."""
        for member in self.members:
            self._go_on(member)
        return [member for member in self.members if key in member.opened and not member.opening]

    def all_ready(self, key: str) -> list[Member]:
        """Return the workers, once every one has the model."""
        self._wait_for(lambda _: all(key in m.opened and not m.opening for m in self.members))
        return self.members

    @property
    def opening(self) -> list[Future[Any]]:
        """What the workers that start or load will answer."""
        return [member.opening for member in self.members if member.opening is not None]

    def lost(self, member: Member, handle: Handle, reason: str, *, held: int = 0) -> None:
        """Replace a worker that died with ``held`` items, unless that is done already.

        Raises ``ModelError`` when worker after worker dies and nothing is finished.
        """
        if member.handle is not handle:
            return
        self._barren += 1
        if self._barren > _BARREN * len(self.members):
            raise ModelError(
                f"{self._barren} workers died one after the other and none finished anything (the "
                f"last: {reason}): what was finished is kept, correct the reason and run the same "
                f"command again."
            )
        what = f", and what it held ({held}) goes to another" if held else ""
        self.notify(f"{member.label} died ({reason}): it is replaced{what}")
        member.died(held)
        handle.kill()
        member.handle = self._spawn(member.number)
        member.opening = member.handle.submit("describe")

    def progressed(self, member: Member, results: int) -> None:
        """Note what a worker has finished."""
        self._barren = 0
        member.finished(results)

    def _wait_for(self, wanted: Callable[[Member], bool]) -> Member:
        """Return the first worker of which ``wanted`` holds."""
        deadline = time.monotonic() + self._start_timeout
        while True:
            for member in self.members:
                self._go_on(member)
            for member in self.members:
                if wanted(member):
                    return member
            if time.monotonic() > deadline:
                raise ModelError(
                    f"No worker was ready after {self._start_timeout:g} seconds: look at the "
                    f"cluster (`ray status`), or wait longer with --worker-start-timeout."
                )
            wait(self.opening, timeout=_POLL, return_when=FIRST_COMPLETED)

    def _go_on(self, member: Member) -> None:
        """Take in what a worker answered and let it load what it has not loaded yet."""
        if member.opening is not None:
            if not member.opening.done():
                return
            answer, member.opening = member.opening, None
            try:
                self._take_in(member, answer.result())
            except WorkerDied as death:
                self.lost(member, member.handle, str(death))
                return
        for key, order in self._orders.items():
            if key not in member.opened:
                member.opening, member.loading = member.handle.submit("open", order), key
                return

    def _take_in(self, member: Member, answer: Any) -> None:
        if isinstance(answer, dict):  # of "describe"
            check_versions(answer)
            member.label = f"worker {member.number} ({answer['host']}, process {answer['pid']})"
            return
        if member.loading not in self._orders:  # dropped meanwhile, perhaps because it failed
            member.handle.submit("drop", member.loading)
            return
        if isinstance(answer, PvecError):
            raise answer
        member.opened[member.loading] = answer
        self.notify(f"{member.label} joined: {answer.info.device}, {answer.info.dtype}")


def check_versions(description: dict[str, Any]) -> None:
    """Raise ``InputError`` where a worker's packages differ from those of this process."""
    here, there = package_versions(), description["versions"]
    different = [
        f"{name} {there.get(name, 'missing')} (here {here.get(name, 'missing')})"
        for name in _COMPARED
        if here.get(name) != there.get(name)
    ]
    if different:
        raise InputError(
            f"The worker on {description['host']} has {', '.join(different)}: install the same "
            f"versions on every machine."
        )
