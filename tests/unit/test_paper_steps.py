"""The paper in miniature: steps that are done once, and when a figure agrees."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.paper.numbers import Check, over_seeds, overall
from examples.paper.steps import Step

DONE: list[str] = []


@pytest.fixture(autouse=True)
def nothing_done() -> Iterator[None]:
    DONE.clear()
    yield
    DONE.clear()


def count(folder: Path, *, name: str, **rest: Any) -> dict[str, Any]:
    DONE.append(name)
    (folder / "made").touch()
    return {"name": name, **rest}


def interrupted(folder: Path, *, name: str) -> dict[str, Any]:
    if not (folder / "half").exists():
        (folder / "half").touch()
        raise KeyboardInterrupt
    return {"name": name}


def chain(out: Path, *, dose: int = 1) -> list[Step]:
    first = Step(folder=out / "first", work=count, arguments={"name": "first", "dose": dose})
    second = Step(folder=out / "second", work=count, arguments={"name": "second"}, after=(first,))
    third = Step(folder=out / "third", work=count, arguments={"name": "third"})
    return [first, second, third]


def do(steps: list[Step]) -> None:
    for step in steps:
        if step.result() is None:
            step.run()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    do(chain(tmp_path))
    do(chain(tmp_path))
    assert DONE == ["first", "second", "third"]
    assert chain(tmp_path)[0].result() == {"name": "first", "dose": 1}


def test_a_changed_setting_redoes_the_piece_and_what_follows_from_it(tmp_path: Path) -> None:
    do(chain(tmp_path))
    (tmp_path / "first" / "stale").touch()
    DONE.clear()
    do(chain(tmp_path, dose=2))
    assert DONE == ["first", "second"]
    assert not (tmp_path / "first" / "stale").exists()


def test_an_interrupted_piece_goes_on_in_its_folder(tmp_path: Path) -> None:
    step = Step(folder=tmp_path / "one", work=interrupted, arguments={"name": "one"})
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert step.result() is None
    assert step.run() == {"name": "one"}
    assert step.result() == {"name": "one"}


def test_the_interval_over_seeds_is_students(tmp_path: Path) -> None:
    values = [3.0, 5.0, 10.0]
    low, high = stats.t.interval(0.95, 2, loc=6.0, scale=stats.sem(values))
    found = over_seeds(values)
    assert (found.mean, found.n) == (6.0, 3)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((9.0, 10.0, 11.0), "agrees"),
        ((-9.0, -10.0, -11.0), "disagrees"),
        ((-9.0, 10.0, 11.0), "cannot tell"),
        ((10.0,), "cannot tell"),
    ],
)
def test_a_check_is_told_by_its_whole_interval(values: tuple[float, ...], verdict: str) -> None:
    assert Check(what="", values=values).verdict == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((-1.0, 0.0, 1.0), "agrees"),
        ((29.0, 30.0, 31.0), "disagrees"),
        ((-31.0, -30.0, -29.0), "disagrees"),
        ((9.0, 10.0, 11.0), "cannot tell"),
    ],
)
def test_an_effect_that_should_be_absent_is_bounded_on_both_sides(
    values: tuple[float, ...], verdict: str
) -> None:
    assert Check(what="", values=values, bound=10, side="within").verdict == verdict


@pytest.mark.parametrize(
    ("values", "side", "outcome"),
    [
        ((10.0,), "above", "same side"),
        ((-10.0,), "above", "other side"),
        ((3.0,), "within", "same side"),
        ((-30.0,), "within", "other side"),
        ((9.0, 10.0, 11.0), "above", "agrees"),
    ],
)
def test_one_seed_has_no_verdict_but_a_side(
    values: tuple[float, ...], side: Literal["above", "within"], outcome: str
) -> None:
    check = Check(what="", values=values, bound=10 if side == "within" else 0, side=side)
    assert check.outcome == outcome
    assert overall([check]) == outcome


def test_a_figure_of_one_seed_is_on_the_other_side_as_soon_as_one_check_is() -> None:
    same, other = Check(what="", values=(1.0,)), Check(what="", values=(-1.0,))
    assert overall([same, same]) == "same side"
    assert overall([same, other]) == "other side"


def test_one_check_that_disagrees_makes_the_figure_disagree() -> None:
    good, bad, open_ = (
        Check(what="", values=values) for values in ((9.0, 10.0), (-9.0, -9.1), (-9.0, 10.0))
    )
    good = Check(what="", values=(9.9, 10.0))
    assert overall([good]) == "agrees"
    assert overall([good, open_]) == "cannot tell"
    assert overall([good, open_, bad]) == "disagrees"
