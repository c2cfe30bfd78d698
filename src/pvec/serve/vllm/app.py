"""vLLM's application behind pvec's: ``pvec`` is read in requests and put into responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from pvec.errors import PvecError
from pvec.serve.answers import InternalError
from pvec.serve.app import (
    Receive,
    Scope,
    Send,
    event_text,
    make_app,
    read_content,
    too_slow,
)
from pvec.serve.protocol import ApiError, api_error, read_object
from pvec.serve.vllm.service import VLLMJob, VLLMService

_STEERED = {"/v1/chat/completions": True, "/v1/completions": False}
"""The endpoints with a field ``pvec``, and whether each is a chat."""

_DONE = b"data: [DONE]"
_RUNNING = b'"finish_reason":null'


def make_vllm_app(service: VLLMService, inner: FastAPI) -> FastAPI:
    """Return the application that serves ``service`` with vLLM's own ``inner``."""
    app = make_app(service)
    app.mount("", Endpoints(service, inner))
    return app


class Endpoints:
    """vLLM's endpoints, steered."""

    def __init__(self, service: VLLMService, inner: FastAPI) -> None:
        self._service, self._inner = service, inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with ``ApiError``."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["method"] == "POST":
            if scope["path"] in _STEERED:
                await self._steered(scope, receive, send)
                return
            self._service.admit(1)
        await self._inner(scope, receive, send)

    async def _steered(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._service.rules.limits
        values = read_object(await read_content(Request(scope, receive), limits.max_body))
        try:
            job = self._service.begin(values, chat=_STEERED[scope["path"]])
        except PvecError as error:
            raise api_error(error, hide=self._service.hidden) from None
        content = json.dumps(values).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        reply = Reply(self._service, job, send)
        try:
            async with asyncio.timeout(limits.timeout):
                await self._inner({**scope, "headers": headers}, _sends(content, receive), reply)
        except TimeoutError:
            await reply.fail(too_slow(self._service))
        finally:
            await self._service.end(job)


class Reply:
    """What vLLM's application sends, on its way to the client."""

    def __init__(self, service: VLLMService, job: VLLMJob, send: Send) -> None:
        self._service, self._job, self._send = service, job, send
        self._start: MutableMapping[str, Any] = {}
        self._content = b""
        self._streams = self._failed = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Take the next message of the response."""
        if message["type"] == "http.response.start":
            self._start = message
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            if self._streams:
                await self._send(message)
            return
        self._content += message.get("body", b"")
        more = bool(message.get("more_body"))
        if self._streams:
            await self._events(more=more)
        elif not more:
            await self._whole()

    async def fail(self, error: ApiError) -> None:
        """End the response with an error, unless it has ended."""
        self._failed = True
        if self._streams:
            await self._body(event_text(error.body))
        else:
            await JSONResponse(error.body, error.status)({"type": "http"}, _nothing, self._send)

    async def _whole(self) -> None:
        error = self._error()
        if error is not None:
            await self.fail(error)
            return
        content, headers = self._content, list(self._start["headers"])
        if self._start["status"] == 200 and self._job.outcomes:
            response = json.loads(content)
            response["pvec"] = self._service.reports(self._job)
            content = json.dumps(response, ensure_ascii=False).encode()
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            headers.append((b"content-length", str(len(content)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._body(content)

    async def _events(self, *, more: bool) -> None:
        *events, self._content = self._content.split(b"\n\n")
        out = b"".join(part for event in events for part in self._event(event))
        if out or not more:
            await self._body(out, more=more)

    def _event(self, event: bytes) -> Iterator[bytes]:
        """Yield the events to send instead of one of vLLM's."""
        if self._failed:
            return  # a stream that has failed ends without [DONE]
        usual = not self._job.tokens and _RUNNING in event
        if event == _DONE or usual or not event.startswith(b"data: "):
            yield event + b"\n\n"
            return
        chunk = json.loads(event.removeprefix(b"data: "))
        error = self._error()
        if "error" in chunk or error is not None:
            self._failed = True
            yield event_text(chunk if error is None else error.body)
            return
        for part in self._chunks(chunk):
            yield event_text(part)

    def _chunks(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a chunk with the tokens it brings; the last one of a choice goes apart."""
        choice = next(iter(chunk.get("choices", [])), None)
        if choice is None or "role" in choice.get("delta", {}):
            yield chunk
            return
        tracked, done = self._job.tracked[choice["index"]], choice.get("finish_reason") is not None
        if self._job.tokens:
            delta = tracked.delta()
            text = choice["text"] if "text" in choice else any(choice["delta"].values())
            if text or delta.pieces or not done:
                tokens = self._service.token_report(self._job, delta)
                running = {**choice, "finish_reason": None} if done else choice
                yield {**chunk, "choices": [running], "pvec": {"tokens": tokens}}
            if not done:
                return
            empty: dict[str, Any] = {"text": ""} if "text" in choice else {"delta": {}}
            choice = {**choice, **empty, "logprobs": None}
        if done:
            outcome = self._job.outcomes[choice["index"]]
            chunk = {**chunk, "pvec": self._service.report(self._job, outcome)}
        yield {**chunk, "choices": [choice]}

    def _error(self) -> ApiError | None:
        """Return the error of an answer that pvec has failed, if there is one."""
        for tracked in self._job.tracked:
            if tracked.error is not None:
                return api_error(tracked.error, hide=self._service.hidden)
        ended = self._job.outcomes.values()
        if any(outcome.reason in ("cancelled", "error") for outcome in ended):
            error = InternalError("The answer was ended.")
            return api_error(error, hide=self._service.hidden)
        return None

    async def _body(self, content: bytes, *, more: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": content, "more_body": more})


def _sends(content: bytes, receive: Receive) -> Receive:
    """Return what gives the request's body, and then what the client does."""
    sent = False

    async def next_message() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return next_message


async def _nothing() -> MutableMapping[str, Any]:
    return {"type": "http.disconnect"}
