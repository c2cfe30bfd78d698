"""One chat endpoint of an OpenAI-compatible server, asked until it answers or there is no point.

Knows retries, rate limits, rejected parameters and the cost limit; knows nothing of scores, nor of
what else a model may be asked for (``judges.author``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pvec.closing import Closing
from pvec.errors import InputError, JudgeError
from pvec.judges.cost import Budget
from pvec.judges.loop import LoopThread
from pvec.judges.pacing import Pacer, Patience, retry_after
from pvec.judges.reply import MalformedReply, Reply, Usage, parse_body, parse_reply, parse_usage
from pvec.types import Message

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from pydantic import SecretStr

OPENAI_URL = "https://api.openai.com/v1"
KEY_NAME = "OPENAI_API_KEY"

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
    """One request failed for good; others may still succeed."""


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


def server_url(given: str | None, *, option: str) -> str | None:
    """Return the base URL of a server: as given, or the environment's; None is OpenAI's own.

    Raises ``InputError`` that names ``option`` when it is not a URL.
    """
    url = given or os.environ.get("OPENAI_BASE_URL") or None
    if url is not None and urlsplit(url).scheme not in ("http", "https"):
        raise InputError(
            f"{option} {url} is not a valid URL: it must begin with http:// or https://."
        )
    return url


def api_key(*secrets: SecretStr | None) -> str | None:
    """Return the first key that is set, else the environment's; None when there is none."""
    given = next((secret for secret in secrets if secret is not None), None)
    return (given.get_secret_value() if given else os.environ.get(KEY_NAME)) or None


