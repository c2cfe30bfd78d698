"""The thread that runs the model: answers of many requests in one batch, a step at a time.

``EngineThread`` is what it has in common with the engine of workers (``pool_engine``).
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.base import NOT_FINITE
from pvec.backends.hf.generation import Finished
from pvec.backends.hf.live import LiveBatch
from pvec.backends.hf.rows import Row
from pvec.closing import Closing
from pvec.errors import ModelError, PvecError
from pvec.serve.answers import Answer, AnswerText, Delta, InternalError, Outcome, Reason
from pvec.serve.rules import ALARM_WINDOW, Alarm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("pvec.serve")

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


class Engine(EngineThread):
    """Runs answers until it is closed; ``deliver`` is called in its thread after every step."""

    def __init__(
        self,
        batch: LiveBatch,
        tokenizer: PreTrainedTokenizerBase,
        *,
        deliver: Callable[[list[Delta | Outcome]], None],
    ) -> None:
        super().__init__(tokenizer, deliver=deliver)
        self._batch = batch
        self._answers: dict[Row, Answer] = {}
        self._thread.start()

    @property
    def running(self) -> int:
        """How many answers are in the batch."""
        return len(self._batch.running)

    @property
    def waiting(self) -> int:
        """How many answers have no place in the batch yet."""
        return len(self._batch.waiting)

    def submit(self, answers: Sequence[Answer]) -> None:
        """Start answers; any thread. Raises ``ModelError`` when one does not fit the model."""
        rows = [self._batch.row(answer.request) for answer in answers]
        for answer in answers:
            answer.text = AnswerText(self.tokenizer, stops=answer.stops)
        self._inbox.put(partial(self._start, rows, list(answers)))

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._obey()
                if going:
                    self._step()
            except Exception as error:  # whatever it is, the next request is answered
                _log.exception("the engine failed in a step; its answers are ended")
                known = error if isinstance(error, PvecError) else InternalError(SERVER_FAILED)
                self._fail([row for row in self._batch.clear() if row in self._answers], known)
            self._flush()
        self._fail(list(self._answers), InternalError("The server was stopped."))
        self._flush()

    def _obey(self) -> bool:
        """Do what other threads asked for; wait when there is nothing to run. False: close."""
        while True:
            busy = bool(self._batch.running or self._batch.waiting)
            if not busy:
                self._flush()
            try:
                command = self._inbox.get(block=not busy)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _start(self, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        self._answers.update(zip(rows, answers, strict=True))
        self._batch.waiting.extend(rows)

    def _cancel(self, answer: Answer) -> None:
        for row in [row for row, other in self._answers.items() if other is answer]:
            if row in self._batch.waiting:
                self._batch.waiting.remove(row)
            else:
                self._batch.end([row])
            self._end(row, "cancelled", ())

    def _fail(self, rows: Sequence[Row], error: PvecError) -> None:
        for row in rows:
            self._end(row, "error", (), error=error)

    def _step(self) -> None:
        for done in self._batch.step():
            self._finish(done)
        for row in list(self._batch.running):
            answer = self._answers[row]
            if answer.first_token is None:
                answer.first_token = time.monotonic() - answer.created
            raised = self._raised(answer, row)
            if raised and len(row.tokens) == 1:  # nobody has seen its first token: begin anew
                self._cap(answer, row, raised, tokens=[])
                continue
            self._read(answer, row)
            if answer.text.stopped or len(row.tokens) >= answer.limit:
                (done,) = self._batch.end([row], "stop" if answer.text.stopped else "length")
                self._finish(done)
                continue
            self._send(answer, row)
            if raised:
                self._cap(answer, row, raised, tokens=row.tokens)

    def _read(self, answer: Answer, row: Row) -> None:
        for token in row.tokens[answer.text.read :]:
            answer.text.add(token)
            if answer.text.stopped:
                return

    def _send(self, answer: Answer, row: Row, *, final: bool = False) -> None:
        ready = list(answer.text.ready(final=final))
        if ready and answer.stream:
            values = [_or_none(row.projections, 1 + number) for number, _ in ready]
            pieces = [piece for _, piece in ready]
            self._events.append(Delta(answer=answer, pieces=pieces, projections=values))

    def _finish(self, done: Finished) -> None:
        row = done.row
        answer = self._answers[row]
        if done.error is not None:
            self._end(row, "error", (), error=done.error)
        elif done.reason == "failed":
            reason = NOT_FINITE.format(len(row.tokens))
            error = ModelError(f"There is no answer: {reason}; use smaller coefficients.")
            self._end(row, "error", (), error=error)
        else:
            self._read(answer, row)
            answer.text.finish()
            self._send(answer, row, final=True)
            self._end(row, "length" if done.reason == "length" else "stop", done.touched)

    def _end(
        self, row: Row, reason: Reason, touched: tuple[int, ...], *, error: PvecError | None = None
    ) -> None:
        answer = self._answers.pop(row)
        kept = row.projections[: 1 + len(answer.text.pieces)]
        self._events.append(
            Outcome(
                answer=answer,
                reason=reason,
                text=answer.text.text,
                pieces=answer.text.pieces,
                token_ids=row.tokens,
                projections=np.stack(kept) if kept else np.zeros((0, 0), dtype=np.float32),
                touched=touched,
                steering=row.request.steering,
                capped=answer.capped,
                error=error,
                first_token=answer.first_token,
            )
        )

    def _raised(self, answer: Answer, row: Row) -> list[Alarm]:
        """Return the alarms that an answer sets off now and has not set off before."""
        raised = []
        for direction, alarm in answer.alarms:
            if alarm.vector in answer.capped:
                continue
            recent = [values[direction] for values in row.projections[-ALARM_WINDOW:]]
            prompt = len(row.tokens) == 1 and row.projections[0][direction] > alarm.level
            full = len(row.tokens) >= ALARM_WINDOW and float(np.mean(recent)) > alarm.level
            if prompt or full:
                raised.append(alarm)
        return raised

    def _cap(self, answer: Answer, row: Row, raised: Sequence[Alarm], *, tokens: list[int]) -> None:
        """Go on after ``tokens`` as if the answer had been capped from its first token on."""
        self._batch.end([row])
        del self._answers[row]
        steering = (*row.request.steering, *(alarm.cap for alarm in raised))
        again = self._batch.row(replace(row.request, steering=steering))
        again.tokens = tokens
        answer.capped = (*answer.capped, *(alarm.vector for alarm in raised))
        self._answers[again] = answer
        self._batch.waiting.appendleft(again)


def _or_none(values: Sequence[np.ndarray], place: int) -> np.ndarray | None:
    return values[place] if place < len(values) else None
