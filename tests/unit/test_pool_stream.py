"""A driver holds what its workers hold, and no more, however many rows pass through it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pvec.backends.base import Backend
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.pool.cluster import model_order
from pvec.backends.pool.pool import Pool
from pvec.backends.pool.worker import ModelOrder, Worker
from pvec.models.files import ModelSpec
from pvec.models.load import inspect_model
from pvec.settings import Settings
from pvec.types import Generation, ModelInfo, Request, Sampling, SpanMeans, TokenSpans

ROWS, AT_ONCE, WORKERS = 6000, 64, 2


class InstantBackend(Backend):
    """Answers at once, and keeps nothing."""

    info = ModelInfo(
        id="instant", fingerprint="", num_layers=5, hidden_size=8, dtype="float32", device="cpu"
    )
    rows_at_once = AT_ONCE

    @classmethod
    def from_settings(cls, *_: Any, **__: Any) -> InstantBackend:
        return cls()

    def generate(self, requests: Any) -> Iterator[Generation]:
        for request in requests:
            yield Generation(id=request.id, token_ids=(1,), text="a", finish_reason="stop")

    def capture(self, sequences: Any, **_: Any) -> Iterator[SpanMeans]:
        for sequence in sequences:
            yield SpanMeans(id=sequence.id, layers=(1,), means={}, norms={})

    def continuation_logprobs(self, *_: Any) -> Iterator[Any]:
        yield from ()

    def close(self) -> None:
        pass


class InstantWorker(Worker):
    def _load(self, order: ModelOrder) -> Backend:
        return InstantBackend()


class Thread:
    def __init__(self) -> None:
        self._worker, self._thread = InstantWorker(), ThreadPoolExecutor(1)

    def submit(self, method: str, *args: Any, **options: Any) -> Future[Any]:
        return self._thread.submit(getattr(self._worker, method), *args, **options)

    def kill(self) -> None:
        self._thread.shutdown(wait=False)


@pytest.fixture
def backend() -> Iterator[PoolBackend]:
    spec = ModelSpec(model="tiny")
    metadata = inspect_model(spec)
    order = model_order(spec, Settings(), fingerprint=metadata.fingerprint)
    pool = Pool(lambda _: Thread(), size=WORKERS)
    with PoolBackend(pool, order, metadata=metadata) as opened:
        yield opened


@pytest.mark.parametrize("method", ["generate", "capture"])
def test_rows_are_drawn_as_the_workers_have_room_for_them(
    method: str, backend: PoolBackend
) -> None:
    drawn = 0

    def rows() -> Iterator[Any]:
        nonlocal drawn
        for drawn in range(1, ROWS + 1):
            if method == "generate":
                yield Request(id=str(drawn), prompt_ids=(5,), sampling=Sampling(max_tokens=1))
            else:
                yield TokenSpans(id=str(drawn), token_ids=(5,), spans={"response": (0, 1)})

    ahead, seen = 0, set()
    for result in getattr(backend, method)(rows()):
        seen.add(result.id)
        ahead = max(ahead, drawn - len(seen))
    assert len(seen) == ROWS
    room = AT_ONCE * 3 // 2 + 1 if method == "generate" else 1024
    assert ahead <= 2 * WORKERS * room < ROWS, "as many wait as the workers hold"
