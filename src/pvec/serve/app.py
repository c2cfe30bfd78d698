"""The HTTP side: OpenAI's two endpoints, what else a client can ask, the page, and the limits."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pvec.errors import PvecError
from pvec.serve.answers import Delta, InternalError, Outcome
from pvec.serve.hf_service import HFJob, HFService
from pvec.serve.protocol import ApiError, Body, ChatBody, CompletionBody, api_error, read_body
from pvec.serve.service import Service

PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_OPEN = ("/", "/health")
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_BODY_SECONDS = 30.0
"""How long a client may take to send its request."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def make_app(service: Service) -> FastAPI:
    """Return what every server answers, whatever runs the model."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    limits = service.rules.limits
    if is_loopback(limits.host):  # no page of another site is let in under a name of its own
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=[limits.host, "127.0.0.1", "localhost"],
            www_redirect=False,
        )  # fmt: skip
    app.add_middleware(Guard, service=service)
    app.add_exception_handler(Exception, _unforeseen)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)

    @app.get("/pvec/vectors")
    async def vectors() -> dict[str, Any]:
        return service.describe()

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "failed" if service.failure else "draining" if service.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return _page_file("index.html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        return _page_file(name)

    return app


def make_hf_app(service: HFService) -> FastAPI:
    """Return the application that serves a model in transformers."""
    app = make_app(service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionBody)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "pvec"}
        return {"object": "list", "data": [model]}

    return app


class Guard:
    """Checks the key, and counts every request with its status and duration."""

    def __init__(self, app: Any, *, service: Service) -> None:
        self._app = app
        self._service = service
        key = service.rules.limits.api_key
        self._key = None if key is None else f"Bearer {key.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, path, status = time.monotonic(), str(scope["path"]), 499  # the client went away

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._allows(path, scope):
                await self._app(scope, receive, counted)
            else:
                error = ApiError(
                    401,
                    "The key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
                await JSONResponse(error.body, 401)(scope, receive, counted)
        finally:
            endpoint = path if path in _ENDPOINTS else "other"
            self._service.metrics.requests.labels(endpoint, str(status)).inc()
            self._service.metrics.seconds.labels(endpoint).observe(time.monotonic() - start)

    def _allows(self, path: str, scope: Scope) -> bool:
        if self._key is None or path in _OPEN or path.startswith("/page/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._key)


async def _answer(service: HFService, request: Request, kind: type[Body]) -> Response:
    body = read_body(await read_content(request, service.rules.limits.max_body), kind)
    try:
        job = service.begin(body)
    except PvecError as error:
        raise api_error(error, hide=service.hidden) from None
    return EventStream(service, job) if body.stream else await _whole(service, job, request)


class EventStream(StreamingResponse):
    """The events of a stream; however it ends, so do its answers."""

    def __init__(self, service: HFService, job: HFJob) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(_events(service, job), media_type="text/event-stream", headers=headers)
        self._service, self._job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the answers or the client are gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.end(self._job)


async def read_content(request: Request, most: int) -> bytes:
    """Return the request's body. Raises ``ApiError`` for one that is too large or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "Send the request as 'Content-Type: application/json'.")
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise ApiError(413, f"The request has more than {most} bytes: shorten it.")
    except TimeoutError:
        raise ApiError(408, "The request did not arrive in time: send it again.") from None
    return bytes(content)


async def _whole(service: HFService, job: HFJob, request: Request) -> Response:
    """Return the whole answers; a client that goes away ends them."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        while not job.done:
            event = asyncio.ensure_future(job.events.get())
            await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                return Response(status_code=499)
            _checked(service, event.result())
    finally:
        gone.cancel()
        service.end(job)
    return JSONResponse(service.response(job))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(service: HFService, job: HFJob) -> AsyncIterator[bytes]:
    try:
        for chunk in job.opening():
            yield event_text(chunk)
        while not job.done or not job.events.empty():
            event = _checked(service, await job.events.get())
            yield event_text(service.chunk(job, event))
        if job.body.stream_options.include_usage:
            yield event_text(job.usage_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield event_text(error.body)


def _checked(service: HFService, event: Delta | Outcome | None) -> Delta | Outcome:
    """Return an event; raise ``ApiError`` when time is over (None) or the answer has failed."""
    if event is None:
        raise too_slow(service)
    if isinstance(event, Delta) or event.reason in ("stop", "length"):
        return event
    raise api_error(event.error or InternalError("The answer was ended."), hide=service.hidden)


def too_slow(service: Service) -> ApiError:
    """Return the error for a request whose time is over."""
    seconds = service.rules.limits.timeout
    text = f"The answer took more than {seconds:g} seconds: ask for fewer tokens."
    return ApiError(504, text, kind="server_error")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def event_text(content: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _page_file(name: str) -> Response:
    files = {file.name: file for file in PAGE.iterdir() if file.is_file()} if PAGE.is_dir() else {}
    if name not in files:
        raise HTTPException(404)
    return FileResponse(files[name], headers=_PAGE_HEADERS)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers=headers)


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: "There is no such address here.", 405: "This address takes another method."}
    body = ApiError(error.status_code, text.get(error.status_code, "The request is refused.")).body
    return JSONResponse(body, error.status_code)


async def _unforeseen(_request: Request, _error: Exception) -> Response:
    body = ApiError(500, "The server failed: see its log.", kind="server_error").body
    return JSONResponse(body, 500)
