"""Scoring a run's answers: one judge per command, scores appended to the run as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pvec.backends.session import ModelSession, Notify, ignore, load_judge_model
from pvec.closing import Closing
from pvec.judges.base import Judge
from pvec.judges.judging import (
    COHERENCE_METRIC,
    Answer,
    JudgeChoice,
    Metric,
    choose_judge,
    judge_answers,
    open_judge,
)
from pvec.judges.prompts import COHERENCE
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.traits.trait import Trait
from pvec.types import JudgeScale, Progress, Score, Sign
from pvec.vectors.filter import FilterResult, ScoredResponse, filter_responses


@dataclass(frozen=True, kw_only=True)
class JudgeReport:
    """What judging did in this call. ``counts`` by status; ``skipped`` were scored before."""

    judge: str
    counts: Mapping[str, int]
    skipped: int
    unasked: int
    stopped: str | None
    spent: float


class ResponseScorer(Closing):
    """The judge of a command: chosen at once, so that a missing key is found before anything runs,
    and opened when first asked. A context manager.

    ``session`` is the model that answers, when there is one: the bundled model is judged by its own
    judge unless the settings say otherwise. Raises ``JudgeError`` or ``InputError`` for a judge
    that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        bundled: bool,
        session: ModelSession | None = None,
        notify: Notify = ignore,
    ) -> None:
        self.choice: JudgeChoice = choose_judge(settings.judge, bundled=bundled)
        self._settings = settings
        self._session = session
        self._notify = notify
        self._judge: Judge | None = None

    @classmethod
    def of(cls, session: ModelSession) -> Self:
        """Choose the judge of the answers that the model of ``session`` gives."""
        return cls(
            session.settings,
            bundled=session.metadata.bundled,
            session=session,
            notify=session.notify,
        )

    @property
    def judge(self) -> Judge:
        """The judge, opened on first use."""
        if self._judge is None:
            loaded = self._session.backend if self._session and self._session.loaded else None
            self._judge = open_judge(
                self.choice,
                self._settings.judge,
                load=lambda name: load_judge_model(name, self._settings),
                loaded=loaded,
            )
        return self._judge

    @property
    def name(self) -> str:
        """Under what name this judge's scores are kept; another scale is another judge."""
        scale = self._settings.judge.scale
        return self.judge.name if scale == "0-100" else f"{self.judge.name} ({scale})"

    def check(self) -> None:
        """Ask a server for one score before anything is generated; a local judge loads later."""
        if self.choice.kind == "openai":
            self.judge.check()

    def score(
        self,
        run: Run,
        records: Sequence[ResponseRecord],
        metrics: Sequence[Metric],
        *,
        on_progress: Callable[[Progress], None] = ignore,
    ) -> JudgeReport:
        """Score what this judge has not scored yet; each score is on disk before the next."""
        scale = self._settings.judge.scale
        judged = judge_answers(
            [_answer(record) for record in records],
            [_scaled(metric, scale) for metric in metrics],
            judge=self.judge,
            scored=run.scored_ids(),
            on_score=lambda score: run.append_score(replace(score, judge=self.name)),
            on_progress=on_progress,
        )
        for note in judged.notes:
            self._notify(note)
        if judged.stopped:
            self._notify(f"{judged.stopped}; {judged.unasked} scores are left for another call")
        return JudgeReport(
            judge=self.name,
            counts=dict(judged.counts),
            skipped=judged.skipped,
            unasked=judged.unasked,
            stopped=judged.stopped,
            spent=judged.spent,
        )

    def close(self) -> None:
        """Close the judge, if one was opened."""
        if self._judge is not None:
            self._judge.close()
            self._judge = None


def trait_metrics(trait: Trait) -> list[Metric]:
    """Return what an answer about ``trait`` is scored on: the trait and coherence."""
    return [Metric(name=trait.name, prompt=trait.eval_prompt), COHERENCE_METRIC]


def filter_records(
    records: Sequence[ResponseRecord],
    scores: Mapping[str, Mapping[str, Score]],
    *,
    trait: str,
    settings: Settings,
) -> FilterResult:
    """Decide which of an extraction's answers count, by the thresholds of the settings."""
    return filter_responses(
        [_scored(record, scores.get(record.id, {}), trait) for record in records],
        threshold=settings.filter.threshold,
        coherence=settings.filter.coherence,
        paired=settings.filter.paired,
    )


def sign_of(record: ResponseRecord) -> Sign:
    """Return under which sign an extraction's answer was given."""
    return "pos" if record.condition["sign"] == "pos" else "neg"


def score_of(scores: Mapping[str, Score], metric: str) -> float | None:
    """Return one score as a number, or None where it is missing."""
    score = scores.get(metric)
    return score.score if score else None


def _scored(record: ResponseRecord, scores: Mapping[str, Score], trait: str) -> ScoredResponse:
    pair = (record.question_id, record.condition["instruction"], record.condition["rollout"])
    return ScoredResponse(
        id=record.id,
        sign=sign_of(record),
        trait=score_of(scores, trait),
        coherence=score_of(scores, COHERENCE),
        pair=pair,
    )


def _answer(record: ResponseRecord) -> Answer:
    return Answer(response_id=record.id, question=record.question, answer=record.answer)


def _scaled(metric: Metric, scale: JudgeScale) -> Metric:
    """Return a trait's metric on the scale that its prompt asks for; coherence is always 0-100."""
    return metric if metric.name == COHERENCE else replace(metric, scale=scale)
