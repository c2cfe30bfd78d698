"""How requests travel: in a thread of their own, and with replies of bounded size."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from pvec.judges.reply import MalformedReply

T = TypeVar("T")

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


class LoopThread:
    """Runs coroutines in a background thread until it is closed.

    The caller may itself be inside a running loop (a notebook), hence the thread.
    """

    def __init__(self, *, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine``; cancelling the returned future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` to its end and return its result; an interrupt cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def cancel_all(self) -> None:
        """Cancel what still runs and wait until it has cleaned up."""
        self.submit(_cancel_others()).result()

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        if self._loop.is_closed():
            return
        self.cancel_all()
        # Inside the thread, as the caller's own may have a loop that runs (a notebook).
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
