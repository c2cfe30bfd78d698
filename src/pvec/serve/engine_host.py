"""An engine in a worker's process: answers come in, and what happens to them goes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.probe import Direction
from pvec.errors import PvecError
from pvec.serve.answers import Answer, Delta, Outcome
from pvec.serve.engine import Engine


@dataclass(frozen=True, kw_only=True)
class SentEvent:
    """A ``Delta`` or an ``Outcome`` without its answer, which is known by its request's id."""

    id: str
    kind: type[Delta | Outcome]
    fields: dict[str, Any]

    def of(self, answer: Answer) -> Delta | Outcome:
        """Return the event of the answer."""
        return self.kind(answer=answer, **self.fields)


@dataclass(kw_only=True)
class News:
    """What has happened in a worker; ``running``: how many answers are in its batch."""

    events: list[SentEvent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    running: int = 0


class EngineHost:
    """Holds the ``Engine`` of a worker. Its methods are called one at a time."""

    def __init__(self, backend: HFBackend, directions: Sequence[Direction]) -> None:
        self._answers: dict[str, Answer] = {}
        self._arrived = Condition()
        self._news = News()
        backend.on_note = self._note
        self._engine = Engine(backend.live(directions), backend.tokenizer, deliver=self._deliver)

    def exchange(self, begun: Sequence[Answer], cancelled: Sequence[str], wait: float) -> News:
        """Begin answers and end others; return what has happened, at most after ``wait`` seconds.

        An answer that does not fit the model has an ``Outcome`` with the error.
        """
        for answer in begun:
            self._begin(answer)
        for identity in cancelled:
            if identity in self._answers:
                self._engine.cancel(self._answers[identity])
        with self._arrived:
            self._arrived.wait_for(lambda: self._news.events, wait)
            news, self._news = self._news, News()
        for event in news.events:
            if event.kind is Outcome:
                del self._answers[event.id]
        news.running = self._engine.running
        return news

    def close(self) -> None:
        """End every answer."""
        self._engine.close()

    def _begin(self, answer: Answer) -> None:
        self._answers[answer.request.id] = answer
        try:
            self._engine.submit([answer])
        except PvecError as error:
            self._deliver([Outcome(answer=answer, reason="error", error=error)])

    def _deliver(self, events: list[Delta | Outcome]) -> None:
        sent = []
        for event in events:
            fields = dict(vars(event))
            identity = fields.pop("answer").request.id
            sent.append(SentEvent(id=identity, kind=type(event), fields=fields))
        with self._arrived:
            self._news.events += sent
            self._arrived.notify_all()

    def _note(self, text: str) -> None:
        with self._arrived:
            self._news.notes.append(text)
