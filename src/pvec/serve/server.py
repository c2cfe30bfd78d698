"""Starts a server and stops it: everything is checked before a port is opened."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING

from pvec.backends.session import ModelSession, Notify, require_this_process
from pvec.errors import InputError, install_command
from pvec.runs.files import os_error_sentence
from pvec.settings import Settings
from pvec.types import Progress

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pvec.serve.rules import Rules
    from pvec.serve.service import AnswerLog, Service

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server can be reached, and what it serves."""

    url: str
    model: str
    vectors: tuple[str, ...]


OnReady = Callable[[Listening, Callable[[], None]], None]
"""Called when requests are taken, with a function that stops the server as SIGTERM does."""


def serve(
    settings: Settings,
    vectors: Sequence[str],
    *,
    notify: Notify,
    on_progress: Callable[[Progress], None],
    on_ready: OnReady,
) -> None:
    """Serve a model until SIGINT or SIGTERM; answers under way are finished then.

    ``vectors`` are files, runs or ``NAME=FILE``. ``on_ready`` is called when requests are taken.
    Raises ``InputError`` or ``ModelError`` for what cannot be served.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise InputError(
            f"pvec serve needs {' and '.join(missing)}, not installed: {install_command('serve')}."
        )
    if settings.backend.name == "vllm":
        remedy = ", and start one server per GPU behind a load balancer"
        require_this_process(settings, "pvec serve --backend vllm", remedy=remedy)
    else:
        backend = settings.backend.model_copy(update={"name": "hf"})
        settings = settings.model_copy(update={"backend": backend})
    from pvec.serve.app import is_loopback
    from pvec.serve.rules import make_rules
    from pvec.serve.service import AnswerLog
    from pvec.serve.vectors import load_served_vectors

    if not is_loopback(settings.serve.host) and settings.serve.api_key is None:
        notify("anyone who can reach this machine can use the server: set PVEC_SERVE__API_KEY")
    with contextlib.ExitStack() as stack:
        session = ModelSession(settings, notify=notify, on_progress=on_progress)
        stack.enter_context(session)
        served = load_served_vectors(session, vectors, kind=settings.steer.kind)
        rules = make_rules(
            served,
            num_layers=session.metadata.num_layers,
            serve=settings.serve,
            steer=settings.steer,
        )
        options = settings.serve
        log = None
        if options.log is not None:
            log = stack.enter_context(AnswerLog(options.log, text=options.log_text))
        listener = stack.enter_context(_listening(options.host, options.port))
        asyncio.run(_run(session, rules, listener, log=log, on_ready=on_ready))


async def _run(
    session: ModelSession,
    rules: Rules,
    listener: socket.socket,
    *,
    log: AnswerLog | None,
    on_ready: OnReady,
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Tells when it listens; after a signal it stops once the answers under way are done."""

        stop_at = math.inf

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                names = tuple(rules.vectors)
                listening = Listening(url=_url(listener), model=service.name, vectors=names)
                on_ready(listening, lambda: self.handle_exit(signal.SIGTERM, None))

        def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
            if service.draining:  # a second signal waits for nothing
                self.should_exit = self.force_exit = True
            service.draining = True
            self.stop_at = time.monotonic() + rules.limits.drain

        async def on_tick(self, counter: int) -> bool:
            if service.failure or (
                service.draining and (service.active == 0 or time.monotonic() > self.stop_at)
            ):
                self.should_exit = True
            return await super().on_tick(counter)

    async with _service(session, rules, log=log) as (service, app):
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        await Server(config).serve(sockets=[listener])
        if service.failure:
            raise service.failure


@asynccontextmanager
async def _service(
    session: ModelSession, rules: Rules, *, log: AnswerLog | None
) -> AsyncIterator[tuple[Service, FastAPI]]:
    """Load the model, before the first request, and give what serves it and its application."""
    if session.choice.name == "vllm":
        from pvec.serve.vllm.start import vllm_service

        async with vllm_service(session, rules, log=log) as both:
            yield both
        return
    from pvec.serve.app import make_hf_app
    from pvec.serve.hf_service import HFService

    _ = session.backend
    with HFService(session, rules, log=log) as service:
        yield service, make_hf_app(service)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Hold the socket, not yet listening. Raises ``InputError`` when the port cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                raise InputError(
                    f"The server cannot listen on {host} port {port} "
                    f"({os_error_sentence(error).rstrip('.')}): use another --port or --host."
                ) from None
            yield listener
    except socket.gaierror:
        raise InputError(f"There is no address {host!r} here: use another --host.") from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
