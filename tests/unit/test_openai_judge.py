"""The parts of the server judge that need no server: waits, pacing, and who is asked."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC, datetime

import pytest

from pvec.judges.openai import OpenAIJudge
from pvec.judges.pacing import Pacer, Patience, retry_after

NOON = datetime(2025, 6, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": "Sun, 01 Jun 2025 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Sun, 01 Jun 2025 11:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_understood_in_all_its_forms(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after(headers, now=NOON) == seconds


def test_waits_double_up_to_a_ceiling_with_jitter() -> None:
    patience = Patience(first_wait=1.0, longest_wait=10.0, jitter=random.Random(0))
    for failures, longest in ((1, 1), (2, 2), (4, 8), (5, 10), (5000, 10)):
        waits = {patience.wait(failures) for _ in range(50)}
        assert len(waits) > 1
        assert longest / 2 <= min(waits) <= max(waits) <= longest


def test_a_burst_of_429_halves_the_limit_once() -> None:
    pacer = Pacer(start=16, most=64)
    began = time.monotonic()
    for _ in range(10):
        pacer.overloaded(began=began, pause=0.0)
    assert pacer.limit == 8.0
    pacer.overloaded(began=time.monotonic(), pause=0.0)
    assert pacer.limit == 4.0
    for _ in range(10):
        pacer.overloaded(began=time.monotonic(), pause=0.0)
    assert pacer.limit == 1.0


def test_the_limit_grows_by_about_one_per_round_up_to_the_ceiling() -> None:
    async def grow() -> None:
        pacer = Pacer(start=4, most=6)
        for _ in range(5):
            pacer.succeeded()
        assert 5.0 <= pacer.limit < 5.5
        for _ in range(100):
            pacer.succeeded()
        assert pacer.limit == 6.0

    asyncio.run(grow())


def test_no_more_than_the_limit_are_in_flight_and_all_get_their_turn() -> None:
    async def crowd() -> tuple[int, int]:
        pacer = Pacer(start=3, most=3)
        now = most = done = 0

        async def one() -> None:
            nonlocal now, most, done
            async with pacer.slot():
                now += 1
                most = max(most, now)
                await asyncio.sleep(0)
                now -= 1
                done += 1

        tasks = [asyncio.create_task(one()) for _ in range(50)]
        await asyncio.sleep(0)
        tasks[20].cancel()  # one that waits: its turn must not be lost
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, done

    assert asyncio.run(crowd()) == (3, 49)


def test_a_stopped_pacer_wakes_everyone_at_once() -> None:
    async def stopped() -> None:
        pacer = Pacer(start=1, most=1)
        pacer.overloaded(began=time.monotonic(), pause=1000.0)

        async def one() -> None:
            async with pacer.slot():
                await pacer.sleep(1000.0)

        tasks = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0)
        pacer.stop()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)

    asyncio.run(stopped())


def test_a_judge_is_named_by_model_and_host_without_secrets() -> None:
    plain = OpenAIJudge("gpt-x", key="sk-1")
    assert plain.name == "openai:gpt-x@api.openai.com"
    own = OpenAIJudge("m", base_url="http://me:secret@box:8000/v1?token=abc", key="sk-2")
    assert own.name == "openai:m@box:8000"
    assert own.stopped is None
    assert own.notes == ()


def test_a_judge_inside_a_running_loop_works_as_in_a_notebook() -> None:
    from tests.helpers.judge_server import JudgeServer

    async def cell() -> None:
        with JudgeServer() as server, OpenAIJudge("judge", base_url=server.url) as judge:
            judge.check()

    asyncio.run(cell())
