"""The numbers of a steering sweep: points with intervals, differences to the baseline, the pick.

Used by ``steer-eval`` for its table and by the report for its figures, so that both say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pvec.runs.store import Run
from pvec.stats import Interval, bootstrap_mean, paired_difference

COHERENCE = "coherence"

ROLES = ("baseline", "prompt_pos", "prompt_neg", "steered", "random")
"""What a condition can be, in the order of tables."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One answer of a sweep: its condition, its question, and its scores (None: missing)."""

    condition: Mapping[str, Any]
    question: str
    text: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One condition: mean scores by metric, and the paired differences to the baseline."""

    name: str
    role: str
    vector: str
    layers: tuple[int, ...]
    coef: float
    scores: Mapping[str, Interval]
    differences: Mapping[str, Interval]


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
class SweepNumbers:
    """Everything that is said about a sweep. ``unpicked`` explains vectors without a pick."""

    trait: str
    metrics: tuple[str, ...]
    questions: tuple[str, ...]
    points: tuple[Point, ...]
    picks: tuple[Pick, ...]
    unpicked: tuple[str, ...]

    def point(self, name: str) -> Point:
        """Return the point of a condition by its name."""
        return next(point for point in self.points if point.name == name)


def read_sweep(
    run: Run, *, judge: str | None = None, wanted: Callable[[str], bool] = lambda _: True
) -> list[ScoredAnswer]:
    """Return a run's answers by question, with the scores of one judge.

    ``wanted`` filters by response id.

    Raises ``InputError`` when several judges scored the run and none is named.
    """
    scores = run.scores_by_response(judge=judge)
    records = [record for record in run.responses() if wanted(record.id)]
    # By question, not by who finished first: which questions choose must not depend on luck.
    records.sort(key=lambda r: (len(r.question_id), r.question_id, r.condition["rollout"]))
    return [
        ScoredAnswer(
            condition=record.condition,
            question=record.question,
            text=record.answer,
            scores={metric: score.score for metric, score in scores.get(record.id, {}).items()},
        )
        for record in records
    ]


def summarise(
    answers: Sequence[ScoredAnswer], *, trait: str, min_coherence: float = 75.0
) -> SweepNumbers:
    """Return the sweep's points, and per vector the pick with its held-out reading.

    Layer and coefficient are chosen on every second question (the first, third, …): the highest
    mean trait score among points whose mean coherence is at least ``min_coherence``; of equal ones
    the smaller dose. The readings come from the other questions.
    """
    questions = tuple(dict.fromkeys(answer.question for answer in answers))
    found = {metric for answer in answers for metric in answer.scores}
    metrics = (*(m for m in (trait, COHERENCE) if m in found), *sorted(found - {trait, COHERENCE}))
    table = _Table(answers, metrics)
    choosing, reading = questions[0::2], questions[1::2]
    points = table.points(questions)
    picks: list[Pick] = []
    unpicked: list[str] = []
    if trait in metrics:
        chosen_by = table.points(choosing)
        read = table.points(reading or choosing)
        for vector in dict.fromkeys(p.vector for p in points if p.role == "steered"):
            best = _best([p for p in chosen_by if p.vector == vector], trait, min_coherence)
            if best is None:
                unpicked.append(
                    f"{vector}: no layer and coefficient kept coherence at {min_coherence:g} or "
                    f"more; try smaller coefficients"
                )
            else:
                picks.append(_pick(best, read, trait, min_coherence, (choosing, reading)))
    return SweepNumbers(
        trait=trait,
        metrics=metrics,
        questions=questions,
        points=tuple(points),
        picks=tuple(picks),
        unpicked=tuple(unpicked),
    )


class _Table:
    """Scores by condition, metric and question, from which any subset of questions is read."""

    def __init__(self, answers: Sequence[ScoredAnswer], metrics: Sequence[str]) -> None:
        self._metrics = metrics
        self._conditions = {answer.condition["name"]: answer.condition for answer in answers}
        self._scores: dict[str, dict[str, dict[str, list[float | None]]]] = {}
        for answer in answers:
            row = self._scores.setdefault(answer.condition["name"], {})
            for metric in metrics:
                cell = row.setdefault(metric, {}).setdefault(answer.question, [])
                cell.append(answer.scores.get(metric))

    def points(self, questions: Sequence[str]) -> list[Point]:
        """Return every condition read on ``questions``."""
        baseline = next(
            (name for name, c in self._conditions.items() if c["role"] == "baseline"), None
        )
        found = [
            Point(
                name=name,
                role=condition["role"],
                vector=condition["vector"],
                layers=tuple(condition["layers"]),
                coef=float(condition["coef"]),
                scores={m: self._reading(name, m, questions) for m in self._metrics},
                differences={
                    m: self._difference(name, baseline, m, questions)
                    for m in self._metrics
                    if baseline is not None and name != baseline
                },
            )
            for name, condition in self._conditions.items()
        ]
        vectors = list(dict.fromkeys(sorted(point.vector for point in found)))
        return sorted(
            found,
            key=lambda p: (ROLES.index(p.role), vectors.index(p.vector), p.layers, p.coef),
        )

    def _reading(self, name: str, metric: str, questions: Sequence[str]) -> Interval:
        values, groups = self._column(name, metric, questions)
        return bootstrap_mean(values, groups=groups)

    def _difference(
        self, name: str, baseline: str, metric: str, questions: Sequence[str]
    ) -> Interval:
        values, groups = self._column(name, metric, questions)
        base, base_groups = self._column(baseline, metric, questions)
        return paired_difference(values, groups=groups, baseline=base, baseline_groups=base_groups)

    def _column(
        self, name: str, metric: str, questions: Sequence[str]
    ) -> tuple[list[float | None], list[str]]:
        cells = self._scores[name][metric]
        pairs = [(score, question) for question in questions for score in cells.get(question, [])]
        return [score for score, _ in pairs], [question for _, question in pairs]


def control_of(point: Point, points: Sequence[Point]) -> Point | None:
    """Return the random vector at the very point where ``point`` steers, if it was run."""
    return next(
        (
            one
            for one in points
            if one.role == "random"
            and one.vector.endswith(point.vector)
            and (one.layers, one.coef) == (point.layers, point.coef)
        ),
        None,
    )


def _best(points: Sequence[Point], trait: str, min_coherence: float) -> Point | None:
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
    best: Point,
    read: Sequence[Point],
    trait: str,
    min_coherence: float,
    halves: tuple[Sequence[str], Sequence[str]],
) -> Pick:
    choosing, reading = halves
    by_role = {point.role: point for point in read if point.role not in {"steered", "random"}}
    return Pick(
        vector=best.vector,
        point=next(point for point in read if point.name == best.name),
        baseline=by_role.get("baseline"),
        control=control_of(best, read),
        prompt=by_role.get("prompt_pos"),
        held_out=bool(reading),
        questions_for_choice=len(choosing),
        questions_for_reading=len(reading or choosing),
        reason=(
            f"highest {trait} at coherence of at least {min_coherence:g} "
            f"on {len(choosing)} questions"
        ),
    )
