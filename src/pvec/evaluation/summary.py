"""The numbers of a steering sweep: points with intervals, differences to the baseline, the pick.

They are made once, when answers have been judged, and kept in the run (``keep_summary``), so that
``steer-eval`` and the report say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from pvec.documents import read_json
from pvec.evaluation.conditions import ROLES, Condition, Place, Role, stored_condition
from pvec.runs.responses import Json, stable_hash
from pvec.runs.store import Run
from pvec.runs.summary import SUMMARY, not_known_as_nan, write_summary
from pvec.stats import SCORES, Interval, grouped_mean, paired_difference

COHERENCE = "coherence"

Question = TypeVar("Question")


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One answer of a sweep: its condition, its question, and its scores (None: missing)."""

    condition: Mapping[str, Any]
    question: str
    text: str
    scores: Mapping[str, float | None]
    limited: tuple[int, ...] = ()
    """Under a cap or floor: the positions beyond the limit, and all that were held to it."""


@dataclass(frozen=True, kw_only=True)
class Point(Place):
    """One condition: mean scores by metric, and the paired differences to the baseline."""

    scores: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    limited: float | None = None
    """Share of the positions held to a cap or floor that lay beyond it; None if not counted."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The best point of one vector: chosen on some questions, measured on the others.

    ``control`` is the random vector at the same point, if it was run. ``reason`` says in words how
    the point was chosen. When there is a single question nothing can be held out: ``held_out`` is
    then False and the readings are those it was chosen by.
    """

    vector: str
    point: Point
    baseline: Point | None
    control: Point | None
    prompt: Point | None
    held_out: bool
    questions_for_choice: int
    questions_for_reading: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """Everything that is said about a sweep. ``unpicked`` explains vectors without a pick."""

    trait: str
    metrics: tuple[str, ...]
    questions: tuple[str, ...]
    points: tuple[Point, ...]
    picks: tuple[Pick, ...]
    unpicked: tuple[str, ...]

    @property
    def baseline(self) -> Point | None:
        """The unsteered model, if it was run."""
        return next(iter(self.having("baseline")), None)

    @property
    def missing(self) -> int:
        """How many scores are missing, and in no mean."""
        return sum(score.missing for point in self.points for score in point.scores.values())

    def having(self, *roles: Role) -> list[Point]:
        """Return the points of these roles."""
        return [point for point in self.points if point.role in roles]

    def point(self, name: str) -> Point:
        """Return the point of a condition by its name."""
        return next(point for point in self.points if point.name == name)

    def control_of(self, point: Point) -> Point | None:
        """Return the random vector at the very point where ``point`` steers, if it was run."""
        return next((other for other in self.points if other.controls(point)), None)


def read_sweep(run: Run, *, judge: str | None = None) -> list[ScoredAnswer]:
    """Return a run's answers by question, with the scores of one judge.

    Raises ``InputError`` when several judges scored the run and none is named.
    """
    scores = run.scores_by_response(judge=judge)
    records = list(run.responses())
    # By question, not by who finished first: which questions choose must not depend on luck.
    records.sort(key=lambda r: (len(r.question_id), r.question_id, r.condition["rollout"], r.id))
    return [
        ScoredAnswer(
            condition=record.condition,
            question=record.question,
            text=record.answer,
            scores={metric: score.score for metric, score in scores.get(record.id, {}).items()},
            limited=record.limited,
        )
        for record in records
    ]


def keep_summary(
    run: Run,
    answers: Sequence[ScoredAnswer],
    *,
    trait: str,
    min_coherence: float,
    kl: KLLimit | None = None,
) -> SweepSummary:
    """Summarise a run's answers and keep the result in the run."""
    summary = summarise(answers, trait=trait, min_coherence=min_coherence, kl=kl)
    basis = _basis(answers, trait=trait, min_coherence=min_coherence, kl=kl)
    write_summary(run.path, {"basis": basis, **asdict(summary)})
    return summary


def stored_summary(
    run: Run,
    answers: Sequence[ScoredAnswer],
    *,
    trait: str,
    min_coherence: float,
    kl: KLLimit | None = None,
) -> SweepSummary:
    """Return what the run keeps, or a new summary where it keeps none of exactly these scores.

    That is so for a run that was judged after its evaluation, or by several judges.
    """
    basis = _basis(answers, trait=trait, min_coherence=min_coherence, kl=kl)
    try:
        stored = not_known_as_nan(read_json(run.path / SUMMARY))
        if stored.pop("basis") == basis:
            return _SUMMARY.validate_python(stored)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass  # none, or one of another version: it follows from the scores
    return summarise(answers, trait=trait, min_coherence=min_coherence, kl=kl)


@dataclass(frozen=True, kw_only=True)
class KLLimit:
    """The largest KL divergence, in nats per token, of a point that may be picked; ``of`` has that
    of every condition that was measured. One that was not is not picked."""

    most: float
    of: Mapping[str, float]

    def allows(self, name: str) -> bool:
        """Whether the condition of this name may be picked."""
        return self.of.get(name, math.inf) <= self.most


def halves(questions: Sequence[Question]) -> tuple[Sequence[Question], Sequence[Question]]:
    """Return the questions that points are picked on (the first, third, …) and the others."""
    return questions[0::2], questions[1::2]


