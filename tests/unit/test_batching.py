"""Plans of what is computed together."""

from __future__ import annotations

import numpy as np

from pvec.activations.batching import plan_window, prompt_length, rows_that_fit
from pvec.types import Instruction, TokenSpans


def sequence(
    name: str, prompt: int, answer: int, *, first: int = 0, steering: tuple[Instruction, ...] = ()
) -> TokenSpans:
    return TokenSpans(
        id=name,
        token_ids=(first,) * prompt + tuple(range(answer)),
        spans={"prompt": (0, prompt), "response": (prompt, prompt + answer)},
        steering=steering,
    )


def test_rows_fit_while_the_padded_batch_is_within_the_budget() -> None:
    assert rows_that_fit([10, 9, 8, 7], token_budget=30) == 3
    assert rows_that_fit([10, 9, 8, 7], token_budget=5) == 1
    assert rows_that_fit([1, 1, 10], token_budget=29) == 2
    assert rows_that_fit([5], token_budget=100) == 1


def test_the_prompt_ends_where_the_spans_say() -> None:
    ids = tuple(range(9))
    ends = [
        ({"prompt": (0, 4), "response": (6, 9)}, 4),
        ({"prompt_last": (3, 4), "response": (6, 9)}, 4),
        ({"response": (6, 9)}, 6),
        ({}, 9),
    ]
    for spans, end in ends:
        assert prompt_length(TokenSpans(id="", token_ids=ids, spans=spans)) == end


def test_prompts_are_shared_when_that_saves_enough() -> None:
    rows = [sequence(f"a{n}", 50, 20) for n in range(5)] + [sequence("lonely", 50, 20, first=7)]
    (shared, plain) = plan_window(rows, share=True)
    assert (shared.length, [len(g) for g in shared.groups]) == (50, [5])
    assert (plain.length, [[s.id for s in g] for g in plain.groups]) == (0, [["lonely"]])
    assert [work.length for work in plan_window(rows, share=False)] == [0]
    long_answers = [sequence(f"b{n}", 5, 400) for n in range(20)]
    assert [work.length for work in plan_window(long_answers, share=True)] == [0]


def test_prompts_under_different_steering_are_different() -> None:
    steering = (Instruction(vector=np.ones(4, dtype=np.float32), layer=1),)
    rows = [sequence(f"{n}{bool(s)}", 50, 20, steering=s) for n in range(3) for s in ((), steering)]
    groups = [g for work in plan_window(rows, share=True) if work.length for g in work.groups]
    assert sorted(len(group) for group in groups) == [3, 3]
    assert all(len({s.steering for s in group}) == 1 for group in groups)


def test_nothing_is_lost_or_doubled() -> None:
    rows = [sequence(f"{p}-{n}", 30 + p % 3, n, first=p) for p in range(7) for n in range(p)]
    works = plan_window(rows, share=True)
    planned = [s.id for work in works for group in work.groups for s in group]
    assert sorted(planned) == sorted(s.id for s in rows)
