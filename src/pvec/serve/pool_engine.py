"""The engine of a server whose model runs on workers: answers go to them and come back.

An answer whose worker dies begins again on another. Its seed is the same, and so are its tokens:
what its client has of them already is compared and not sent again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty
from typing import Any

from pvec.backends.hf.probe import Direction
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.pool.members import Handle, Held, Member, WorkerDied
from pvec.errors import PvecError
from pvec.serve.answers import Answer, Delta, InternalError, Outcome
from pvec.serve.engine import SERVER_FAILED, EngineThread
from pvec.serve.engine_host import EngineHost, News

_log = logging.getLogger("pvec.serve")

_NAME = "engine"
_WAIT = 0.05
"""Seconds that a worker waits for news: so late at most does it hear of a new answer."""

_IDLE = 1.0
"""Seconds after which a worker without answers is asked whether it lives."""

_LOADING = 0.05
"""Seconds after which a worker that starts is looked at."""


@dataclass(eq=False, kw_only=True)
class _Item(Held):
    """An answer that has not ended. ``sent``: its pieces that were delivered; ``repeated``: how
    many pieces its present worker has given.
    """

    answer: Answer
    sent: list[str] = field(default_factory=list)
    repeated: int = 0
    cancelled: bool = False

    @property
    def id(self) -> str:
        return self.answer.request.id


@dataclass(eq=False, kw_only=True)
class _Part:
    """What the process ``handle`` of a worker holds, and what it is told next.

    ``asked``: it has not answered yet.
    """

    member: Member
    handle: Handle
    held: dict[str, _Item] = field(default_factory=dict)
    begun: list[_Item] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    asked: bool = False
    last_heard: float = 0.0


class PoolEngine(EngineThread):
    """Runs answers on the workers of ``backend``."""

    def __init__(
        self,
        backend: PoolBackend,
        directions: Sequence[Direction],
        *,
        deliver: Callable[[list[Delta | Outcome]], None],
    ) -> None:
        super().__init__(backend.tokenizer, deliver=deliver)
        self._pool, self._key, self._retries = backend.pool, backend.key, backend.retries
        self._directions = list(directions)
        self._items: dict[Answer, _Item] = {}
        self._waiting: deque[_Item] = deque()
        self._parts: dict[int, _Part] = {}
        self._thread.start()

    @property
    def workers(self) -> int:
        """How many workers take answers."""
        return len(self._parts)

    @property
    def running(self) -> int:
        """How many answers are in the workers' batches."""
        return sum(part.running for part in list(self._parts.values()))

    @property
    def waiting(self) -> int:
        """How many answers have no place in a batch yet."""
        return max(0, len(self._items) - self.running)

    def submit(self, answers: Sequence[Answer]) -> None:
        """Start answers; any thread. One that does not fit the model ends with the error."""
        self._inbox.put(partial(self._start, list(answers)))

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._obey()
                if going and self.failure is None:
                    self._share_out()
            except PvecError as error:  # of the pool: no worker can be had any more
                self.failure = error
            except Exception as error:
                _log.exception("the workers cannot be used any more; every answer is ended")
                self.failure = InternalError(f"{SERVER_FAILED} ({type(error).__name__})")
            if self.failure is not None:
                self._parts.clear()
                self._end_all(SERVER_FAILED)
            self._flush()
        self._end_all("The server was stopped.")
        self._flush()
        closed = [part.handle.submit("ask", _NAME, "close") for part in self._parts.values()]
        wait(closed, timeout=_IDLE)

    def _obey(self) -> bool:
        """Do what other threads asked for and workers answered. False: close."""
        with suppress(Empty):
            command = self._inbox.get(timeout=_LOADING if self._pool.opening else _IDLE)
            while command is not None:
                command()
                command = self._inbox.get_nowait()
            return False
        return True

    def _start(self, answers: Sequence[Answer]) -> None:
        items = [_Item(answer=answer) for answer in answers]
        self._items.update(zip(answers, items, strict=True))
        self._waiting += items

    def _cancel(self, answer: Answer) -> None:
        item = self._items.get(answer)
        if item is None:
            return
        item.cancelled = True
        if item in self._waiting:
            self._waiting.remove(item)
            self._end(item, Outcome(answer=answer, reason="cancelled"))
        for part in self._parts.values():
            if item.id in part.held:
                part.cancelled.append(item.id)

    def _share_out(self) -> None:
        """Give what waits to the workers that hold least, and ask those that have something."""
        for member in self._pool.ready(self._key):
            if member.number not in self._parts:
                part = _Part(member=member, handle=member.handle)
                self._parts[member.number] = part
                self._call(part, "attach", _NAME, EngineHost, self._key, self._directions)
        while self._waiting:
            item = self._waiting[0]
            free = [part for part in self._parts.values() if self._has_room(part, item)]
            if not free:
                break
            part = min(free, key=lambda part: len(part.held))
            part.held[item.id] = self._waiting.popleft()
            part.begun.append(item)
        now = time.monotonic()
        for part in self._parts.values():
            if not part.asked and (part.held or part.cancelled or now > part.last_heard + _IDLE):
                begun = [replace(item.answer) for item in part.begun]  # the worker writes in it
                patience = _WAIT if part.held else 0.0
                self._call(part, "ask", _NAME, "exchange", begun, part.cancelled, patience)
                part.begun, part.cancelled = [], []

    def _has_room(self, part: _Part, item: _Item) -> bool:
        limits = [each.among for each in (item, *part.held.values()) if each.among is not None]
        return len(part.held) < min([part.member.window(self._key, whole=True), *limits])

    def _call(self, part: _Part, method: str, *args: Any) -> None:
        part.asked = True
        part.handle.submit(method, *args).add_done_callback(
            lambda future: self._inbox.put(partial(self._answered, part, future))
        )

    def _answered(self, part: _Part, future: Future[News | None]) -> None:
        if self._parts.get(part.member.number) is not part:
            return
        part.asked, part.last_heard = False, time.monotonic()
        try:
            news = future.result()
        except WorkerDied as death:
            self._lost(part, str(death))
            return
        if news is None:  # of "attach"
            return
        part.running = news.running
        for note in news.notes:
            self._pool.notify(f"{part.member.label}: {note}")
        before = len(part.held)
        for sent in news.events:
            if (item := part.held.get(sent.id)) is not None:
                if isinstance(sent.fields.get("error"), InternalError):
                    _log.error("%s: an answer failed, see the worker's log", part.member.label)
                self._pass_on(part, item, sent.of(item.answer))
        if len(part.held) < before:
            self._pool.progressed(part.member, before - len(part.held))

    def _pass_on(self, part: _Part, item: _Item, event: Delta | Outcome) -> None:
        """Deliver what is new; end an answer that begins otherwise than what was delivered."""
        start = item.repeated if isinstance(event, Delta) else 0
        known = item.sent[start : start + len(event.pieces)]
        whole = isinstance(event, Delta) or len(known) == len(item.sent)
        failed = isinstance(event, Outcome) and event.reason in ("cancelled", "error")
        if not failed and not (whole and list(event.pieces[: len(known)]) == known):
            part.cancelled.append(item.id)
            text = "The worker of this answer died, and another gave other tokens: ask again."
            event = Outcome(answer=item.answer, reason="error", error=InternalError(text))
        if isinstance(event, Outcome):
            del part.held[item.id]
            self._end(item, event)
            return
        item.repeated += len(event.pieces)
        pieces, projections = event.pieces[len(known) :], event.projections[len(known) :]
        if pieces:
            item.sent += pieces
            self._events.append(replace(event, pieces=pieces, projections=projections))

    def _lost(self, part: _Part, reason: str) -> None:
        """Replace a dead worker; what it held begins again elsewhere, in smaller groups."""
        held = list(part.held.values())
        del self._parts[part.member.number]
        self._pool.lost(part.member, part.handle, reason, held=len(held))
        for item in reversed(held):
            item.repeated = 0
            item.outlived(len(held))
            if item.cancelled:
                self._end(item, Outcome(answer=item.answer, reason="cancelled"))
            elif item.deaths >= self._retries:
                text = f"{item.deaths} workers died of this answer (the last: {reason})."
                error = InternalError(text)
                self._end(item, Outcome(answer=item.answer, reason="error", error=error))
            else:
                self._waiting.appendleft(item)

    def _end(self, item: _Item, outcome: Outcome) -> None:
        del self._items[item.answer]
        self._events.append(outcome)

    def _end_all(self, text: str) -> None:
        self._waiting.clear()
        for item in list(self._items.values()):
            self._end(item, Outcome(answer=item.answer, reason="error", error=InternalError(text)))
