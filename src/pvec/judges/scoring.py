"""Scoring the answers of a run: which judge it is, and what it has not scored yet.

One judge per command, chosen before anything is loaded. Each score is appended to the run as it
comes, so that nothing paid for is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import pvec.tiny
from pvec.backends.session import ModelSession, Notify, ignore, load_judge_model
from pvec.closing import Closing
from pvec.data.judged_csv import JudgedAnswer
from pvec.errors import InputError, JudgeError
from pvec.judges.base import Judge
from pvec.judges.cost import Budget, Estimate, Price, estimate, known_price, parse_price
from pvec.judges.openai import DEFAULT_MODEL, OpenAIJudge
from pvec.judges.pacing import Patience
from pvec.judges.prompts import COHERENCE, Metric, fill, missing_queries
from pvec.judges.server import KEY_NAME, api_key, server_url
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.settings.tree import JudgeSettings
from pvec.types import JudgeScale, Progress, Score

if TYPE_CHECKING:
    from pvec.backends.base import Backend

_FREE = Price(prompt=0.0, completion=0.0)


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
        """Score what this judge has not scored yet; each score is on disk before the next.

        Raises as ``score_responses`` does.
        """
        scale = self._settings.judge.scale
        report = score_responses(
            records,
            [_scaled(metric, scale) for metric in metrics],
            judge=self.judge,
            scored=run.scored_ids(),
            on_score=lambda score: run.append_score(replace(score, judge=self.name)),
            on_progress=on_progress,
        )
        for note in self.judge.notes:
            self._notify(note)
        if report.stopped:
            self._notify(f"{report.stopped}; {report.unasked} scores are left for another call")
        return replace(report, judge=self.name)

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
    on_score: Callable[[Score], None],
    on_progress: Callable[[Progress], None] = ignore,
) -> JudgeReport:
    """Score what is not in ``scored`` yet; each score goes to ``on_score`` as it finishes.

    Raises ``JudgeError`` when asking is pointless, or when the first round over these answers ends
    without a single score; what was scored has then been handed over.
    """
    left = sum(1 for _ in missing_queries(responses, metrics, judge=judge.name, scored=scored))
    skipped = len(responses) * len(metrics) - left
    counts: Counter[str] = Counter()
    detail = ""

    def show() -> None:
        missing = {"missing": float(counts.total() - counts["ok"])} if counts else {}
        on_progress(
            Progress(stage="judging", done=counts.total(), total=left, unit="scores", extra=missing)
        )

    show()
    queries = missing_queries(responses, metrics, judge=judge.name, scored=scored)
    for score in judge.score(queries):
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


def estimate_scoring(
    questions: Sequence[str],
    metrics: Sequence[Metric],
    *,
    answer_tokens: int,
    price: Price | None,
) -> Estimate:
    """Estimate, before there are answers, what judging one to each of ``questions`` costs.

    ``answer_tokens`` is the length assumed of an answer; four characters count as a token.
    """
    answer = "x" * (4 * answer_tokens)
    prompts = (
        fill(metric.prompt, question=question, answer=answer)
        for question in questions
        for metric in metrics
    )
    return estimate(prompts, price=price)


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


# -- which judge it is ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge it will be, known before any model is loaded."""

    kind: Literal["tiny", "local", "openai"]
    model: str
    base_url: str | None = None
    price: Price | None = _FREE
    """None when unknown; zero for a model of one's own."""


def choose_judge(settings: JudgeSettings, *, bundled: bool) -> JudgeChoice:
    """Choose the judge: as asked, or the bundled one for the bundled model, or OpenAI's.

    Raises ``JudgeError`` when its key is missing and ``InputError`` for a wrong specification or a
    cost limit without a price. Loads and asks nothing.
    """
    spec = settings.model
    if spec is None:
        spec = "tiny" if bundled and settings.base_url is None else DEFAULT_MODEL
    if spec == "tiny":
        return JudgeChoice(kind="tiny", model="tiny")
    kind, _, model = spec.partition(":")
    if kind not in ("local", "openai"):
        kind, model = "", spec
    if not model:
        raise InputError(f"--judge-model {spec} names no model: write {spec}MODEL.")
    if kind == "local":
        return JudgeChoice(kind="local", model=model)
    if not kind and Path(model).is_dir():
        raise InputError(
            f"--judge-model {spec} is a folder: write local:{spec} to judge with that model."
        )
    base_url = server_url(settings.base_url, option="--judge-url")
    if base_url is None and api_key(settings.api_key) is None:
        raise JudgeError(
            f"The judge {model} needs an API key: set {KEY_NAME}, or use another judge "
            "(--judge-url URL, --judge-model local:MODEL, or --no-judge to score later)."
        )
    price = parse_price(settings.price) if settings.price else known_price(model)
    Budget(limit=settings.max_cost, price=price)  # refuses a limit without a price
    return JudgeChoice(kind="openai", model=model, base_url=base_url, price=price)


def open_judge(
    choice: JudgeChoice,
    settings: JudgeSettings,
    *,
    load: Callable[[str], Backend],
    loaded: Backend | None = None,
) -> Judge:
    """Open the chosen judge. ``load`` opens a model by name or folder; ``loaded`` is the model that
    answers, used as judge too when it is the same weights.

    Call ``check()`` on the result before generating anything.
    """
    if choice.kind == "openai":
        return OpenAIJudge(
            choice.model,
            base_url=choice.base_url,
            key=api_key(settings.api_key),
            concurrency=settings.concurrency,
            patience=Patience(tries=settings.max_retries + 1, timeout=settings.timeout),
            budget=Budget(limit=settings.max_cost, price=choice.price),
        )
    from pvec.judges.local import LocalJudge

    plain = loaded if loaded is not None and loaded.info.adapter is None else None
    if choice.kind == "local":
        if plain is not None and plain.info.id == choice.model:
            return LocalJudge(plain)
        return LocalJudge(load(choice.model), owns=True)
    if (Path(pvec.tiny.__file__).parent / "judge").is_dir():
        return LocalJudge(load("tiny/judge"), owns=True)
    if plain is not None and plain.info.bundled:
        return LocalJudge(plain)
    return LocalJudge(load("tiny"), owns=True)
