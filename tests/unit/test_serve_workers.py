"""Answers of a server's workers are those of its own engine, whoever dies."""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from helpers.models import saved_model
from helpers.thread_workers import ThreadHandle, never

from pvec.backends.hf.backend import HFBackend
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.pool.cluster import model_order
from pvec.backends.pool.pool import Pool
from pvec.errors import ModelError
from pvec.models.files import ModelSpec
from pvec.models.load import inspect_model
from pvec.serve.answers import Answer, Delta, InternalError, Outcome
from pvec.serve.engine import Engine
from pvec.serve.pool_engine import PoolEngine
from pvec.serve.rules import Alarm
from pvec.settings import Settings
from pvec.types import Instruction, Request, Sampling

VECTOR = np.random.default_rng(2).normal(size=32).astype(np.float32)
DIRECTIONS = [(2, VECTOR / np.linalg.norm(VECTOR))]
LIMIT = 40
Dies = Callable[[str, tuple[Any, ...]], bool]


@dataclass
class Inbox:
    """What an engine delivers."""

    pieces: dict[str, list[str]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, events: list[Delta | Outcome]) -> None:
        with self.arrived:
            for event in events:
                name = event.answer.request.id
                assert name not in self.outcomes, "something came after the end"
                if isinstance(event, Delta):
                    self.pieces.setdefault(name, []).extend(event.pieces)
                    assert len(event.projections) == len(event.pieces)
                else:
                    self.outcomes[name] = event
            self.arrived.notify_all()

    def wait(self, until: Callable[[], object]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(until, 30)


def answers(*, number: int = 8, limit: int = LIMIT) -> list[Answer]:
    """Every other one streams, a third is steered, one is capped by an alarm."""
    draw = random.Random(1)
    steering = (Instruction(vector=VECTOR, layer=2, coef=0.5),)
    cap = Instruction(vector=VECTOR, layer=2, coef=-1.0, operator="cap", positions="all")
    return [
        Answer(
            request=Request(
                id=f"a{i}",
                prompt_ids=tuple(draw.randrange(5, 200) for _ in range(3 + i)),
                sampling=Sampling(max_tokens=limit + 1, seed=i),
                steering=steering if i % 3 == 0 else (),
            ),
            limit=limit,
            stream=i % 2 == 0,
            index=i,
            alarms=[(0, Alarm(vector="v", level=-9.0, cap=cap))] if i == 4 else [],
        )
        for i in range(number)
    ]


@contextmanager
def pool_engine(
    inbox: Inbox,
    *,
    size: int = 2,
    dies: Dies = never,
    notes: list[str] | None = None,
    retries: int = 3,
) -> Iterator[PoolEngine]:
    spec = ModelSpec(model=str(saved_model("qwen2")))
    metadata = inspect_model(spec)
    order = model_order(spec, Settings(), fingerprint=metadata.fingerprint)
    notify = (notes if notes is not None else []).append
    pool = Pool(lambda _: ThreadHandle(dies), size=size, notify=notify)
    with (
        PoolBackend(pool, order, metadata=metadata, retries=retries) as backend,
        PoolEngine(backend, DIRECTIONS, deliver=inbox) as engine,
    ):
        yield engine


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    inbox = Inbox()
    with HFBackend(str(saved_model("qwen2"))) as backend:
        batch, tokenizer = backend.live(DIRECTIONS), backend.tokenizer
        with Engine(batch, tokenizer, deliver=inbox) as engine:
            engine.submit(answers())
            inbox.wait(lambda: len(inbox.outcomes) == 8)
    assert inbox.outcomes["a4"].capped == ("v",)
    return inbox.outcomes


def check(inbox: Inbox, expected: dict[str, Outcome]) -> None:
    for name, outcome in inbox.outcomes.items():
        other = expected[name]
        assert outcome.token_ids == other.token_ids
        assert (outcome.text, outcome.reason) == (other.text, other.reason)
        assert (outcome.touched, outcome.capped) == (other.touched, other.capped)
        np.testing.assert_allclose(outcome.projections, other.projections, rtol=1e-4, atol=1e-5)
        assert inbox.pieces.get(name, list(other.pieces)) == other.pieces
    assert inbox.pieces.keys() == {name for name in inbox.outcomes if int(name[1:]) % 2 == 0}


def test_answers_are_those_of_one_engine(alone: dict[str, Outcome]) -> None:
    inbox, notes = Inbox(), []  # type: ignore[var-annotated]
    with pool_engine(inbox, notes=notes) as engine:
        engine.submit(answers())
        inbox.wait(lambda: len(inbox.outcomes) == 8)
        assert 1 <= engine.workers <= 2
        (unfit,) = answers(number=1)
        engine.submit([replace(unfit, request=replace(unfit.request, id="b", prompt_ids=()))])
        inbox.wait(lambda: "b" in inbox.outcomes)
    error = inbox.outcomes.pop("b").error
    assert isinstance(error, ModelError)
    assert "prompt of 'b' is empty" in str(error)
    check(inbox, alone)


def test_a_death_changes_nothing_of_what_clients_get(alone: dict[str, Outcome]) -> None:
    inbox, notes, delivered = Inbox(), [], []  # type: ignore[var-annotated]

    def dies(method: str, args: tuple[Any, ...]) -> bool:
        if method == "ask" and len(inbox.pieces.get("a0", ())) > 5 and len(delivered) < 2:
            delivered.append(len(inbox.pieces["a0"]))  # both workers die, so also that of a0
            return True
        return False

    with pool_engine(inbox, dies=dies, notes=notes) as engine:
        engine.submit(answers())
        inbox.wait(lambda: len(inbox.outcomes) == 8)
    assert len([note for note in notes if "died" in note and "goes to another" in note]) == 2
    assert all(5 < count < len(alone["a0"].pieces) for count in delivered)
    check(inbox, alone)


def test_a_stream_that_would_go_on_otherwise_ends_with_an_error() -> None:
    inbox, killed = Inbox(), []  # type: ignore[var-annotated]

    def dies(method: str, args: tuple[Any, ...]) -> bool:
        if method == "ask" and inbox.pieces and not killed:
            (item,) = engine._items.values()
            item.sent[0] += "?"  # as if the first worker had drawn another token
            killed.append(method)
            return True
        return False

    with pool_engine(inbox, dies=dies) as engine:
        engine.submit(answers(number=1))
        inbox.wait(lambda: inbox.outcomes)
    assert inbox.outcomes["a0"].reason == "error"
    assert "another gave other tokens" in str(inbox.outcomes["a0"].error)


def test_an_answer_that_no_worker_survives_ends_alone(alone: dict[str, Outcome]) -> None:
    def dies(method: str, args: tuple[Any, ...]) -> bool:
        orders = args[2] if method == "ask" and args[1] == "exchange" else ()
        return any(order.request.id == "a1" for order in orders)

    inbox = Inbox()
    with pool_engine(inbox, size=1, dies=dies, retries=2) as engine:
        engine.submit(answers(number=4))
        inbox.wait(lambda: len(inbox.outcomes) == 4)
    error = inbox.outcomes.pop("a1").error
    assert isinstance(error, InternalError)
    assert "2 workers died of this answer" in str(error)
    check(inbox, alone)


def test_answers_are_cancelled_wherever_they_are() -> None:
    inbox = Inbox()
    with pool_engine(inbox) as engine:
        running, other = answers(number=2, limit=4000)
        engine.submit([running, other])
        inbox.wait(lambda: inbox.pieces)
        engine.cancel(running)
        inbox.wait(lambda: "a0" in inbox.outcomes)
        engine.cancel(running)  # it has ended already
        assert inbox.outcomes["a0"].reason == "cancelled"
        assert list(inbox.outcomes) == ["a0"]
    assert str(inbox.outcomes["a1"].error) == "The server was stopped."


def test_workers_that_all_die_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvec.backends.pool.pool._BARREN", 1)
    inbox = Inbox()
    with pool_engine(inbox, size=1, dies=lambda method, _: method == "ask") as engine:
        engine.submit(answers(number=2))
        inbox.wait(lambda: len(inbox.outcomes) == 2)
        assert "died one after the other" in str(engine.failure)
        (late,) = answers(number=1)
        engine.submit([replace(late, request=replace(late.request, id="c"))])
        inbox.wait(lambda: "c" in inbox.outcomes)
    errors = {str(outcome.error) for outcome in inbox.outcomes.values()}
    assert errors == {"The server failed: see its log."}


def test_an_answer_is_as_old_in_another_process_whose_clock_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (answer,) = answers(number=1)
    answer.created -= 5
    sent = pickle.dumps(answer)
    now = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    arrived = pickle.loads(sent)
    assert now - arrived.created == pytest.approx(5, abs=1)
    assert arrived.request.prompt_ids == answer.request.prompt_ids
