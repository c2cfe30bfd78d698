"""One server: where it is, the key it is asked with, and one request to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pvec.errors import InputError
from pvec.judges.reply import ErrorReply, is_error, parse_body, parse_error
from pvec.judges.transport import bounded_client
from pvec.runs.secrets import safe_url
from pvec.types import Message

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from pydantic import SecretStr

OPENAI_URL = "https://api.openai.com/v1"
KEY_NAME = "OPENAI_API_KEY"


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
        from openai import APIStatusError

        if self._client is None:
            self._client = self._open_client()
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

    def _open_client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        return AsyncOpenAI(**self.access(), max_retries=0, http_client=bounded_client())

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
