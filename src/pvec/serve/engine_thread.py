"""What the engines of a server have in common: a thread that is told what to do, and delivers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from pvec.closing import Closing
from pvec.errors import PvecError
from pvec.serve.answers import Answer, Delta, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SERVER_FAILED = "The server failed: see its log."


class EngineThread(Closing):
    """Runs answers until it is closed; ``deliver`` is called in its thread.

    ``failure``: why nothing can be answered any more. A subclass starts ``_thread`` when it is
    ready, obeys ``_inbox`` in ``_run`` and flushes ``_events``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        deliver: Callable[[list[Delta | Outcome]], None],
    ) -> None:
        self.tokenizer = tokenizer
        self.failure: PvecError | None = None
        self._deliver = deliver
        self._events: list[Delta | Outcome] = []
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="pvec-engine", daemon=True)

    @property
    @abstractmethod
    def running(self) -> int:
        """How many answers are in a batch."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """How many answers have no place in a batch yet."""

    @abstractmethod
    def submit(self, answers: Sequence[Answer]) -> None:
        """Start answers; any thread."""

    def cancel(self, answer: Answer) -> None:
        """End an answer, if it has not ended; any thread. Its outcome is delivered."""
        self._inbox.put(partial(self._cancel, answer))

    def close(self) -> None:
        """End every answer and the thread."""
        self._inbox.put(None)
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Work until ``_inbox`` gives None."""

    @abstractmethod
    def _cancel(self, answer: Answer) -> None:
        """End an answer, in the thread."""

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)
