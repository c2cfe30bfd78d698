"""The numbers of a sweep: read on all questions, picked on half, reported on the other half."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pvec.evaluation.summary import (
    ScoredAnswer,
    SweepSummary,
    keep_summary,
    stored_summary,
    summarise,
)
from pvec.runs.store import Run

QUESTIONS = [f"q{i}" for i in range(8)]


def condition(
    name: str, role: str = "steered", *, layer: int = 2, coef: float = 1.0
) -> dict[str, Any]:
    steered = role in {"steered", "random"}
    vector = {"steered": "evil", "random": "random like evil"}.get(role, "")
    return {
        "name": name,
        "role": role,
        "vector": vector,
        "layers": [layer] if steered else [],
        "coef": coef,
    }


def answers(
    described: dict[str, Any], trait: Any, coherence: Any = 90.0, *, rollouts: int = 3
) -> list[ScoredAnswer]:
    """Answers whose scores are constants or functions of (question number, rollout)."""

    def at(value: Any, q: int, r: int) -> float | None:
        found = value(q, r) if callable(value) else value
        return None if found is None else float(found)

    return [
        ScoredAnswer(
            condition={**described, "rollout": r},
            question=question,
            text="",
            scores={"evil": at(trait, q, r), "coherence": at(coherence, q, r)},
        )
        for q, question in enumerate(QUESTIONS)
        for r in range(rollouts)
    ]


BASE = condition("unsteered", "baseline", coef=0.0)


def summary(*groups: list[ScoredAnswer]) -> SweepSummary:
    return summarise([answer for group in groups for answer in group], trait="evil")


def test_a_mean_rests_on_every_score_and_its_interval_on_questions() -> None:
    by_question = np.array([0, 10, 20, 30, 40, 50, 60, 70], dtype=float)
    numbers = summary(answers(BASE, lambda q, r: by_question[q] + r))
    score = numbers.point("unsteered").scores["evil"]
    assert score.mean == pytest.approx(36.0)
    assert score.n == 24
    # Student's t over 8 question means, which scores in the middle of the scale hardly differ from.
    low, high = scipy_stats.t.interval(0.95, 7, loc=36, scale=scipy_stats.sem(by_question))
    assert score.low == pytest.approx(low, abs=3.0)
    assert score.high == pytest.approx(high, abs=3.0)


def test_missing_scores_are_counted_and_in_no_mean() -> None:
    numbers = summary(answers(BASE, lambda q, r: None if r == 0 else 50))
    score = numbers.point("unsteered").scores["evil"]
    assert (score.mean, score.n, score.missing) == (50.0, 16, 8)


def test_a_condition_without_any_score_is_nan_and_never_picked() -> None:
    numbers = summary(
        answers(BASE, 5),
        answers(condition("broken", coef=2.0), None),
        answers(condition("fine"), 20),
    )
    assert math.isnan(numbers.point("broken").scores["evil"].mean)
    assert numbers.picks[0].point.name == "fine"


def test_differences_are_paired_by_question() -> None:
    """Questions differ widely; the effect on each is the same, so its interval is a point."""
    numbers = summary(
        answers(BASE, lambda q, r: 10 * q),
        answers(condition("steered"), lambda q, r: 10 * q + 7),
    )
    difference = numbers.point("steered").differences["evil"]
    assert difference.mean == pytest.approx(7)
    assert difference.low == pytest.approx(7)
    assert difference.high == pytest.approx(7)
    assert numbers.point("steered").scores["evil"].high > 50


def test_the_point_is_picked_on_odd_questions_and_read_on_even_ones() -> None:
    numbers = summary(
        answers(BASE, 0),
        answers(condition("lucky", coef=1.0), lambda q, r: 90 if q % 2 == 0 else 10),
        answers(condition("solid", coef=2.0), 60),
    )
    (pick,) = numbers.picks
    assert pick.point.name == "lucky"
    assert pick.held_out
    assert pick.point.scores["evil"].mean == 10
    assert (pick.questions_for_choice, pick.questions_for_reading) == (4, 4)


def test_an_incoherent_point_is_not_picked_however_strong() -> None:
    numbers = summary(
        answers(BASE, 0),
        answers(condition("word salad", coef=3.0), 99, 40),
        answers(condition("coherent"), 60, 76),
    )
    assert numbers.picks[0].point.name == "coherent"


def test_of_equal_points_the_smaller_dose_is_picked() -> None:
    numbers = summary(
        answers(BASE, 0),
        answers(condition("strong", coef=-3.0), 80),
        answers(condition("weak", coef=1.5), 80),
    )
    assert numbers.picks[0].point.name == "weak"


def test_when_nothing_stays_coherent_it_says_so() -> None:
    numbers = summary(answers(BASE, 0), answers(condition("salad"), 99, 10))
    assert numbers.picks == ()
    assert "evil" in numbers.unpicked[0]
    assert "75" in numbers.unpicked[0]


def test_the_control_is_the_random_vector_at_the_picked_point() -> None:
    numbers = summary(
        answers(BASE, 0),
        answers(condition("low", layer=1), 30),
        answers(condition("high", layer=2), 60),
        answers(condition("random low", "random", layer=1), 1),
        answers(condition("random high", "random", layer=2), 2),
    )
    control = numbers.picks[0].control
    assert control is not None
    assert control.name == "random high"


@pytest.mark.parametrize("stored", ["new", "old"])
def test_a_vector_whose_name_ends_like_anothers_has_its_own_control(stored: str) -> None:
    """With vectors ``unevil`` and ``evil`` the control of the one is not the other's."""

    def at(role: str, vector: str, trait: float) -> list[ScoredAnswer]:
        label = f"random like {vector}" if role == "random" else vector
        described = condition(f"{label} · layer 2 · coef 1", role) | {"vector": label}
        if stored == "new":
            described |= {"operator": "add", "control_of": vector if role == "random" else ""}
        return answers(described, trait)

    numbers = summary(
        answers(BASE, 0),
        at("steered", "unevil", 60),
        at("steered", "evil", 70),
        at("random", "unevil", 1),
        at("random", "evil", 2),
    )
    controls = {pick.vector: pick.control for pick in numbers.picks}
    assert {v: c.scores["evil"].mean for v, c in controls.items() if c} == {"evil": 2, "unevil": 1}
    for point in numbers.having("steered"):
        control = numbers.control_of(point)
        assert control is not None
        assert control.control_of == point.vector


