"""A real server of the bundled model on a free port, in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pvec.serve.server import Listening, serve
from pvec.settings import Settings
from tests.helpers.frozen_commands import OLD

EVIL = OLD / "extract" / "vectors" / "evil.safetensors"


@dataclass(frozen=True)
class Running:
    """A server that runs; ``stop`` does what SIGTERM does."""

    url: str
    stop: Callable[[], None]


@contextmanager
def running_server(
    *, vectors: Sequence[str] = (f"evil={EVIL}",), **options: Any
) -> Iterator[Running]:
    """Serve with these settings of the section ``serve``; wait for its end on leaving."""
    settings = Settings.model_validate({"serve": {"port": 0, **options}})
    ready = threading.Event()
    up: list[tuple[Listening, Callable[[], None]]] = []
    failed: list[BaseException] = []

    def on_ready(listening: Listening, stop: Callable[[], None]) -> None:
        up.append((listening, stop))
        ready.set()

    def run() -> None:
        try:
            serve(settings, vectors, notify=_ignore, on_progress=_ignore, on_ready=on_ready)
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    if failed:
        raise failed[0]
    ((listening, stop),) = up
    try:
        yield Running(listening.url, stop)
    finally:
        stop()
        thread.join()
    assert not failed, failed


def _ignore(_: object) -> None:
    pass
