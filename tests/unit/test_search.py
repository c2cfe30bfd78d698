"""The search against functions whose best allowed point is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pvec.errors import InputError
from pvec.evaluation import search as searching
from pvec.evaluation.conditions import Condition
from pvec.evaluation.search import Outcome, check_search, search
from pvec.settings.commands import SteerSettings
from pvec.steering.instructions import SteeringVector

pytest.importorskip("optuna", reason="pip install '.[search]'")

ROWS = np.ones((6, 4), dtype=np.float32)
VECTOR = SteeringVector(label="evil", rows=ROWS)


def outcome(condition: Condition) -> Outcome:
    """Layer 4 moves most; coherence falls below 75 above coefficient 1.5 of 3."""
    (layer,) = condition.layers
    strength = {1: 10, 2: 20, 3: 30, 4: 40, 5: 15}[layer] - (condition.positions == "all") * 5
    return Outcome(trait=strength * condition.coef, coherence=100 - 100 / 6 * condition.coef)


def found(
    number: int = 16, *, evaluate: Any = outcome, mean_kl: Any = None, **steer: Any
) -> list[tuple[Condition, Outcome]]:
    settings = SteerSettings(layer="1:5", coef="0.5,3", search=number, **steer)
    return search([VECTOR], settings, num_layers=5, seed=0, evaluate=evaluate, mean_kl=mean_kl)


def best(tried: list[tuple[Condition, Outcome]]) -> tuple[Condition, Outcome]:
    return max((t for t in tried if t[1].coherence >= 75), key=lambda t: t[1].trait)


def test_it_comes_near_the_best_point_under_the_limit_on_coherence() -> None:
    tried = found()
    assert len(tried) <= 16
    point, reached = best(tried)
    assert point.layers == (4,)
    assert reached.trait >= 0.85 * 60  # the best there is: layer 4, coefficient 1.5, response


def test_no_coefficient_beyond_the_limit_on_kl_is_tried() -> None:
    def kl(condition: Condition) -> float:
        return float(condition.coef**2 * condition.layers[0])

    tried = found(mean_kl=kl, max_kl=2.0)
    assert all(kl(point) <= 2.0 for point, _ in tried)
    point, _ = best(tried)
    assert kl(point) > 1.0, "and the best one makes use of it"


def test_the_same_outcomes_give_the_same_points() -> None:
    assert [point.name for point, _ in found(8)] == [point.name for point, _ in found(8)]


def test_positions_that_are_not_the_runs_are_in_the_name_and_steer() -> None:
    tried = found(6, positions="response", search_positions=("response", "all"))
    for point, _ in tried:
        (instruction,) = point.steering
        assert instruction.positions == (point.positions or "response")
        assert point.name.endswith("all") == (instruction.positions == "all")
    assert {point.positions for point, _ in tried} == {None, "all"}


def test_a_point_without_scores_does_not_stop_the_search() -> None:
    def some(condition: Condition) -> Outcome:
        whole = outcome(condition)
        return Outcome(trait=math.nan, coherence=math.nan) if condition.coef > 2 else whole

    tried = found(12, evaluate=some)
    assert any(math.isnan(o.trait) for _, o in tried) or all(p.coef <= 2 for p, _ in tried)
    assert best(tried)[1].trait > 0


@pytest.mark.parametrize(
    ("steer", "vectors", "message"),
    [
        ({}, 0, "--vector"),
        ({"judge": False}, 1, "--no-judge"),
        ({"operator": "ablate"}, 1, "grid"),
        ({"coef": "-2,-1"}, 1, "above 0"),
        ({"search_positions": ()}, 1, "--search-positions"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    steer: dict[str, Any], vectors: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_search(SteerSettings(search=5, **steer), vectors=vectors, questions=20)


def test_without_optuna_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\[search\]"):
        check_search(SteerSettings(search=5), vectors=1, questions=20)
