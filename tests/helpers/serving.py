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
    """A server that runs; ``stop`` does what SIGTERM does.

    ``end_tokens``: how many tokens ``usage`` counts for the end of an answer that ends by itself.
    """

    url: str
    stop: Callable[[], None]
    end_tokens: int = 0


VLLM = {
    "name": "vllm",
    "vllm": {"kv_cache_memory_bytes": 2**26, "block_size": 32, "enforce_eager": True,
             "max_num_seqs": 64, "slots": 8},
}  # fmt: skip
"""The settings of a small vLLM engine."""


@contextmanager
def running_server(
    *,
    vectors: Sequence[str] = (f"evil={EVIL}",),
    backend: str = "hf",
    workers: str = "",
    notes: list[str] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Serve with these settings of the section ``serve``; wait for its end on leaving.

    ``notes`` receives what the server tells its operator.
    """
    engine = VLLM if backend == "vllm" else {"name": backend}
    settings = Settings.model_validate(
        {"serve": {"port": 0, **options}, "backend": engine, "pool": {"workers": workers}}
    )
    notify = _ignore if notes is None else notes.append
    ready = threading.Event()
    up: list[tuple[Listening, Callable[[], None]]] = []
    failed: list[BaseException] = []

    def on_ready(listening: Listening, stop: Callable[[], None]) -> None:
        up.append((listening, stop))
        ready.set()

    def run() -> None:
        try:
            serve(settings, vectors, notify=notify, on_progress=_ignore, on_ready=on_ready)
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
        yield Running(listening.url, stop, end_tokens=int(backend == "vllm"))
    finally:
        stop()
        thread.join()
    assert not failed, failed


def _ignore(_: object) -> None:
    pass
