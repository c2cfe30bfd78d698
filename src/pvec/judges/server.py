"""One server: where it is, its key, the parameters that it takes, and one request to it."""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pvec.errors import InputError
from pvec.judges.reply import ErrorReply, MalformedReply, is_error, parse_body, parse_error
from pvec.runs.secrets import safe_url
from pvec.types import Message

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from pydantic import SecretStr

OPENAI_URL = "https://api.openai.com/v1"
KEY_NAME = "OPENAI_API_KEY"

MAX_REPLY_BYTES = 4 * 2**20
"""A judge's reply has a few kilobytes, a written trait a hundred; more than this is never read."""

MOST_TOKENS = 4096
"""As far as a token limit is raised for a server that needs more than pvec asked for."""

_FEWEST_ALTERNATIVES = 5
_REJECTS = re.compile(
    r"support|unknown|unrecognized|unexpected|extra|not (?:permitted|enabled|allowed|available)"
    r"|invalid|must be|only|does not|allowed|range|exceed|greater|schema"
)
_MAXIMUM = re.compile(
    r"(?:max\w*(?: allowed)?(?: value)?(?: is| of)?|at most|up to|less than or equal to"
    r"|no (?:more|greater) than|<=|\u2264|between \d+ and|range \W?\d+\s*(?:,|to))\W{0,4}(\d+)"
)
_LIMIT_NAMED = re.compile(r"max_?(?:output_|completion_|new_)?tokens|output limit")
_MINIMUM = re.compile(
    r"(?:>=|\u2265|at least|greater than or equal to|minimum(?: value)?(?: is| of)?)\W{0,3}(\d+)"
)
_TOO_SMALL = re.compile(r"was reached|too (?:low|small)|higher|below minimum|increase")


class Rejection(Exception):  # noqa: N818 - carries what the server said
    """The server answered with an error, to a request with the parameters ``sent``.

    It does not carry the client's exception along: a traceback would print the server's words,
    which may quote the key.
    """

    def __init__(
        self, status: int, error: ErrorReply, *, headers: Mapping[str, str], sent: dict[str, Any]
    ) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.error = error
        self.headers = headers
        self.sent = sent


def server_url(given: str | None, *, option: str, use_environment: bool = True) -> str | None:
    """Return the base URL of a server: as given, or the environment's; None is OpenAI's own.

    Raises ``InputError`` that names ``option`` when it is not a URL.
    """
    url = given or (use_environment and os.environ.get("OPENAI_BASE_URL")) or None
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InputError(
            f"{option} {safe_url(url)} is not a valid URL: it must begin with http:// or https:// "
            "and name a host."
        )
    return url


def api_key(*secrets: SecretStr | None) -> str | None:
    """Return the first key that is set, else the environment's; None when there is none.

    Raises ``InputError`` for a key that no request can carry.
    """
    given = next((secret for secret in secrets if secret is not None), None)
    key = (given.get_secret_value() if given else os.environ.get(KEY_NAME, "")).strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"The API key holds characters that no key has: set {KEY_NAME} again.")
    return key or None


