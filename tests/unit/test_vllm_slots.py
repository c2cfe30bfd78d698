"""Slots, rows and segments: who holds what, and nothing is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pvec.backends.vllm.slots import Rows, Slots, cut
from pvec.backends.vllm.token_rows import OPEN_END


def test_requests_that_are_steered_alike_share_a_slot() -> None:
    written: list[int] = []
    slots = Slots(2)
    assert [slots.acquire(plan, written.append) for plan in "aaba"] == [1, 1, 2, 1]
    assert written == [1, 2]


def test_a_slot_is_reused_only_when_its_last_holder_is_gone() -> None:
    slots = Slots(1)
    slots.acquire("a", lambda _slot: None)
    slots.acquire("a", lambda _slot: None)
    slots.release("a")
    assert slots.acquire("b", lambda _slot: None) is None
    slots.release("a")
    assert slots.acquire("b", lambda _slot: None) == 1
    assert slots.loads == 2


def test_a_plan_that_comes_back_is_not_written_again() -> None:
    slots = Slots(2)
    for plan in "abab":
        slots.acquire(plan, lambda _slot: None)
        slots.release(plan)
    assert slots.loads == 2
    assert slots.held == 0


def test_thousands_of_plans_pass_through_few_slots() -> None:
    draw = random.Random(0)
    content: dict[int, str] = {}
    slots, held = Slots(5), []
    for number in range(3000):
        plan = f"plan{draw.randrange(400)}"
        slot = slots.acquire(plan, lambda place, plan=plan: content.__setitem__(place, plan))
        while slot is None:
            slots.release(held.pop(draw.randrange(len(held))))
            slot = slots.acquire(plan, lambda place, plan=plan: content.__setitem__(place, plan))
        assert content[slot] == plan, number
        held.append(plan)
        assert len(set(held)) == slots.held <= 5


def test_rows_are_handed_out_once_and_row_zero_never() -> None:
    rows = Rows(8)
    first, second = rows.acquire(3), rows.acquire(4)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == list(range(1, 8))
    assert rows.acquire(1) is None
    rows.release(first)
    assert set(rows.acquire(3) or ()) == set(first)


@pytest.mark.parametrize(
    "spans",
    [
        {"prompt": (0, 6), "prompt_last": (5, 6), "response": (6, OPEN_END)},
        {"prompt": (0, 1), "prompt_last": (0, 1), "response": (1, 9)},
        {"prompt": (0, 6), "prompt_last": (5, 6), "response": (8, 8)},
        {"prompt": (2, 7), "prompt_last": (6, 7), "response": (4, 12)},
        {"response": (3, 5)},
        {"prompt": (0, 0)},
    ],
)
def test_spans_are_the_sum_of_their_segments(spans: Any) -> None:
    segments = cut(spans)
    rows = segments.rows([10 + k for k in range(len(segments.covered))])
    row_of = dict(zip(segments.covered, range(10, 99), strict=False))
    for place in range(15):
        row = rows[sum(edge <= place for edge in segments.edges)]
        inside = {name for name, (start, stop) in spans.items() if start <= place < stop}
        assert {
            n for n, parts in segments.members.items() if row in [row_of[k] for k in parts]
        } == (inside)
        assert (row == 0) == (not inside)
    lengths = segments.lengths(11)
    for name, parts in segments.members.items():
        start, stop = spans[name]
        assert sum(lengths[k] for k in parts) == max(min(stop, 11) - min(start, 11), 0)
