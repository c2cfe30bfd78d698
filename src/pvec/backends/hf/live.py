"""The decode batch of a server: requests join and leave between steps, and are measured in them.

``generation.generate`` runs a list of requests to its end; here the caller makes every step, and
learns after it what each row has. Answers are the same: the rows, draws and steering are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from pvec.backends.hf.forward import CausalModel
from pvec.backends.hf.generation import DecodeBatch, Finished, with_holes_filled
from pvec.backends.hf.probe import Direction, Probe
from pvec.backends.hf.rows import Row, admit, shrink, take
from pvec.errors import ModelError, SteeringError
from pvec.models.memory import unless_out_of_memory
from pvec.steering.tables import check_instruction
from pvec.types import FinishReason, Request


class LiveBatch:
    """Rows that run together, and those that wait for a place.

    ``directions`` are projected on at every last prompt token and answer token, in the same forward
    pass, as the residual stream is after steering: ``Row.projections``, one ``[directions]`` each.
    """

    def __init__(self, model: CausalModel, *, directions: Sequence[Direction] = ()) -> None:
        self.waiting: deque[Row] = deque()
        self._model = model
        self._probe = Probe(model.decoder, directions) if directions else None
        self._batch = _Batch(model, probe=self._probe)

    @property
    def running(self) -> list[Row]:
        """The rows of the batch."""
        return self._batch.rows

    def row(self, request: Request) -> Row:
        """Return the row of a request, to be put into ``waiting``.

        Raises ``ModelError`` when prompt or steering do not fit the model. Any thread may call it.
        """
        for instruction in request.steering:
            check_instruction(instruction, self._model.decoder)
        return admit(request, self._model)

    def step(self) -> list[Finished]:
        """Let waiting rows in, give every row one token and run it; return the rows that ended.

        After it ``row.tokens`` of the rows still in ``running`` have all been run. When memory runs
        out the batch gets smaller and its rows start again; a row that is too much alone has ended,
        with an ``error``.
        """
        advanced = unless_out_of_memory(self._advance)
        ended = self._batch.ended
        if advanced is None:
            rows = self.clear()
            try:
                shrink(self._model, rows)
            except ModelError as error:
                failed = [Finished(row=r, reason="failed", touched=(), error=error) for r in rows]
                return [*ended, *failed]
            self.waiting.extendleft(reversed(rows))
        return ended

    def end(self, ended: Sequence[Row], reason: FinishReason = "stop") -> list[Finished]:
        """Take rows out of the batch before the model ends them, their steering checked."""
        return self._batch.end(ended, reason)

    def clear(self) -> list[Row]:
        """Drop the running rows and return them, after an error in the middle of a step."""
        rows = self.running
        self._batch = _Batch(self._model, probe=self._probe)
        return rows

    def _advance(self) -> None:
        self._batch.ended = []
        joining = take(self.waiting, self.running, self._model)
        if joining:
            self._batch.extend(joining)
        if self.running:
            self._batch.step()
            self._batch.end_unsteered()


class _Batch(DecodeBatch):
    """A batch that rows leave early, and in which a steering error belongs to its row."""

    @torch.inference_mode()
    def end(self, ended: Sequence[Row], reason: FinishReason) -> list[Finished]:
        leaving = {id(row) for row in ended}
        finished = [
            self._finish(i, reason) for i, row in enumerate(self.rows) if id(row) in leaving
        ]
        going = [i for i, row in enumerate(self.rows) if id(row) not in leaving]
        if finished:
            order = with_holes_filled(going)
            self._logits = self._logits[order]  # the next tokens are drawn from them
            self._keep(order)
        return finished

    def end_unsteered(self) -> None:
        """End the rows with a first token whose steering did not apply: nobody has read it yet."""
        fresh = [i for i, row in enumerate(self.rows) if len(row.tokens) == 1]
        checked = [self._finish(i, "stop") for i in fresh if self.rows[i].request.steering]
        wrong = [done for done in checked if done.error is not None]
        if wrong:
            self.ended += self.end([done.row for done in wrong], "failed")

    def _finish(self, index: int, reason: FinishReason) -> Finished:
        try:
            return super()._finish(index, reason)
        except SteeringError as error:
            return Finished(row=self.rows[index], reason="failed", touched=(), error=error)
