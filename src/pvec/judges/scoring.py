"""Scoring the answers of a run: which judge it is, and what it has not scored yet.

One judge per command, chosen before anything is loaded. Each score is appended to the run as it
comes, so that nothing paid for is lost.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pvec.backends.planned import PlannedResponse, missing
from pvec.backends.session import ModelSession, Notify, ignore, load_judge_model
from pvec.closing import Closing
from pvec.data.judged_csv import JudgedAnswer
from pvec.errors import JudgeError
from pvec.judges.base import Judge
from pvec.judges.choice import choose_judge, judge_name, open_judge
from pvec.judges.cost import Estimate, estimate
from pvec.judges.prompts import COHERENCE, Metric, fill, missing_queries
from pvec.runs.responses import Json, ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import JudgeQuery, JudgeScale, Progress, Score


@dataclass(frozen=True, kw_only=True)
class JudgeReport:
    """What judging did in this call. ``counts`` by status; ``skipped`` were scored before;
    ``unasked`` are left because the judge ``stopped`` (at its cost limit). ``spent`` in dollars.
    """

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
        need_key: bool = True,
        notify: Notify = ignore,
    ) -> None:
        self.choice = choose_judge(settings.judge, bundled=bundled, need_key=need_key)
        self._settings = settings
        self._session = session
        self._notify = notify
        self._judge: Judge | None = None

    @classmethod
    def of(cls, session: ModelSession, *, need_key: bool = True) -> Self:
        """Choose the judge of the answers that the model of ``session`` gives."""
        return cls(
            session.settings,
            bundled=session.metadata.bundled,
            session=session,
            need_key=need_key,
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
        """Score what this judge has not scored yet; each score is on disk before the next.

        Raises as ``score_responses`` does.
        """
        scale = self._settings.judge.scale
        report = score_responses(
            records,
            [_scaled(metric, scale) for metric in metrics],
            judge=self.judge,
            scored=run.scored_ids(),
            failed=run.failed_ids(),
            on_score=lambda score: run.append_score(replace(score, judge=self.name)),
            on_progress=on_progress,
        )
        for note in self.judge.notes:
            self._notify(note)
        if report.stopped:
            self._notify(f"{report.stopped}; {report.unasked} scores are left for another call")
        return replace(report, judge=self.name)

    def estimate(
        self, run: Run | None, planned: Sequence[PlannedResponse], metrics: Sequence[Metric]
    ) -> Estimate:
        """Estimate what it costs to score what this judge has not scored of the planned responses.

        An answer that is still to be generated is taken to be as long as its limit allows, at four
        characters a token. ``run`` is None for one that has not begun. Loads and asks nothing.
        """
        metrics = [_scaled(metric, self._settings.judge.scale) for metric in metrics]
        identities = {response.id for response in planned}
        records = [] if run is None else [r for r in run.responses() if r.id in identities]
        answered = {record.id for record in records}
        queries = missing_queries(
            records,
            metrics,
            judge=judge_name(self.choice),
            fenced=self.choice.kind != "tiny",
            scored=set() if run is None else run.scored_ids(),
        )
        prompts = itertools.chain(
            (query.messages[0]["content"] for query in queries),
            (
                fill(
                    metric.prompt,
                    question=response.question,
                    answer="x" * (4 * response.sampling.max_tokens),
                )
                for response in planned
                if response.id not in answered
                for metric in metrics
            ),
        )
        return estimate(prompts, price=self.choice.price)

    def close(self) -> None:
        """Close the judge, if one was opened."""
        if self._judge is not None:
            self._judge.close()
            self._judge = None


def score_responses(
    responses: Sequence[ResponseRecord],
    metrics: Sequence[Metric],
    *,
    judge: Judge,
    scored: Collection[str] = frozenset(),
    failed: Collection[str] = frozenset(),
    on_score: Callable[[Score], None],
    on_progress: Callable[[Progress], None] = ignore,
) -> JudgeReport:
    """Score what is not in ``scored`` yet, what ``failed`` before last; each score goes to
    ``on_score`` as it finishes.

    A response that failed is not an answer and gets no score.

    Raises ``JudgeError`` when asking is pointless, or when the first round over these answers ends
    without a single score; what was scored has then been handed over.
    """
    responses = [response for response in responses if response.finish_reason != "failed"]

    def queries() -> Iterator[JudgeQuery]:
        return missing_queries(
            responses,
            metrics,
            judge=judge.name,
            fenced=judge.fenced,
            scored=scored,
            failed=failed,
        )

    left = sum(1 for _ in queries())
    skipped = len(responses) * len(metrics) - left
    counts: Counter[str] = Counter()
    detail = ""

    def show() -> None:
        missing = {"missing": float(counts.total() - counts["ok"])} if counts else {}
        on_progress(
            Progress(stage="judging", done=counts.total(), total=left, unit="scores", extra=missing)
        )

    show()
    for score in judge.score(queries()):
        on_score(score)
        counts[score.status] += 1
        detail = score.detail or detail
        show()
    if counts.total() and not counts["ok"] and not skipped:
        statuses = ", ".join(f"{count} {status}" for status, count in counts.items())
        raise JudgeError(
            f"The judge {judge.name} scored none of {counts.total()} questions "
            f"({statuses}; last: {detail}): try another judge (--judge-model)."
        )
    return JudgeReport(
        judge=judge.name,
        counts=dict(counts),
        skipped=skipped,
        unasked=left - counts.total(),
        stopped=judge.stopped,
        spent=judge.spent,
    )


def score_of(scores: Mapping[str, Score], metric: str) -> float | None:
    """Return one score as a number, or None where it is missing."""
    score = scores.get(metric)
    return score.score if score else None


def judged_answer(record: ResponseRecord, scores: Mapping[str, Score], trait: str) -> JudgedAnswer:
    """Return an answer with its scores as a row of a table in the reference's columns."""
    return JudgedAnswer(
        question=record.question,
        prompt=record.prompt,
        answer=record.answer,
        question_id=record.question_id,
        trait_score=score_of(scores, trait),
        coherence=score_of(scores, COHERENCE),
    )


def _scaled(metric: Metric, scale: JudgeScale) -> Metric:
    """Return a trait's metric on the scale that its prompt asks for; coherence is always 0-100."""
    return metric if metric.name == COHERENCE else replace(metric, scale=scale)


# -- what a command would do ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What ``--dry-run`` tells before anything is spent. ``missing`` answers are still to be
    generated; ``most_tokens`` are, if each of them runs to its limit.
    """

    run: Path
    answers: int
    missing: int
    most_tokens: int
    judge: str
    judging: str


def plan_run(
    session: ModelSession,
    folder: Path,
    *,
    kind: str,
    identity: Mapping[str, Json],
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
    judged: bool,
) -> RunPlan:
    """Count what a run lacks of its planned responses and of their scores, and what that costs.

    Needs no key, loads no weights and writes nothing; raises what the run itself would raise for
    its settings and its folder.
    """
    run = Run.preview(folder, kind=kind, identity=identity)
    left = list(planned) if run is None else missing(run, planned)
    judge, judging = "none", "no judge calls"
    if judged:
        scorer = ResponseScorer.of(session, need_key=False)
        judge, judging = scorer.choice.model, str(scorer.estimate(run, planned, metrics))
    return RunPlan(
        run=folder,
        answers=len(planned),
        missing=len(left),
        most_tokens=sum(response.sampling.max_tokens for response in left),
        judge=judge,
        judging=judging,
    )