def summarise(
    answers: Sequence[ScoredAnswer],
    *,
    trait: str,
    min_coherence: float = 75.0,
    kl: KLLimit | None = None,
) -> SweepSummary:
    """Return the sweep's points, and per vector the pick with its held-out reading.

    Layer and coefficient are chosen on one of the ``halves`` of the questions: the highest mean
    trait score among points whose mean coherence is at least ``min_coherence`` and which ``kl``
    allows; of equal ones the smaller dose. The readings come from the other questions. A point
    that was not run on those (one that a search passed over) is not picked.
    """
    questions = tuple(dict.fromkeys(answer.question for answer in answers))
    scored = {metric for answer in answers for metric in answer.scores}
    first = [metric for metric in (trait, COHERENCE) if metric in scored]
    metrics = (*first, *sorted(scored - {trait, COHERENCE}))
    table = _Table(answers, metrics)
    choosing, reading = halves(questions)
    points = table.points(questions)
    chosen_by, read = table.points(choosing), table.points(reading or choosing)
    at_most = f" and KL of at most {kl.most:g}" if kl else ""
    picks: list[Pick] = []
    unpicked: list[str] = []
    vectors = dict.fromkeys(p.vector for p in points if p.role == "steered")
    for vector in vectors if trait in metrics else ():
        read_too = {p.name for p in read if p.scores[trait].n + p.scores[trait].missing}
        own = [p for p in chosen_by if p.vector == vector and p.name in read_too]
        allowed = [p for p in own if kl is None or kl.allows(p.name)]
        best = best_point(allowed, trait, min_coherence)
        if best is None:
            unpicked.append(
                f"{vector}: no layer and coefficient kept coherence at {min_coherence:g} or "
                f"more{at_most}; try smaller coefficients"
            )
        else:
            reason = (
                f"highest {trait} at coherence of at least {min_coherence:g}{at_most} "
                f"on {len(choosing)} questions"
            )
            picks.append(_pick(best, read, reason=reason, halves=(choosing, reading)))
    return SweepSummary(
        trait=trait,
        metrics=metrics,
        questions=questions,
        points=tuple(points),
        picks=tuple(picks),
        unpicked=tuple(unpicked),
    )


class _Table:
    """The answers by condition, from which any subset of questions is read."""

    def __init__(self, answers: Sequence[ScoredAnswer], metrics: Sequence[str]) -> None:
        self._metrics = metrics
        self._conditions: dict[str, Condition] = {}
        self._answers: dict[str, list[ScoredAnswer]] = {}
        for answer in answers:
            condition = stored_condition(answer.condition)
            self._conditions.setdefault(condition.name, condition)
            self._answers.setdefault(condition.name, []).append(answer)

    def points(self, questions: Sequence[str]) -> list[Point]:
        """Return every condition read on ``questions``, in the order of tables."""
        asked = set(questions)
        answers = {k: [a for a in own if a.question in asked] for k, own in self._answers.items()}
        baseline = next((c.name for c in self._conditions.values() if c.role == "baseline"), None)
        points = [
            Point(
                **condition.place,
                limited=_share_limited(answers[condition.name]),
                scores={m: _reading(answers[condition.name], m) for m in self._metrics},
                differences={
                    m: _difference(answers[condition.name], answers[baseline], m)
                    for m in self._metrics
                    if baseline is not None and condition.name != baseline
                },
            )
            for condition in self._conditions.values()
        ]
        return sorted(points, key=lambda p: (ROLES.index(p.role), p.vector, p.layers, p.coef))


def _share_limited(answers: Sequence[ScoredAnswer]) -> float | None:
    counts = [answer.limited for answer in answers if answer.limited]
    if not counts:
        return None
    beyond, held = np.sum(counts, axis=0)
    return float(beyond / held)


def _reading(answers: Sequence[ScoredAnswer], metric: str) -> Interval:
    values, questions = _column(answers, metric)
    return grouped_mean(values, groups=questions, limits=SCORES)


def _difference(
    answers: Sequence[ScoredAnswer], baseline: Sequence[ScoredAnswer], metric: str
) -> Interval:
    values, questions = _column(answers, metric)
    base, base_questions = _column(baseline, metric)
    return paired_difference(
        values,
        groups=questions,
        baseline=base,
        baseline_groups=base_questions,
        limits=(-SCORES[1], SCORES[1]),
    )


def _column(answers: Sequence[ScoredAnswer], metric: str) -> tuple[list[float | None], list[str]]:
    return [a.scores.get(metric) for a in answers], [a.question for a in answers]


def best_point(points: Sequence[Point], trait: str, min_coherence: float) -> Point | None:
    """Return the steered point with the highest trait score at this coherence or more."""

    def coherent(point: Point) -> bool:
        reading = point.scores.get(COHERENCE)
        return reading is None or reading.mean >= min_coherence

    candidates = [
        point
        for point in points
        if point.role == "steered" and not math.isnan(point.scores[trait].mean) and coherent(point)
    ]
    return max(candidates, key=lambda p: (p.scores[trait].mean, -abs(p.coef)), default=None)


def _pick(
    best: Point, read: Sequence[Point], *, reason: str, halves: tuple[Sequence[str], Sequence[str]]
) -> Pick:
    choosing, reading = halves
    by_role = {point.role: point for point in read if point.role not in {"steered", "random"}}
    return Pick(
        vector=best.vector,
        point=next(point for point in read if point.name == best.name),
        baseline=by_role.get("baseline"),
        control=next((point for point in read if point.controls(best)), None),
        prompt=by_role.get("prompt_pos"),
        held_out=bool(reading),
        questions_for_choice=len(choosing),
        questions_for_reading=len(reading or choosing),
        reason=reason,
    )


def _basis(
    answers: Sequence[ScoredAnswer], *, trait: str, min_coherence: float, kl: KLLimit | None
) -> str:
    """Return a hash of everything that a summary follows from."""
    rows: list[Json] = [
        [dict(answer.condition), answer.question, dict(answer.scores)] for answer in answers
    ]
    limit: list[Json] = [] if kl is None else [kl.most, dict(kl.of)]
    return stable_hash([trait, min_coherence, rows, *limit])


_SUMMARY: TypeAdapter[SweepSummary] = TypeAdapter(SweepSummary)