def sendable(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages without halves of surrogate pairs, which an answer may hold."""
    return [
        {k: v.encode("utf-8", "replace").decode() for k, v in message.items()}
        for message in messages
    ]


class Server:
    """A chat endpoint of an OpenAI-compatible server. Belongs to one event loop.

    ``key`` is kept inside the client and cut out of every message. ``timeout`` is in seconds, for
    one whole reply. ``name`` tells judges apart, ``key_name`` is the environment variable that
    messages tell the user to set.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        key: str | None,
        timeout: float,
        key_name: str = KEY_NAME,
    ) -> None:
        self.model = model
        self.url = base_url or OPENAI_URL
        self.host = urlsplit(self.url).netloc.rsplit("@", 1)[-1] or safe_url(self.url)
        self.timeout = timeout
        self.name = f"openai:{model}@{self.host}"
        self.key_name = key_name
        self._key = key
        self._client: AsyncOpenAI | None = None

    async def post(self, messages: Sequence[Message], sent: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the body of its reply; raises ``Rejection`` for an error."""
        from openai import APIStatusError, AsyncOpenAI

        if self._client is None:
            self._client = AsyncOpenAI(**self.access(), max_retries=0, http_client=bounded_client())
        chat: Any = sendable(messages)
        try:
            # The client's time-out is per read; a server that drips bytes must not hold a slot.
            async with asyncio.timeout(self.timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=chat, **sent
                )
        except APIStatusError as error:
            reply, headers = parse_error(error.response.content), error.response.headers
            raise Rejection(error.status_code, reply, headers=headers, sent=sent) from None
        content = response.http_response.content
        body = parse_body(content)
        if is_error(body):
            reply = parse_error(content)
            raise Rejection(reply.code or 502, reply, headers=response.headers, sent=sent)
        return body

    def access(self) -> dict[str, Any]:
        """Return the arguments with which the ``openai`` package reaches this server."""
        # A query, such as Azure's api-version, belongs behind the path of each request.
        parts = urlsplit(self.url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        key = self._key or "none"  # servers of one's own ask for none
        return {
            "api_key": key,
            "base_url": urlunsplit((parts.scheme, parts.netloc, parts.path, "", "")),
            "default_query": query,
            "default_headers": {"api-key": key} if "api-version" in query else None,
            "timeout": self.timeout,
        }

    async def close(self) -> None:
        """Close the connections; another request would open them again."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def redact(self, text: str) -> str:
        """Return ``text`` on one line, without the key and not too long."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:197] + "..."

    @property
    def place(self) -> str:
        """The base URL without user, password and query."""
        return safe_url(self.url)


def bounded_client() -> Any:
    """Return the ``openai`` package's HTTP client, limited to replies of ``MAX_REPLY_BYTES``.

    The limit holds after decompression, so a small compressed body cannot fill the memory either.
    A larger reply raises ``MalformedReply``. Redirects are not followed: the key is for one host.
    """
    from openai import DefaultAsyncHttpxClient

    class BoundedClient(DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:  # noqa: ARG002
            request.headers["Accept-Encoding"] = "identity"
            response = await super().send(request, stream=True, **options)
            try:
                body = await _read_bounded(response)
            finally:
                await response.aclose()
            encoded = ("content-encoding", "content-length", "transfer-encoding")
            headers = response.headers.multi_items()
            return type(response)(
                response.status_code,
                headers=[(name, text) for name, text in headers if name.lower() not in encoded],
                content=body,
                request=request,
                extensions=response.extensions,
            )

    return BoundedClient(follow_redirects=False)


async def _read_bounded(response: Any) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise MalformedReply(f"the server's reply is compressed as {encoding[:20]!r}")
    # 47: gzip or zlib, whichever the body says
    decoder = zlib.decompressobj(wbits=47) if encoding not in ("", "identity") else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        room = MAX_REPLY_BYTES + 1 - len(body)
        try:
            body += decoder.decompress(chunk, room) if decoder else chunk
        except zlib.error as error:
            raise MalformedReply("the server's reply cannot be decompressed") from error
        if len(body) > MAX_REPLY_BYTES:
            raise MalformedReply(f"the server's reply exceeds {MAX_REPLY_BYTES >> 20} MiB")
    return bytes(body)


class Dialect:
    """The parameters that requests to one server are sent with.

    It starts from ``options`` and learns from what the server rejects; nothing that was left out
    comes back, so that adapting ends.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.dropped: list[str] = []
        self._options = dict(options)
        self._limit_name = "max_tokens"
        self._fewest_tokens = 1

    def parameters(self, *, max_tokens: int | None) -> dict[str, Any]:
        """Return what is sent beside model and messages; ``max_tokens`` None sends no limit."""
        if max_tokens is None:
            return dict(self._options)
        return {**self._options, self._limit_name: max(max_tokens, self._fewest_tokens)}

    def vary(self) -> None:
        """Ask for replies that differ from one request to the next, where the server takes it."""
        self._options.pop("seed", None)
        if "temperature" in self._options:
            self._options["temperature"] = 1

    def adapt(self, error: ErrorReply, *, sent: Mapping[str, Any], max_tokens: int | None) -> bool:
        """Change what the server rejects of ``sent``; whether another try will send something else.

        It may have been changed already, by another request.
        """
        if self.parameters(max_tokens=max_tokens) == sent:
            self._change(error, sent)
        return self.parameters(max_tokens=max_tokens) != sent

    def _change(self, error: ErrorReply, sent: Mapping[str, Any]) -> None:
        text = error.text
        if "max_completion_tokens" in text and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"
            return
        if self._raise_limit(text, sent):
            return
        if (name := self._rejected(text)) is not None:
            before = self._options
            self._options = _without(name, before, text)
            self.dropped += [name for name in before if name not in self._options]

    def _raise_limit(self, text: str, sent: Mapping[str, Any]) -> bool:
        """Allow more tokens where the server says that it needs more than it was allowed."""
        if self._limit_name not in sent or not _LIMIT_NAMED.search(text):
            return False
        limit = int(sent[self._limit_name])
        minimum = _MINIMUM.search(text)
        if minimum is None and not _TOO_SMALL.search(text):
            return False
        needed = int(minimum.group(1)[:9]) if minimum else 4 * limit
        if not limit < needed <= 2 * MOST_TOKENS:
            return False
        self._fewest_tokens = min(needed, MOST_TOKENS)
        return True

    def _rejected(self, text: str) -> str | None:
        """Return the parameter of ours that an error names as rejected."""
        if not _REJECTS.search(text):
            return None
        for name in ("top_logprobs", "logprobs", "temperature", "seed", "response_format"):
            if name in self._options and re.search(rf"(?<![a-z_]){name}(?![a-z_])", text):
                return name
        if "schema" in text and "response_format" in self._options:  # words of their own for it
            return "response_format"
        return None


def _without(name: str, options: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Drop option ``name``, or ask for less of it first: as many ``top_logprobs`` (which need
    ``logprobs``) as the server says it allows, any JSON object instead of one by a schema.
    """
    if name == "response_format" and options.get(name, {}).get("type") == "json_schema":
        return {**options, name: {"type": "json_object"}}
    if "logprobs" in name and (count := options.get("top_logprobs", 0)):
        maximum = _MAXIMUM.search(text)
        allowed = int(maximum.group(1)[:9]) if maximum else 0
        if 0 < allowed < count:
            return {**options, "top_logprobs": allowed}
        if name == "top_logprobs" and count > _FEWEST_ALTERNATIVES:
            return {**options, "top_logprobs": _FEWEST_ALTERNATIVES}
    gone = {"top_logprobs", "logprobs"} if "logprobs" in name else {name}
    return {key: value for key, value in options.items() if key not in gone}
