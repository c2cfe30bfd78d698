"""One chat endpoint of an OpenAI-compatible server, asked until it answers or there is no point.

Knows retries, rate limits, rejected parameters and the cost limit; knows nothing of scores, nor of
what else a model may be asked for (``judges.author``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pvec.closing import Closing
from pvec.errors import JudgeError
from pvec.judges.cost import Budget
from pvec.judges.pacing import Pacer, Patience, retry_after
from pvec.judges.reply import MalformedReply, Reply, Usage, parse_reply, parse_usage
from pvec.judges.server import Dialect, Rejection, Server
from pvec.types import Message

T = TypeVar("T")

SCORING: Mapping[str, Any] = {"temperature": 0, "seed": 0, "logprobs": True, "top_logprobs": 20}
"""Request parameters of a judge: one token, with its likeliest alternatives."""

_ASSUMED_TOKENS = 8192
"""What a reply without a limit is taken to cost, until the server says what it was."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a model is asked for, and how messages speak of it and of what chooses another."""

    options: Mapping[str, Any] = field(default_factory=lambda: SCORING)
    """Request parameters; what a server rejects is left out."""

    name: str = "judge"
    model_flag: str = "--judge-model"
    url_flag: str = "--judge-url"
    others: str = "--judge-model local:MODEL, --judge-url URL, --no-judge"
    kept: str = "everything scored so far is kept"
    """What is not lost when the command ends now."""


JUDGE = Role()


class Halted(Exception):  # noqa: N818 - a signal, not an error
    """The request was not sent because asking has stopped."""


class GaveUp(Exception):  # noqa: N818 - carries the reason of one failed request
    """One request failed for good; others may still succeed.

    ``own_fault`` says that the server answered and rejected this very request; ``filtered`` that
    its content filter did.
    """

    def __init__(self, reason: str, *, own_fault: bool = False, filtered: bool = False) -> None:
        super().__init__(reason)
        self.own_fault = own_fault
        self.filtered = filtered


class _Trouble(Exception):  # noqa: N818 - never leaves this file
    """One try failed and another may succeed."""

    def __init__(
        self,
        detail: str,
        *,
        pause: float | None = None,
        overloaded: bool = False,
        adapted: bool = False,
    ) -> None:
        super().__init__(detail)
        self.pause = pause
        self.overloaded = overloaded
        self.adapted = adapted


