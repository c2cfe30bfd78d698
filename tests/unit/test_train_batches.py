"""Which rows make a step: random, the same for every layout, and each exactly once."""

from __future__ import annotations

import random

import pytest

from pvec.errors import InputError
from pvec.training.batches import StepOrder, plan_batches

LENGTHS = random.Random(0).choices(range(8, 200), k=100)


def order(*, by_length: bool, epoch: int = 0, seed: int = 0) -> StepOrder:
    made = StepOrder(LENGTHS, size=16, seed=seed, by_length=by_length)
    made.start_epoch(epoch)
    return made


def test_every_row_comes_once_in_each_epoch() -> None:
    for epoch in range(3):
        assert sorted(order(by_length=True, epoch=epoch)) == list(range(len(LENGTHS)))


def test_the_layout_changes_no_step_but_its_order() -> None:
    plain, by_length = (order(by_length=b).steps() for b in (False, True))
    for one, two in zip(plain, by_length, strict=True):
        assert sorted(one) == sorted(two)
        assert [LENGTHS[i] for i in two] == sorted((LENGTHS[i] for i in one), reverse=True)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = list(order(by_length=False))
    assert first == list(order(by_length=False))
    assert first != list(order(by_length=False, epoch=1))
    assert first != list(order(by_length=False, seed=1))


def test_going_by_length_pads_less() -> None:
    options = {"size": 16, "micro": 4, "most_tokens": 10_000}
    by_length = plan_batches(LENGTHS, by_length=True, **options)
    plain = plan_batches(LENGTHS, by_length=False, **options)
    assert by_length.padding < 0.5 * plain.padding


def test_the_chosen_pass_fits_the_token_budget() -> None:
    for budget in (200, 400, 1600, 100_000):
        plan = plan_batches(LENGTHS, size=16, micro=None, most_tokens=budget)
        assert plan.micro == 1 or plan.micro * max(LENGTHS) <= budget
        assert plan.micro * plan.passes == 16


def test_rows_without_padding_go_through_one_pass() -> None:
    plan = plan_batches(LENGTHS, size=16, micro=None, most_tokens=100_000, padded=False)
    assert (plan.micro, plan.padding) == (16, 0.0)


def test_the_rows_of_a_step_are_shared_among_processes() -> None:
    plan = plan_batches(LENGTHS, size=16, micro=4, most_tokens=10_000, processes=2)
    assert (plan.micro, plan.passes, plan.steps_per_epoch) == (4, 2, 7)


@pytest.mark.parametrize(
    ("options", "part"),
    [({"micro": 3}, "batch.micro 3 does not divide"), ({"processes": 3}, "batch.size 16 does not")],
)
def test_what_does_not_divide_is_refused(options: dict[str, int], part: str) -> None:
    with pytest.raises(InputError, match=part):
        plan_batches(LENGTHS, size=16, most_tokens=10_000, **({"micro": None} | options))
