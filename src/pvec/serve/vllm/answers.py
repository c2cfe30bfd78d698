"""One answer of vLLM's engine, token by token: held until it is measured, and proven steered."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.engine import EngineCoreOutput, FinishReason

from pvec.backends.base import NOT_FINITE
from pvec.backends.vllm.live import Report
from pvec.backends.vllm.requests import wrong_count
from pvec.errors import ModelError, PvecError, SteeringError
from pvec.serve.answers import Answer, Delta, Outcome, Reason
from pvec.steering.positions import expected_touched


@dataclass(eq=False, kw_only=True)
class TrackedAnswer:
    """An answer in the engine, which is asked for one token more than ``answer.limit``.

    A token is run, and so measured, in the step that samples the next one. Until then the output of
    the last one is held back, and with ``hold`` that of every one: the token is sent with its
    projections, or a stop text may make it the last. The token too many only measures the last one.
    """

    answer: Answer
    hold: bool = False
    id: str = ""
    """The engine's name of it, empty until it is there."""
    along: list[np.ndarray] = field(default_factory=list)
    """Projections of the last prompt token and of every token run [D]."""
    token_ids: list[int] = field(default_factory=list)
    reason: Reason = "stop"
    error: PvecError | None = None
    ended: bool = False
    _held: EngineCoreOutput | None = None
    _received: int = 0

    def take(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """Take the engine's output of a step; return what its server may see now."""
        row, output.pooling_output = output.pooling_output, None
        if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            self.reason = "cancelled" if output.finish_reason is FinishReason.ABORT else "error"
            return [*self._release(), output]
        try:
            self._measure(None if row is None else Report.read(row))
        except PvecError as error:
            self.error, self.reason = error, "error"
            output.new_token_ids, output.new_logprobs = [], None
            output.finish_reason = FinishReason.ERROR
            return [output]
        released = self._release()
        self._received += 1
        if self._received > self.answer.limit:
            released[-1].finish_reason, self.reason = FinishReason.LENGTH, "length"
            return released
        self._held = output
        if output.finish_reason is None:
            wait = self.hold or self._received == self.answer.limit
            return released if wait else self._release()
        if output.finish_reason is FinishReason.LENGTH:
            self.reason = "length"  # the model's context is full
        return [*released, *self._release(end=output.finish_reason is FinishReason.STOP)]

    def delta(self) -> Delta:
        """Return the tokens that were released and not told of yet."""
        ready = list(self.answer.text.ready(final=self.ended))
        return Delta(
            answer=self.answer,
            pieces=[piece for _, piece in ready],
            projections=[
                self.along[1 + place] if 1 + place < len(self.along) else None for place, _ in ready
            ],
        )

    def outcome(self) -> Outcome:
        """Return how the answer ended: no more tokens come."""
        self.ended = True
        self.answer.text.finish()
        request, pieces = self.answer.request, self.answer.text.pieces
        kept = self.along[: 1 + len(pieces)]
        run = max(len(self.along) - 1, 0)
        return Outcome(
            answer=self.answer,
            reason=self.reason,
            text=self.answer.text.text,
            pieces=pieces,
            token_ids=self.token_ids,
            projections=np.stack(kept) if kept else np.zeros((0, 0), dtype=np.float32),
            touched=tuple(
                expected_touched(
                    instruction.positions,
                    prompt_tokens=len(request.prompt_ids),
                    generated_tokens=run,
                )
                for instruction in request.steering
            ),
            steering=request.steering,
            capped=self.answer.capped,
            error=self.error,
            first_token=self.answer.first_token,
        )

    def _measure(self, report: Report | None) -> None:
        """Take the worker's report in. Raises what keeps the latest token from being used."""
        request = self.answer.request
        if report is None:
            raise SteeringError(
                "An answer went through the vLLM engine without being seen by pvec's worker: this "
                "vLLM is not supported, use --backend hf."
            )
        due = len(request.prompt_ids) + self._received
        if report.high != due or report.gaps:
            raise wrong_count(request.id, report.high, due)
        if not np.isfinite(report.along).all():
            reason = NOT_FINITE.format(self._received)
            raise ModelError(f"There is no answer: {reason}; use smaller coefficients.")
        steered = report.high - report.cached if request.steering else 0
        if report.proven != steered:
            raise SteeringError(
                f"The vLLM engine steered {report.proven} tokens of {request.id!r} where {steered} "
                f"were due: steering did not apply."
            )
        self.along.append(report.along)

    def _release(self, *, end: bool = False) -> list[EngineCoreOutput]:
        """Return the output that was held; ``end``: its token ends the answer and is none of it."""
        output, self._held = self._held, None
        if output is None:
            return []
        if self.answer.first_token is None:
            self.answer.first_token = time.monotonic() - self.answer.created
        for token in [] if end else output.new_token_ids:
            self.token_ids.append(token)
            if not self.answer.text.stopped:
                self.answer.text.add(token)
        return [output]
