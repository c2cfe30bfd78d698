"""A judge behind any OpenAI-compatible server, through the ``openai`` client.

A score is read from the logprobs of one output token (``judges.scales``). A short probe before the
first score finds a refused key, an unknown model, and servers that cannot be read that way: those
that give no logprobs, split numbers into digits, or think before they answer are read as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Literal

from pvec.errors import JudgeError
from pvec.judges.base import Judge
from pvec.judges.client import Endpoint, GaveUp, Halted
from pvec.judges.cost import Budget
from pvec.judges.pacing import Patience
from pvec.judges.reply import Reply
from pvec.judges.scales import Reading, mean_reading, read_text, read_tokens
from pvec.judges.server import MOST_TOKENS, Server
from pvec.types import JudgeQuery, JudgeScale, Message, Score

_PROBE: Message = {"role": "user", "content": "Reply with the number 75 alone, no other words."}
_PROBE_TOKENS = 4
_PROBE_TRIES = 4
_TEXT_TOKENS = 16
_VERDICT_TOKENS = 512
_HOPELESS = 20
"""After so many requests in a row that failed for good, the server has to answer a probe."""


class OpenAIJudge(Judge):
    """Scores through ``/chat/completions``; see ``Judge`` for what each method promises.

    ``model`` is its name on the server at ``base_url``, or a server that is asked in another way
    (``judges.providers``). ``key`` may be None for a server that needs none. ``concurrency`` is the
    most requests in flight; the number adapts below it. With ``require_logprobs`` a server without
    usable logprobs is an error instead of being read as text. ``repeats`` is how often a server
    without logprobs is asked for each score: the score is the mean of what it writes at
    temperature 1.
    """

    def __init__(
        self,
        model: str | Server,
        *,
        base_url: str | None = None,
        key: str | None = None,
        concurrency: int = 64,
        patience: Patience | None = None,
        budget: Budget | None = None,
        require_logprobs: bool = False,
        repeats: int = 1,
    ) -> None:
        self.budget = budget or Budget(limit=None, price=None)
        patience = patience or Patience()
        if isinstance(model, str):
            model = Server(model, base_url=base_url, key=key, timeout=patience.timeout)
        self._endpoint = Endpoint(
            model, budget=self.budget, patience=patience, concurrency=concurrency
        )
        self.name = self._endpoint.server.name
        if repeats > 1:
            self.name += f" (mean of {repeats})"
        self.repeats = repeats
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
            mean = f", each the mean of {self.repeats} replies" if self.repeats > 1 else ""
            reason = self._reason_for_text
            notes.append(f"scores are read from the judge's text{mean}, because {reason}")
        if "temperature" in self._endpoint.dialect.dropped and self.repeats == 1:
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
        readings = []
        for _ in range(self.repeats):
            try:
                tokens = self._tokens_for(query.scale)
                reply = await self._endpoint.ask(query.messages, max_tokens=tokens)
            except Halted:
                return None
            except GaveUp as error:
                readings.append(reading_of_failure(error))
                if not error.filtered:
                    await self._note_failure(error)
            except JudgeError as error:
                self._endpoint.halt(str(error))
                raise
            else:
                self._failed_in_a_row, self._answered = 0, True
                readings.append(self._read(reply, scale=query.scale))
        return self.scored(query, mean_reading(readings))

    def scored(
        self, query: JudgeQuery, reading: Reading, *, raw: Mapping[str, float] | None = None
    ) -> Score:
        """Return the score of a query; its detail does not show the key."""
        detail = self._endpoint.server.redact(reading.detail)
        return super().scored(query, replace(reading, detail=detail), raw=raw)

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
        raise JudgeError(
            f"The judge at {self._endpoint.server.host} failed {_HOPELESS} requests in a row "
            f"({failure}): run the same command again when it is well, everything scored so far is "
            "kept."
        ) from failure

    def _in_text(self, scale: JudgeScale) -> bool:
        return self._reads == "text" or scale == "binary-text"

    def _tokens_for(self, scale: JudgeScale) -> int:
        if not self._in_text(scale):
            return 1
        return max(self._text_tokens, _VERDICT_TOKENS if scale == "binary-text" else 0)

    def _read(self, reply: Reply, *, scale: JudgeScale) -> Reading:
        if reply.refusal is not None or reply.finish_reason == "content_filter":
            detail = reply.refusal or "stopped by the server's content filter"
            return Reading(score=None, status="refusal", detail=detail)
        if self._in_text(scale):
            return read_text(reply.text, scale=scale)
        if reply.positions:
            return read_tokens(reply.positions[0], scale=scale)
        if self._require_logprobs:
            return Reading(score=None, status="error", detail="the reply came without logprobs")
        reading = read_text(reply.text, scale=scale)
        detail = "; ".join(filter(None, (reading.detail, "read as text, no logprobs")))
        return Reading(score=reading.score, status=reading.status, detail=detail)

    # -- the probe ------------------------------------------------------------------------------

    def _probe(self, *, max_tokens: int) -> Reply | None:
        """Ask for one number; None when the cost limit allows not even that."""
        try:
            asking = self._endpoint.ask([_PROBE], max_tokens=max_tokens, tries=_PROBE_TRIES)
            return self._endpoint.submit(asking).result()
        except Halted:
            return None
        except CancelledError as error:
            msg = "The judge was closed while it was being checked: open it again."
            raise JudgeError(msg) from error
        except GaveUp as error:
            raise JudgeError(
                f"The judge at {self._endpoint.server.place} cannot be used: {error}; "
                "check --judge-url and the server, or use another judge "
                "(--judge-model local:MODEL, --no-judge)."
            ) from error

    def _choose_reading(self, reply: Reply) -> None:
        reason = _why_text(reply)
        if reason is None:
            if self.repeats > 1:
                raise JudgeError(
                    f"The judge {self.name} gives logprobs, so one request already reads the mean "
                    "over all its replies: use --judge-repeats 1."
                )
            return
        if self._require_logprobs:
            raise JudgeError(
                f"The judge {self.name} cannot be read from logprobs, because {reason}: "
                "choose another judge or allow reading its text."
            )
        self._reads, self._reason_for_text = "text", reason
        if self.repeats > 1:
            self._endpoint.dialect.vary()
        if read_text(reply.text, scale="0-100").score is None:
            self._allow_thinking()

    def _allow_thinking(self) -> None:
        reply = self._probe(max_tokens=MOST_TOKENS)
        if reply is not None and read_text(reply.text, scale="0-100").score is None:
            raise JudgeError(
                f"The judge {self.name} wrote no number within {MOST_TOKENS} tokens when "
                "asked for one: choose a judge that can be asked for a number (--judge-model)."
            )
        self._text_tokens = MOST_TOKENS


def reading_of_failure(failure: GaveUp) -> Reading:
    """Return what a request that failed for good says of the score."""
    return Reading(
        score=None, status="refusal" if failure.filtered else "error", detail=str(failure)
    )


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
