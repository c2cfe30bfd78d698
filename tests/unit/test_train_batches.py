"""Which rows make a step: random, the same for every layout, and each exactly once."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard

from pvec.errors import InputError
from pvec.training.batches import BatchPlan, Layout, plan_batches

LENGTHS = random.Random(0).choices(range(8, 200), k=100)
LAYOUTS: dict[str, dict[str, Any]] = {
    "sorted": {},
    "sorted, micro": {"micro": 4},
    "random": {"by_length": False},
    "packed": {"padded": False},
}


def plan(
    lengths: list[int] = LENGTHS, *, processes: int = 1, seed: int = 0, **layout: Any
) -> BatchPlan:
    made = Layout(**({"most_tokens": 10_000} | layout))
    return plan_batches(lengths, size=16, layout=made, processes=processes, seed=seed)


def steps(plan: BatchPlan, *, rows: int = len(LENGTHS)) -> list[list[list[int]]]:
    """Put the passes of an epoch together to steps, as the Trainer does: so many, then the rest."""
    passes = list(plan.order)
    each = plan.passes * plan.processes
    assert len(passes) == len(plan.order)
    found = [passes[start : start + each] for start in range(0, len(passes), each)]
    assert len(found) == plan.steps_per_epoch
    assert sorted(i for one in found for part in one for i in part) == list(range(rows))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("rows", [5, 16, 33, 34, 97, 100])
def test_every_row_comes_once_and_every_process_has_as_many_passes(
    layout: str, processes: int, rows: int
) -> None:
    made = plan(LENGTHS[:rows], processes=processes, **LAYOUTS[layout])
    for epoch in range(2):
        made.order.start_epoch(epoch)
        for step in steps(made, rows=rows):
            assert len(step) % processes == 0
            assert all(step)


@pytest.mark.parametrize("rows", [33, 96, 97])
def test_accelerate_deals_every_pass_to_one_process(rows: int) -> None:
    made = plan(LENGTHS[:rows], processes=2)
    shares = [
        list(BatchSamplerShard(made.order, num_processes=2, process_index=n)) for n in range(2)
    ]
    assert len(shares[0]) == len(shares[1])
    assert sorted(i for share in shares for part in share for i in part) == list(range(rows))


def test_the_layout_changes_no_step_but_how_it_is_computed() -> None:
    found = [steps(plan(**options)) for options in LAYOUTS.values()]
    for one, *others in zip(*found, strict=True):
        rows = sorted(i for part in one for i in part)
        assert len(rows) in (16, 100 % 16)
        for other in others:
            assert sorted(i for part in other for i in part) == rows


def test_the_number_of_processes_changes_no_step() -> None:
    one, two = (steps(plan(processes=n)) for n in (1, 2))
    for mine, other in zip(one, two, strict=True):
        assert sorted(itertools.chain(*mine)) == sorted(itertools.chain(*other))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    made = plan()
    first = list(made.order)
    assert first == list(plan().order)
    made.order.start_epoch(1)
    assert first != list(made.order)
    assert first != list(plan(seed=1).order)


def least(lengths: list[int], passes: int) -> int:
    """Return what the best division of a step computes, by trying all."""
    ways = itertools.combinations(range(1, len(lengths)), passes - 1)
    return min(
        sum(lengths[a] * (b - a) for a, b in itertools.pairwise([0, *ends, len(lengths)]))
        for ends in ways
    )


def test_the_rows_of_a_step_are_divided_nearly_as_well_as_the_best_way() -> None:
    rng = random.Random(0)
    layout = Layout()
    ratios = []
    for _ in range(40):
        lengths = sorted((round(rng.lognormvariate(4, 0.9)) + 5 for _ in range(9)), reverse=True)
        for passes in range(1, 6):
            parts = layout.divided(lengths, passes)
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(9))
            assert len(parts) == passes
            computed = sum(lengths[part.start] * (part.stop - part.start) for part in parts)
            ratios.append(computed / least(lengths, passes))
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) < 1.02


def test_going_by_length_pads_less() -> None:
    as_drawn = plan(by_length=False, micro=4)
    assert plan(micro=4).padding < 0.5 * as_drawn.padding
    assert plan().padding < as_drawn.padding
    assert plan().passes < as_drawn.passes


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [150, 200, 400, 1600])
def test_no_pass_is_larger_than_the_token_budget_whatever_is_drawn(
    budget: int, padded: bool
) -> None:
    made = plan(most_tokens=budget, padded=padded)
    for epoch in range(20):
        made.order.start_epoch(epoch)
        for part in made.order:
            lengths = [LENGTHS[i] for i in part]
            tokens = max(lengths) * len(part) if padded else sum(lengths)
            assert len(part) == 1 or tokens <= budget
    assert made.most_tokens <= max(budget, *LENGTHS)


def test_rows_as_drawn_fit_the_token_budget_too() -> None:
    made = plan(most_tokens=900, by_length=False)
    assert (made.passes, made.most_tokens) == (4, 4 * max(LENGTHS))


def test_rows_without_padding_go_through_one_pass() -> None:
    made = plan(most_tokens=100_000, padded=False)
    assert (made.passes, made.padding) == (1, 0.0)


def test_passes_without_padding_are_shared_equally_among_processes() -> None:
    made = plan(LENGTHS[:96], most_tokens=100_000, padded=False, processes=2)
    passes = list(made.order)
    for one, two in zip(passes[::2], passes[1::2], strict=True):
        share = sum(LENGTHS[i] for i in one) / sum(LENGTHS[i] for i in (*one, *two))
        assert 0.35 < share < 0.65


def test_the_rows_of_a_step_are_shared_among_processes() -> None:
    made = plan(micro=4, processes=2)
    assert (made.passes, made.steps_per_epoch) == (2, 7)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"micro": 3}, "batch.micro 3 does not divide"),
        ({"processes": 3}, "batch.size 16 does not"),
        ({"lengths": [9], "processes": 2}, "1 training rows do not divide among 2 processes"),
    ],
)
def test_what_does_not_divide_is_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        plan(**options)
