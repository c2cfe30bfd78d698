"""A judge behind any OpenAI-compatible server, through the ``openai`` client.

A score is read from the logprobs of one output token (``judges.scales``). A short probe before the
first score finds a refused key, an unknown model, and servers that cannot be read that way: those
that give no logprobs, split numbers into digits, or think before they answer are read as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Literal

from pvec.errors import JudgeError
from pvec.judges.base import Judge
from pvec.judges.client import Endpoint, GaveUp, Halted
from pvec.judges.cost import Budget
from pvec.judges.dialect import MOST_TOKENS
from pvec.judges.pacing import Patience
from pvec.judges.reply import Reply
from pvec.judges.scales import Reading, read_text, read_tokens
from pvec.judges.server import KEY_NAME
from pvec.types import JudgeQuery, Message, Score, ScoreStatus

DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"
"""The paper's judge family, pinned to a dated version so that scores stay comparable."""

_PROBE: Message = {"role": "user", "content": "Reply with the number 75 alone, no other words."}
_PROBE_TOKENS = 4
_PROBE_TRIES = 4
_TEXT_TOKENS = 16
_VERDICT_TOKENS = 512
_HOPELESS = 20
"""After so many requests in a row that failed for good, the server has to answer a probe."""


class OpenAIJudge(Judge):
    """Scores through ``/chat/completions``; see ``Judge`` for what each method promises.

    ``key`` may be None for a server that needs none. ``concurrency`` is the most requests in
    flight; the number adapts below it. With ``require_logprobs`` a server without usable logprobs
    is an error instead of being read as text.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        base_url: str | None = None,
        key: str | None = None,
        key_name: str = KEY_NAME,
        concurrency: int = 64,
        patience: Patience | None = None,
        budget: Budget | None = None,
        require_logprobs: bool = False,
    ) -> None:
        self.budget = budget or Budget(limit=None, price=None)
        self._endpoint = Endpoint(
            model,
            base_url=base_url,
            key=key,
            key_name=key_name,
            budget=self.budget,
            patience=patience or Patience(),
            concurrency=concurrency,
        )
        self.name = f"openai:{model}@{self._endpoint.server.host}"
        self._window = 2 * concurrency
        self._require_logprobs = require_logprobs
        self._reads: Literal["logprobs", "text"] = "logprobs"
        self._text_tokens = _TEXT_TOKENS
        self._reason_for_text = ""
        self._checked = False
        self._failed_in_a_row = 0
        self._answered = False
        self._probing = asyncio.Lock()

    @property
    def notes(self) -> tuple[str, ...]:
        """How scores are read where that is not the usual way."""
        notes = []
        if self._reads == "text":
            notes.append(f"scores are read from the judge's text, because {self._reason_for_text}")
        if "temperature" in self._endpoint.dialect.dropped:
            notes.append("the judge does not take temperature 0: its scores vary from run to run")
        return tuple(notes)

    @property
    def stopped(self) -> str | None:
        """The cost limit, once it is reached."""
        return self._endpoint.halted

    @property
    def spent(self) -> float:
        """Dollars, from the usage that the server reported."""
        return self.budget.spent

    def check(self) -> None:
        """Ask for one number: finds a refused key, and how this server's replies can be read."""
        if self._checked:
            return
        reply = self._probe(max_tokens=_PROBE_TOKENS)
        if reply is not None:
            self._choose_reading(reply)
        self._checked = True

    def score(self, queries: Iterable[JudgeQuery]) -> Iterator[Score]:
        """Yield scores as they finish; closing the iterator cancels what is in flight."""
        self.check()
        source = iter(queries)
        finished: queue.SimpleQueue[Future[Score | None]] = queue.SimpleQueue()
        pending: set[Future[Score | None]] = set()
        failure: JudgeError | None = None
        try:
            while True:
                self._fill(pending, source, finished)
                if not pending:
                    break
                future = finished.get()
                pending.discard(future)
                try:
                    score = future.result()
                except JudgeError as error:
                    # What was already sent is paid for: it is still collected.
                    failure = failure or error
                    continue
                if score is not None:
                    yield score
        finally:
            for future in pending:
                future.cancel()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Cancel what is in flight and close the connections."""
        self._endpoint.close()

    def _fill(
        self,
        pending: set[Future[Score | None]],
        source: Iterator[JudgeQuery],
        finished: queue.SimpleQueue[Future[Score | None]],
    ) -> None:
        """Hand out queries up to the window: a million of them stream in constant memory."""
        while len(pending) < self._window and self._endpoint.halted is None:
            query = next(source, None)
            if query is None:
                return
            future = self._endpoint.submit(self._judge(query))
            pending.add(future)
            future.add_done_callback(finished.put)

    # -- one query, inside the loop -------------------------------------------------------------

    async def _judge(self, query: JudgeQuery) -> Score | None:
        """Return the score of one query, or None when it was not asked."""
        in_text = self._reads == "text" or query.scale == "binary-text"
        tokens = self._tokens_for(query) if in_text else 1
        try:
            reply = await self._endpoint.ask(query.messages, max_tokens=tokens)
        except Halted:
            return None
        except GaveUp as error:
            status: ScoreStatus = "refusal" if error.filtered else "error"
            reading = Reading(score=None, status=status, detail=str(error))
            if not error.filtered:
                await self._note_failure(error)
        except JudgeError as error:
            self._endpoint.halt(str(error))
            raise
        else:
            self._failed_in_a_row, self._answered = 0, True
            reading = self._read(reply, query=query, in_text=in_text)
        return Score(
            id=query.id,
            response_id=query.response_id,
            metric=query.metric,
            judge=self.name,
            score=reading.score,
            status=reading.status,
            detail=self._endpoint.server.redact(reading.detail),
        )

    async def _note_failure(self, failure: GaveUp) -> None:
        """Count a failure; raise ``JudgeError`` when it is the server that fails, not this prompt.

        Prompts may fail one after the other and be at fault themselves: then the server, which has
        answered before or says what is wrong with them, still answers a probe.
        """
        self._failed_in_a_row += 1
        if self._failed_in_a_row < _HOPELESS:
            return
        if failure.own_fault or self._answered:
            async with self._probing:
                if self._failed_in_a_row < _HOPELESS:  # another failure has asked meanwhile
                    return
                with contextlib.suppress(GaveUp):
                    await self._endpoint.ask([_PROBE], max_tokens=_PROBE_TOKENS, tries=_PROBE_TRIES)
                    self._failed_in_a_row = 0
                    return
        self._endpoint.halt("the judge fails")
        raise JudgeError(self._hopeless(str(failure))) from failure

    def _tokens_for(self, query: JudgeQuery) -> int:
        return max(self._text_tokens, _VERDICT_TOKENS if query.scale == "binary-text" else 0)

    def _read(self, reply: Reply, *, query: JudgeQuery, in_text: bool) -> Reading:
        if reply.refusal is not None or reply.finish_reason == "content_filter":
            detail = reply.refusal or "stopped by the server's content filter"
            return Reading(score=None, status="refusal", detail=detail)
        if in_text:
            return read_text(reply.text, scale=query.scale)
        if reply.positions:
            return read_tokens(reply.positions[0], scale=query.scale)
        if self._require_logprobs:
            return Reading(score=None, status="error", detail="the reply came without logprobs")
        reading = read_text(reply.text, scale=query.scale)
        detail = "; ".join(filter(None, (reading.detail, "read as text, no logprobs")))
        return Reading(score=reading.score, status=reading.status, detail=detail)

    def _hopeless(self, last: str) -> str:
        return (
            f"The judge at {self._endpoint.server.host} failed {_HOPELESS} requests in a row "
            f"({last}): run the same command again when it is well, everything scored so far is "
            "kept."
        )

    # -- the probe ------------------------------------------------------------------------------

    def _probe(self, *, max_tokens: int) -> Reply | None:
        """Ask for one number; None when the cost limit allows not even that."""
        asking = self._endpoint.ask([_PROBE], max_tokens=max_tokens, tries=_PROBE_TRIES)
        try:
            return self._endpoint.run(asking)
        except Halted:
            return None
        except CancelledError as error:
            msg = "The judge was closed while it was being checked: open it again."
            raise JudgeError(msg) from error
        except GaveUp as error:
            msg = (
                f"The judge at {self._endpoint.server.place} cannot be used: {error}; "
                "check --judge-url and the server, or use another judge "
                "(--judge-model local:MODEL, --no-judge)."
            )
            raise JudgeError(msg) from error

    def _choose_reading(self, reply: Reply) -> None:
        reason = _why_text(reply)
        if reason is None:
            return
        if self._require_logprobs:
            msg = (
                f"The judge {self.name} cannot be read from logprobs, because {reason}: "
                "choose another judge or allow reading its text."
            )
            raise JudgeError(msg)
        self._reads, self._reason_for_text = "text", reason
        if read_text(reply.text, scale="0-100").score is None:
            self._allow_thinking()

    def _allow_thinking(self) -> None:
        reply = self._probe(max_tokens=MOST_TOKENS)
        if reply is not None and read_text(reply.text, scale="0-100").score is None:
            msg = (
                f"The judge {self.name} wrote no number within {MOST_TOKENS} tokens when "
                "asked for one: choose a judge that can be asked for a number (--judge-model)."
            )
            raise JudgeError(msg)
        self._text_tokens = MOST_TOKENS


def _why_text(reply: Reply) -> str | None:
    """Return why first-token logprobs would mislead for this server, or None when they are fine."""
    if not reply.positions:
        return "the server gives no logprobs"
    written = reply.text.strip()
    if not written or written.startswith("<think"):
        return "the model thinks before it answers"
    seen = {token.strip() for position in reply.positions for token, _ in position}
    whole = any(token.isdigit() and len(token) >= 2 for token in seen | set(reply.tokens))
    if not whole and sum(character.isdigit() for character in written) >= 2:
        # The first token of 75 would be read as 7.
        return "its tokenizer splits numbers into digits"
    return None