class Endpoint(Closing):
    """A server that is asked until it answers; a context manager, so that connections are closed.

    ``concurrency`` is the most requests in flight; the number adapts below it.
    """

    def __init__(
        self,
        server: Server,
        *,
        budget: Budget,
        patience: Patience,
        concurrency: int = 1,
        role: Role = JUDGE,
    ) -> None:
        self.server = server
        self.budget = budget
        self.halted: str | None = None
        self.dialect = Dialect(role.options)
        self._pacer = Pacer(most=concurrency)
        self._patience = patience
        self._role = role
        self._answered = False
        self._thread = ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- from plain code ------------------------------------------------------------------------

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine`` in a thread of its own, as the caller may be inside a loop (a
        notebook); cancelling the future cancels it."""
        if self._loop is None:
            from anyio.from_thread import start_blocking_portal

            portal = self._thread.enter_context(start_blocking_portal())
            self._loop = portal.call(asyncio.get_running_loop)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Close the connections and cancel what is in flight."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.halt, "it was closed")
            self.submit(self.server.close()).result()
            self._loop = None
            self._thread.close()  # its loop cancels what is left

    # -- inside the loop ------------------------------------------------------------------------

    async def ask(
        self, messages: Sequence[Message], *, max_tokens: int | None, tries: int | None = None
    ) -> Reply:
        """Return the model's reply, of at most ``max_tokens`` (None: the server's own limit).

        Raises ``GaveUp`` when this request failed for good, ``Halted`` when it was not sent, and
        ``JudgeError`` when no request can succeed (key, model, credit).
        """
        allowed = tries or self._patience.tries
        failures, waited = 0, 0.0
        while True:
            try:
                return await self._in_turn(messages, max_tokens=max_tokens)
            except _Trouble as trouble:
                if trouble.overloaded:
                    waited += await self._wait_for_rate_limit(trouble, waited=waited)
                    continue
                if trouble.adapted:
                    continue
                failures += 1
                if failures >= allowed:
                    msg = f"{trouble} (gave up after {failures} tries)"
                    raise GaveUp(msg) from trouble
                pause = max(trouble.pause or 0.0, self._patience.wait(failures))
                await self._pacer.sleep(pause)

    def halt(self, reason: str) -> None:
        """Send nothing more; what is in flight still finishes."""
        self.halted = self.halted or reason
        self._pacer.stop()

    async def _wait_for_rate_limit(self, trouble: _Trouble, *, waited: float) -> float:
        pause = self._patience.wait(1) if trouble.pause is None else trouble.pause
        if pause > self._patience.rate_limit:
            raise JudgeError(
                f"The {self._role.name} at {self.server.host} asks to wait {pause / 60:.0f} "
                f"minutes: run the same command again later, {self._role.kept}."
            ) from trouble
        if waited + pause > self._patience.rate_limit:
            msg = f"{trouble} (still rate limited after {waited:.0f} s)"
            raise GaveUp(msg) from trouble
        await self._pacer.sleep(pause)
        return max(pause, 0.001)  # a server that says "0" must not be asked for ever

    async def _in_turn(self, messages: Sequence[Message], *, max_tokens: int | None) -> Reply:
        from openai import APIConnectionError

        async with self._pacer.slot() as began:
            try:
                reply = await self._send(messages, max_tokens=max_tokens)
            except Rejection as rejection:
                trouble = self._sort_out(rejection, max_tokens=max_tokens)
                if trouble.overloaded:
                    self._pacer.overloaded(began=began, pause=trouble.pause or 0.0)
                raise trouble from None
            except MalformedReply as error:
                raise _Trouble(str(error)) from error
            except (APIConnectionError, TimeoutError) as error:
                raise _Trouble(self._describe_dropped(error)) from error
        self._pacer.succeeded()
        self._answered = True
        return reply

    async def _send(self, messages: Sequence[Message], *, max_tokens: int | None) -> Reply:
        if self.halted is not None:
            raise Halted(self.halted)
        characters = sum(len(message["content"]) for message in messages)
        sent = self.dialect.parameters(max_tokens=max_tokens)
        reserved = self.budget.reserve(
            characters=characters, completion_tokens=max_tokens or _ASSUMED_TOKENS
        )
        if reserved is None:
            reason = f"the cost limit of ${self.budget.limit:g} is reached"
            self.halt(reason)
            raise Halted(reason)
        billed = True  # a reply that never came may still be charged
        usage: Usage | None = None
        try:
            body = await self.server.post(messages, sent)
            usage = parse_usage(body)
            return parse_reply(body)
        except Rejection:
            billed = False
            raise
        finally:
            self.budget.settle(reserved, usage, billed=billed, characters=characters)

    # -- what an error means --------------------------------------------------------------------

    def _sort_out(self, rejection: Rejection, *, max_tokens: int | None) -> _Trouble:
        """Return the trouble worth another try; raise for the others."""
        status, error = rejection.status, rejection.error
        reason = self.server.redact(f"HTTP {status}: {error.message}".removesuffix(": "))
        if status in (400, 403, 422, 451) and error.filtered:
            raise GaveUp(reason, own_fault=True, filtered=True) from None
        if status in (400, 403, 422) and self.dialect.adapt(
            error, sent=rejection.sent, max_tokens=max_tokens
        ):
            return _Trouble(reason, adapted=True)
        if status == 402 or (status == 429 and "insufficient_quota" in error.text):
            raise JudgeError(
                f"The account at {self.server.host} has no credit left: add credit and run the "
                f"same command again, {self._role.kept}."
            ) from None
        # A key or model that has worked is not what a 403 or 404 is about.
        if status == 401 or (status in (403, 404) and not self._answered):
            raise JudgeError(self._fatal(status, reason)) from None
        pause = retry_after(rejection.headers)
        if status == 429:
            return _Trouble(reason, pause=pause, overloaded=True)
        if status in (408, 409, 425) or status >= 500:
            if pause is not None:
                pause = min(pause, self._patience.rate_limit)
            return _Trouble(reason, pause=pause)
        raise GaveUp(reason, own_fault=True) from None

    def _fatal(self, status: int, reason: str) -> str:
        role = self._role
        if status == 404:
            return (
                f"The {role.name} at {self.server.place} does not know the model "
                f"{self.server.model!r} ({reason}): check {role.model_flag} and {role.url_flag} "
                "(usually ending in /v1)."
            )
        refused = "refused the key" if status == 401 else f"refused access to {self.server.model!r}"
        return (
            f"The {role.name} at {self.server.host} {refused} ({reason}): set a valid key in "
            f"{self.server.key_name}, or choose another {role.name} ({role.others})."
        )

    def _describe_dropped(self, error: Exception) -> str:
        from openai import APITimeoutError

        if isinstance(error.__cause__, MalformedReply):
            return str(error.__cause__)
        if isinstance(error, (APITimeoutError, TimeoutError)):
            return f"no reply within {self._patience.timeout:g} s"
        return self.server.redact(f"the connection failed: {error.__cause__ or error}")
