"""A pool without Ray: the workers are threads of this process, and die when a test says so."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.models import saved_model
from helpers.thread_workers import ThreadHandle, never

from pvec.backends.base import Backend
from pvec.backends.hf.backend import HFBackend
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.pool.cluster import model_order
from pvec.backends.pool.pool import Pool
from pvec.backends.pool.worker import Worker
from pvec.errors import InputError, ModelError
from pvec.models.files import ModelSpec
from pvec.models.load import inspect_model
from pvec.settings import Settings
from pvec.types import Generation, Instruction, Request, Sampling, SpanMeans, TokenSpans

ROWS = 24


def requests(number: int = ROWS) -> list[Request]:
    draw = random.Random(1)
    vector = np.random.default_rng(2).normal(size=32).astype(np.float32)
    steering = (Instruction(vector=vector, layer=2, coef=0.5),)
    return [
        Request(
            id=f"r{i}",
            prompt_ids=tuple(draw.randrange(5, 200) for _ in range(3 + i % 5)),
            sampling=Sampling(max_tokens=2 + i % 9, seed=i),
            steering=steering if i % 3 == 0 else (),
        )
        for i in range(number)
    ]


def sequences() -> list[TokenSpans]:
    return [
        TokenSpans(
            id=r.id, token_ids=r.prompt_ids * 2, spans={"response": (2, 2 * len(r.prompt_ids))}
        )
        for r in requests()
    ]


@pytest.fixture(scope="module")
def alone() -> Iterator[HFBackend]:
    with HFBackend(str(saved_model("qwen2"))) as backend:
        yield backend


Make = Callable[..., PoolBackend]


@pytest.fixture
def pool_of() -> Iterator[Make]:
    opened: list[PoolBackend] = []

    def make(
        workers: int = 2,
        dies: Callable[[str, tuple[Any, ...]], bool] = never,
        notes: list[str] | None = None,
    ) -> PoolBackend:
        spec = ModelSpec(model=str(saved_model("qwen2")))
        metadata = inspect_model(spec)
        pool = Pool(
            lambda _: ThreadHandle(dies),
            size=workers,
            notify=(notes if notes is not None else []).append,
        )
        order = model_order(spec, Settings(), fingerprint=metadata.fingerprint)
        opened.append(PoolBackend(pool, order, metadata=metadata))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


def by_id(answers: Iterator[Generation]) -> dict[str, Generation]:
    listed = list(answers)
    found = {answer.id: answer for answer in listed}
    assert len(found) == len(listed), "an answer came twice"
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_answers_are_those_of_one_process(pool_of: Make, alone: HFBackend, workers: int) -> None:
    assert by_id(pool_of(workers).generate(iter(requests()))) == by_id(alone.generate(requests()))


def same_means(found: Iterator[SpanMeans], expected: Iterator[SpanMeans]) -> None:
    mine, theirs = ({m.id: m for m in means} for means in (found, expected))
    assert mine.keys() == theirs.keys()
    for identity, means in mine.items():
        np.testing.assert_allclose(
            means.means["response"], theirs[identity].means["response"], rtol=1e-4, atol=1e-5
        )


def test_captures_and_scores_are_those_of_one_process(pool_of: Make, alone: HFBackend) -> None:
    pool = pool_of()
    same_means(pool.capture(iter(sequences())), alone.capture(sequences()))
    prompts = [r.prompt_ids for r in requests()]
    continuations = [(7, 8), (9,), (10, 11, 12)]
    here = dict(alone.continuation_logprobs(prompts, continuations))
    for index, logprobs in pool.continuation_logprobs(prompts, continuations):
        np.testing.assert_allclose(logprobs, here[index], rtol=1e-4, atol=1e-5)
    pairs = [(p, (7, 8, 9)) for p in [*prompts, *prompts]]
    there = dict(alone.answer_logprobs(pairs))
    found = dict(pool.answer_logprobs(pairs))
    assert found.keys() == there.keys()
    for index, logprobs in found.items():
        np.testing.assert_allclose(logprobs, there[index], rtol=1e-4, atol=1e-5)


def test_two_jobs_share_the_workers(pool_of: Make, alone: HFBackend) -> None:
    pool = pool_of()
    answers = pool.generate(requests())
    first = next(answers)
    same_means(pool.capture(sequences()), alone.capture(sequences()))
    rest = by_id(answers)
    assert {first.id: first, **rest} == by_id(alone.generate(requests()))


def test_a_caller_that_stops_early_leaves_the_workers_usable(
    pool_of: Make, alone: HFBackend
) -> None:
    pool = pool_of()
    answers = pool.generate(requests())
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert by_id(pool.generate(requests())) == by_id(alone.generate(requests()))


def test_random_deaths_change_nothing(pool_of: Make, alone: HFBackend) -> None:
    draw, deaths, notes = random.Random(3), [], []  # type: ignore[var-annotated]

    def dies(method: str, _args: tuple[Any, ...]) -> bool:
        if method == "exchange" and len(deaths) < 20 and draw.random() < 0.2:
            deaths.append(method)
        return method == "exchange" and len(deaths) > len([n for n in notes if "died" in n])

    pool = pool_of(2, dies, notes)
    assert by_id(pool.generate(requests())) == by_id(alone.generate(requests()))
    assert len([note for note in notes if "died" in note]) >= 3


def test_a_row_that_no_worker_survives_fails_alone(pool_of: Make, alone: HFBackend) -> None:
    def dies(method: str, args: tuple[Any, ...]) -> bool:
        return method == "exchange" and any(key == "r5" for key, _ in args[1])

    found = by_id(pool_of(2, dies).generate(requests()))
    expected = by_id(alone.generate(requests()))
    failed = found.pop("r5")
    del expected["r5"]
    assert found == expected
    assert failed.finish_reason == "failed"
    assert "3 workers failed that ran nothing else (last: killed by the test)" in failed.detail


def test_a_sequence_that_no_worker_survives_is_named(pool_of: Make) -> None:
    def dies(method: str, args: tuple[Any, ...]) -> bool:
        return method == "exchange" and any(key == "r5" for key, _ in args[1])

    with pytest.raises(ModelError, match="'r5' cannot be done: 3 workers failed"):
        list(pool_of(2, dies).capture(sequences()))


def too_large(monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
    """Let no memory be enough for rows with token 222."""
    run = kind.forward

    @functools.wraps(run)
    def forward(self: Any, input_ids: Any = None, **rest: Any) -> Any:
        if (input_ids == 222).any():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(kind, "forward", forward)


def test_a_row_that_has_no_memory_fails_alone(
    pool_of: Make, alone: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_id(alone.generate(r for r in requests() if r.id != "r5"))
    too_large(monkeypatch, type(alone.model))
    asked = [replace(r, prompt_ids=(222, 7, 8)) if r.id == "r5" else r for r in requests()]
    found = by_id(pool_of(2).generate(asked))
    failed = found.pop("r5")
    assert found == expected
    assert failed.finish_reason == "failed"
    assert "There is not enough memory for one answer" in failed.detail


def test_a_sequence_that_has_no_memory_is_named(
    pool_of: Make, alone: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large(monkeypatch, type(alone.model.model))
    long = TokenSpans(id="long", token_ids=(222, 7, 8), spans={"response": (1, 3)})
    with pytest.raises(ModelError, match=r"'long' cannot be done: .*A single sequence"):
        list(pool_of(2).capture([*sequences(), long]))


def test_workers_that_never_finish_anything_end_the_command(pool_of: Make) -> None:
    with pytest.raises(ModelError, match="none finished anything"):
        list(pool_of(2, lambda method, _: method == "exchange").generate(requests(4000)))


def test_an_error_of_a_worker_is_the_commands(pool_of: Make) -> None:
    bad = replace(requests(1)[0], prompt_ids=())
    with pytest.raises(ModelError, match="is empty"):
        list(pool_of().generate([*requests(), replace(bad, id="bad")]))


def test_two_requests_of_one_id_are_refused(pool_of: Make) -> None:
    with pytest.raises(InputError, match="Two items"):
        list(pool_of(1).generate([*requests(2), *requests(2)]))


def layers_of(backend: Backend, add: int) -> int:
    return backend.info.num_layers + add


def test_functions_run_in_the_workers(pool_of: Make) -> None:
    pool = pool_of(2)
    assert dict(pool.map(layers_of, [0, 10, 20])) == {0: 3, 1: 13, 2: 23}
    assert [answer for _, answer in pool.on_each(layers_of, 1)] == [4, 4]


def test_a_worker_with_other_weights_is_refused(pool_of: Make) -> None:
    spec = ModelSpec(model=str(saved_model("qwen2")))
    metadata = inspect_model(spec)
    pool = Pool(lambda _: ThreadHandle(never), size=1)
    order = model_order(spec, Settings(), fingerprint="another")
    with pytest.raises(ModelError, match="finds other weights"):
        PoolBackend(pool, order, metadata=metadata)


def test_a_worker_with_other_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(model=str(saved_model("qwen2")))
    metadata = inspect_model(spec)
    there = {"host": "node7", "pid": 1, "versions": {"torch": "1.0"}}
    monkeypatch.setattr(Worker, "describe", lambda _self: there)
    pool = Pool(lambda _: ThreadHandle(never), size=1)
    order = model_order(spec, Settings(), fingerprint=metadata.fingerprint)
    with pytest.raises(InputError, match=r"node7 has .*torch 1.0"):
        PoolBackend(pool, order, metadata=metadata)


def test_a_model_that_failed_does_not_stand_in_the_way_of_the_next(alone: HFBackend) -> None:
    """As in a grid, whose workers outlive a model that cannot be loaded."""
    spec = ModelSpec(model=str(saved_model("qwen2")))
    metadata = inspect_model(spec)
    with Pool(lambda _: ThreadHandle(never), size=2).hold() as pool:
        with pytest.raises(ModelError, match="finds other weights"):
            PoolBackend(pool, model_order(spec, Settings(), fingerprint="x"), metadata=metadata)
        good = Settings.model_validate({"backend": {"max_batch_rows": 64}})
        order = model_order(spec, good, fingerprint=metadata.fingerprint)
        with PoolBackend(pool, order, metadata=metadata) as backend:
            assert by_id(backend.generate(requests())) == by_id(alone.generate(requests()))


def test_a_model_that_two_sessions_opened_stays_until_both_closed_it(pool_of: Make) -> None:
    first = pool_of(1)
    spec = ModelSpec(model=str(saved_model("qwen2")))
    metadata = inspect_model(spec)
    order = model_order(spec, Settings(), fingerprint=metadata.fingerprint)
    PoolBackend(first.pool, order, metadata=metadata).close()
    assert len(list(first.generate(requests(3)))) == 3
