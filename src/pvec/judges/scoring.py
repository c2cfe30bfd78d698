"""Scoring the answers of a run: which judge it is, and what it has not scored yet.

One judge per command, chosen before anything is loaded. Each score is appended to the run as it
comes, so that nothing paid for is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from pvec.backends.session import ModelSession, Notify, ignore, judge_spec, load_judge_model
from pvec.closing import Closing
from pvec.data.judged_csv import JudgedAnswer, write_judged_csv
from pvec.errors import InputError, JudgeError
from pvec.judges.base import Judge
from pvec.judges.calibration import Calibration
from pvec.judges.choice import choose_judge, judge_name, open_judge
from pvec.judges.contrast import ContrastJudge
from pvec.judges.measurement import (
    calibrate,
    find_calibration,
    measure,
    require_pairs,
    require_questions,
)
from pvec.judges.prompts import COHERENCE, Metric, missing_queries
from pvec.runs.names import run_name
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import JudgeQuery, JudgeScale, Progress, Score
from pvec.vectors.vector import PersonaVector


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
        studied: str = "tiny",
        session: ModelSession | None = None,
        vectors: Iterable[PersonaVector] = (),
        need_key: bool = True,
        notify: Notify = ignore,
    ) -> None:
        self.choice = choose_judge(
            settings.judge, bundled=bundled, studied=studied, need_key=need_key
        )
        self.settings = settings
        self._vectors = tuple(vectors)
        self._calibration: Calibration | None = None
        self._session = session
        self._notify = notify
        self._judge: Judge | None = None

    @classmethod
    def of(
        cls,
        session: ModelSession,
        *,
        vectors: Iterable[PersonaVector] = (),
        need_key: bool = True,
    ) -> Self:
        """Choose the judge of the answers that the model of ``session`` gives."""
        return cls(
            session.settings,
            bundled=session.metadata.bundled,
            studied=session.spec.model,
            session=session,
            vectors=vectors,
            need_key=need_key,
            notify=session.notify,
        )

    @property
    def judge(self) -> Judge:
        """The judge, opened on first use."""
        if self._judge is None:
            session, loaded = self._session, None
            if session is not None and (self._judges_itself or session.loaded):
                loaded = session.backend
            self._judge = open_judge(
                self.choice,
                self.settings.judge,
                load=lambda name: load_judge_model(name, self.settings, notify=self._notify),
                loaded=loaded,
                itself=self._judges_itself,
            )
        return self._judge

    @property
    def _judges_itself(self) -> bool:
        """Whether the model that answers judges by likelihood, and has no adapter."""
        session = self._session
        if session is None or self.choice.kind != "contrast":
            return False
        return self.choice.model == session.spec.model and session.metadata.adapter is None

    @cached_property
    def name(self) -> str:
        """Under what name this judge's scores are kept; another scale is another judge.

        The contrast judge's is read from the model's files, without loading it.
        """
        if self.choice.kind == "contrast":
            return self.expected_name
        scale = self.settings.judge.scale
        return self.judge.name if scale == "0-100" else f"{self.judge.name} ({scale})"

    @property
    def expected_name(self) -> str:
        """The judge's own name, without loading or asking it."""
        spec = judge_spec(self.choice.model, self.settings)
        return judge_name(self.choice, self.settings.judge, spec=spec)

    def check(
        self,
        metrics: Sequence[Metric],
        *,
        extraction: bool = False,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        """Find out, before anything is generated, whether this judge can score ``metrics``.

        A server is asked for one score; a local judge loads later. The contrast judge needs
        instruction pairs, and unless an ``extraction`` calibrates it, a calibration, which may be
        in the run's ``manifest``. Raises ``JudgeError`` or ``InputError``.
        """
        if self.choice.kind in ("openai", "litellm"):
            self.judge.check()
        if self.choice.kind != "contrast":
            return
        if self.settings.judge.scale != "0-100":
            raise InputError(
                "The contrast judge reads no rubric and replies with nothing: omit --judge-scale."
            )
        require_pairs(metrics)
        if extraction:
            require_questions(metrics, limit=self.settings.extract.limit)
        else:
            settings = self.settings
            self._calibration = find_calibration(
                self.name,
                metrics,
                given=settings.judge.calibration,
                vectors=self._vectors,
                manifest=manifest or {},
                default=lambda trait: (
                    settings.paths.runs
                    / run_name(trait, model=self.choice.model, adapter=None)
                    / f"vectors/{trait}.safetensors"
                ),
            )

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
        if isinstance(self.judge, ContrastJudge):
            report = self._score_by_contrast(run, self.judge, records, metrics, on_progress)
        else:
            scale = self.settings.judge.scale
            self.judge.work_in(run.path, name=self.name, notify=self._notify)
            report = score_responses(
                records,
                [scaled(metric, scale) for metric in metrics],
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

    def _score_by_contrast(
        self,
        run: Run,
        judge: ContrastJudge,
        records: Sequence[ResponseRecord],
        metrics: Sequence[Metric],
        on_progress: Callable[[Progress], None],
    ) -> JudgeReport:
        answers = [record for record in records if record.finish_reason != "failed"]
        measured = measure(run, judge, answers, metrics, on_progress=on_progress)
        final = calibrate(run, judge.name, answers, metrics, calibration=self._calibration)
        for note in final.notes:
            self._notify(note)
        table = run.scores_by_response(judge=judge.name)
        scores = (score for row in table.values() for score in row.values())
        return JudgeReport(
            judge=judge.name,
            counts=Counter(score.status for score in scores if score.id in measured),
            skipped=len(answers) * len(metrics) - len(measured),
            unasked=0,
            stopped=None,
            spent=0.0,
        )

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

    wanted = {query.id for query in queries()}
    left = len(wanted)
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
        if score.id in scored:  # asked for by an earlier call, and again meanwhile
            continue
        on_score(score)
        if score.id not in wanted:
            continue
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


def export_answers(
    run: Run,
    name: str,
    records: Iterable[ResponseRecord],
    *,
    trait: str,
    scores: Mapping[str, Mapping[str, Score]],
) -> None:
    """Write answers with their scores to the run's CSV ``name``, in the reference's columns."""
    rows = [
        JudgedAnswer(
            question=record.question,
            prompt=record.prompt,
            answer=record.answer,
            question_id=record.question_id,
            trait_score=score_of(scores.get(record.id, {}), trait),
            coherence=score_of(scores.get(record.id, {}), COHERENCE),
        )
        for record in records
    ]
    write_judged_csv(run.csv_path(name), rows, trait=trait)


def scaled(metric: Metric, scale: JudgeScale) -> Metric:
    """Return a trait's metric on the scale that its prompt asks for; coherence is always 0-100."""
    return metric if metric.name == COHERENCE else replace(metric, scale=scale)