class Endpoint(Closing):
    """A server, a model and a key; a context manager, so that connections are given back.

    ``key`` is kept inside the client and cut out of every message; ``key_name`` is the
    environment variable that messages tell the user to set. ``concurrency`` is the most requests
    in flight; the number adapts below it.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        key: str | None,
        key_name: str = KEY_NAME,
        budget: Budget,
        patience: Patience,
        concurrency: int = 1,
        role: Role = JUDGE,
    ) -> None:
        self.model = model
        self.url = base_url or OPENAI_URL
        self.host = urlsplit(self.url).netloc.rsplit("@", 1)[-1] or self.url
        self.budget = budget
        self.halted: str | None = None
        self.dropped: list[str] = []
        self._key = key
        self._key_name = key_name
        self._pacer = Pacer(most=concurrency)
        self._patience = patience
        self._client: AsyncOpenAI | None = None
        self._options: dict[str, Any] = dict(role.options)
        self._role = role
        self._limit_name = "max_tokens"
        self._loop: LoopThread | None = None

    # -- from plain code ------------------------------------------------------------------------

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine`` where requests are made; cancelling the future cancels it."""
        return self._running_loop().submit(coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` to its end and return its result; an interrupt cancels it."""
        return self._running_loop().run(coroutine)

    def close(self) -> None:
        """Cancel what is in flight and close the connections."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            loop.cancel_all()
            if self._client is not None:
                loop.run(self._client.close())
                self._client = None
            loop.close()

    def _running_loop(self) -> LoopThread:
        if self._loop is None:
            self._loop = LoopThread(name="pvec-client")
        return self._loop

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
            msg = (
                f"The {self._role.name} at {self.host} asks to wait {pause / 60:.0f} minutes: "
                f"run the same command again later, {self._role.kept}."
            )
            raise JudgeError(msg) from trouble
        if waited + pause > self._patience.rate_limit:
            msg = f"{trouble} (still rate limited after {waited:.0f} s)"
            raise GaveUp(msg) from trouble
        await self._pacer.sleep(pause)
        return max(pause, 0.001)  # a server that says "0" must not be asked for ever

    async def _in_turn(self, messages: Sequence[Message], *, max_tokens: int | None) -> Reply:
        from openai import APIConnectionError, APIStatusError

        async with self._pacer.slot() as began:
            try:
                reply = await self._send(messages, max_tokens=max_tokens)
            except APIStatusError as error:
                trouble = self._sort_out(error)
                if trouble.overloaded:
                    self._pacer.overloaded(began=began, pause=trouble.pause or 0.0)
                raise trouble from None  # the server's words may quote the key
            except MalformedReply as error:
                raise _Trouble(str(error)) from error
            except (APIConnectionError, TimeoutError) as error:
                raise _Trouble(self._describe_dropped(error)) from error
        self._pacer.succeeded()
        return reply

    async def _send(self, messages: Sequence[Message], *, max_tokens: int | None) -> Reply:
        from openai import APIStatusError

        if self.halted is not None:
            raise Halted(self.halted)
        characters = sum(len(message["content"]) for message in messages)
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
            body = await self._post(messages, max_tokens=max_tokens)
            usage = parse_usage(body)
            return parse_reply(body)
        except APIStatusError:
            billed = False
            raise
        finally:
            if usage is None:
                self.budget.release(reserved, billed=billed)
            else:
                self.budget.settle(
                    reserved,
                    prompt_tokens=usage.prompt,
                    completion_tokens=usage.completion,
                    characters=characters,
                )

    async def _post(self, messages: Sequence[Message], *, max_tokens: int | None) -> dict[str, Any]:
        if self._client is None:
            from openai import AsyncOpenAI

            self._client = AsyncOpenAI(
                api_key=self._key or "none",  # servers of one's own ask for none
                base_url=self.url,
                max_retries=0,
                timeout=self._patience.timeout,
            )
        options = dict(self._options)
        if max_tokens is not None:
            options[self._limit_name] = max_tokens
        chat: Any = [dict(message) for message in messages]
        # The client's time-out is per read; a server that drips bytes must not hold a slot.
        async with asyncio.timeout(self._patience.timeout):
            response = await self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=chat, **options
            )
        return parse_body(response.http_response.content)

    # -- what an error means --------------------------------------------------------------------

    def _sort_out(self, error: APIStatusError) -> _Trouble:
        """Return the trouble worth another try; raise for the others.

        What is raised does not carry ``error`` along: a traceback would print the server's words,
        which may quote the key.
        """
        status, said = error.status_code, self._said(error)
        if status in (400, 403, 422):
            name = self._rejected_parameter(error)
            if name is not None:
                return _Trouble(said, adapted=self._drop(name))
        if status == 429 and "insufficient_quota" in (error.code, error.type):
            msg = (
                f"The account at {self.host} has no credit left: add credit and run the same "
                f"command again, {self._role.kept}."
            )
            raise JudgeError(msg) from None
        if status in (401, 403, 404):
            raise JudgeError(self._fatal(status, said=said)) from None
        pause = retry_after(error.response.headers)
        if status == 429:
            return _Trouble(said, pause=pause, overloaded=True)
        if status in (408, 409, 425) or status >= 500:
            if pause is not None:
                pause = min(pause, self._patience.rate_limit)
            return _Trouble(said, pause=pause)
        raise GaveUp(said) from None

    def _fatal(self, status: int, *, said: str) -> str:
        role = self._role
        if status == 404:
            return (
                f"The {role.name} at {self.url_without_secrets} does not know the model "
                f"{self.model!r} ({said}): check {role.model_flag} and {role.url_flag} (usually "
                "ending in /v1)."
            )
        refused = "refused the key" if status == 401 else f"refused access to {self.model!r}"
        return (
            f"The {role.name} at {self.host} {refused} ({said}): set a valid key in "
            f"{self._key_name}, or choose another {role.name} ({role.others})."
        )

    def _rejected_parameter(self, error: APIStatusError) -> str | None:
        """Return the parameter of ours that this server or model does not take, if it names one."""
        named = f"{error.param or ''} {error.message}"
        if "max_completion_tokens" in named:
            return "max_tokens"
        known = ("top_logprobs", "logprobs", "temperature", "seed", "response_format")
        name = next((name for name in known if name in named), None)
        if name is None and "schema" in named:  # some servers use words of their own for it
            name = "response_format"
        return name if name in self._options or name in self.dropped else None

    def _drop(self, name: str) -> bool:
        """Leave parameter ``name`` out from now on; False when that was done before."""
        if name == "max_tokens":
            before, self._limit_name = self._limit_name, "max_completion_tokens"
            return before == "max_tokens"
        before_options = self._options
        self._options = _without(name, before_options)
        self.dropped += [gone for gone in before_options if gone not in self._options]
        return self._options != before_options

    def _said(self, error: APIStatusError) -> str:
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        text = f"HTTP {error.status_code}"
        if isinstance(message, str) and message:
            text += f": {message}"
        return self.redact(text)

    def _describe_dropped(self, error: Exception) -> str:
        from openai import APITimeoutError

        if isinstance(error, (APITimeoutError, TimeoutError)):
            return f"no reply within {self._patience.timeout:g} s"
        return self.redact(f"the connection failed: {error.__cause__ or error}")

    def redact(self, text: str) -> str:
        """Return ``text`` on one line, without the key and not too long."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:197] + "..."

    @property
    def url_without_secrets(self) -> str:
        """The base URL without user, password and query."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{self.host}{parts.path}"


def _without(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop option ``name``, or ask for less of it first: fewer ``top_logprobs`` (which need
    ``logprobs``), any JSON object instead of one by a schema.
    """
    if name == "response_format" and options.get(name, {}).get("type") == "json_schema":
        return {**options, name: {"type": "json_object"}}
    if name == "top_logprobs" and options.get("top_logprobs", 0) > 5:
        return {**options, "top_logprobs": 5}
    gone = {"top_logprobs", "logprobs"} if "logprobs" in name else {name}
    return {key: value for key, value in options.items() if key not in gone}
