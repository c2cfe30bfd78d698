"""How requests travel: with replies of bounded size."""

from __future__ import annotations

import zlib
from typing import Any

from pvec.judges.reply import MalformedReply

MAX_REPLY_BYTES = 4 * 2**20
"""A judge's reply has a few kilobytes, a written trait a hundred; more than this is never read."""


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