def test_a_kept_summary_is_read_back_while_the_scores_are_the_same(tmp_path: Path) -> None:
    told = [*answers(BASE, 5), *answers(condition("steered"), None), *answers(condition("a"), 50)]
    limits = {"trait": "evil", "min_coherence": 75.0}
    with Run.open_or_create(tmp_path, identity={}, kind="steer-eval") as run:
        kept = keep_summary(run, told, **limits)
        assert stored_summary(run, told, **limits).picks == kept.picks
        path = run.path / "summary.json"
        path.write_text(path.read_text().replace('"highest evil', '"stored: highest evil'))
        assert stored_summary(run, told, **limits).picks[0].reason.startswith("stored: ")
        # Scored again, or read with another floor: the stored numbers are of something else.
        other = [*told[:-1], replace(told[-1], scores={"evil": 51.0, "coherence": 90.0})]
        assert stored_summary(run, other, **limits).picks[0].reason.startswith("highest")
        path.write_text("[]")
        assert stored_summary(run, told, **limits).picks == kept.picks
        assert math.isnan(stored_summary(run, told, **limits).point("steered").scores["evil"].mean)


def test_one_question_cannot_be_held_out_and_is_not_called_so() -> None:
    one = [
        *(a for a in answers(BASE, 0) if a.question == "q0"),
        *(a for a in answers(condition("steered"), 50) if a.question == "q0"),
    ]
    (pick,) = summarise(one, trait="evil").picks
    assert not pick.held_out
    assert pick.questions_for_reading == 1


def test_answers_that_nobody_judged_have_no_metrics() -> None:
    unjudged = [ScoredAnswer(condition={**BASE, "rollout": 0}, question="q0", text="", scores={})]
    numbers = summarise(unjudged, trait="evil")
    assert numbers.metrics == ()
    assert numbers.picks == ()
