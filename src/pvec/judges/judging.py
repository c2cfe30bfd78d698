"""Judging, the part that extract, judge and steer-eval share: who judges, what is asked, what is
already scored. Answers come from the caller and scores go back to it one by one, so that nothing
paid for is lost; where they are kept is the caller's business.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pvec.tiny
from pvec.errors import InputError, JudgeError
from pvec.judges.base import Judge
from pvec.judges.cost import Budget, Estimate, Price, estimate, known_price, parse_price
from pvec.judges.openai import DEFAULT_MODEL, OpenAIJudge
from pvec.judges.pacing import Patience
from pvec.judges.prompts import COHERENCE, COHERENCE_PROMPT, fill
from pvec.types import JudgeQuery, JudgeScale, Progress, Score

if TYPE_CHECKING:
    from pvec.backends.base import Backend
    from pvec.settings.tree import JudgeSettings

KEY_NAME = "OPENAI_API_KEY"
_STAGE = "judging"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is scored: a trait by its evaluation prompt, or coherence."""

    name: str
    prompt: str
    scale: JudgeScale = "0-100"


COHERENCE_METRIC = Metric(name=COHERENCE, prompt=COHERENCE_PROMPT)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response as a judge sees it."""

    response_id: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one round of judging did. ``counts`` are of this round; ``skipped`` were scored before;
    ``unasked`` are left because the judge ``stopped`` (at its cost limit). ``spent`` in dollars.
    """

    counts: Mapping[str, int]
    skipped: int
    unasked: int
    stopped: str | None
    spent: float
    notes: tuple[str, ...]


# -- who judges -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge it will be, known before any model is loaded."""

    kind: Literal["tiny", "local", "openai"]
    model: str
    base_url: str | None = None
    price: Price | None = None
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
        return JudgeChoice(kind="tiny", model="tiny", price=_FREE)
    kind, _, model = spec.partition(":")
    if kind not in ("local", "openai"):
        kind, model = "", spec
    if not model:
        raise InputError(f"--judge-model {spec} names no model: write {spec}MODEL.")
    if kind == "local":
        return JudgeChoice(kind="local", model=model, price=_FREE)
    if not kind and Path(model).is_dir():
        raise InputError(
            f"--judge-model {spec} is a folder: write local:{spec} to judge with that model."
        )
    return _choose_server(settings, model=model)


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
            key=_key(settings),
            key_name=KEY_NAME,
            concurrency=settings.concurrency,
            patience=Patience(tries=settings.max_retries + 1, timeout=settings.timeout),
            budget=Budget(limit=settings.max_cost, price=choice.price),
        )
    from pvec.judges.local import LocalJudge

    own_weights = Path(pvec.tiny.__file__).parent / "judge"
    if choice.kind == "local":
        if loaded is not None and loaded.info.id == choice.model and loaded.info.adapter is None:
            return LocalJudge(loaded)
        return LocalJudge(load(choice.model), owns=True)
    if own_weights.is_dir():
        return LocalJudge(load("tiny/judge"), owns=True)
    if loaded is not None and loaded.info.bundled and loaded.info.adapter is None:
        return LocalJudge(loaded)
    return LocalJudge(load("tiny"), owns=True)


_FREE = Price(prompt=0.0, completion=0.0)


def _choose_server(settings: JudgeSettings, *, model: str) -> JudgeChoice:
    base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or None
    if base_url is not None and urlsplit(base_url).scheme not in ("http", "https"):
        msg = f"--judge-url {base_url} is no web address: it begins with http:// or https://."
        raise InputError(msg)
    if base_url is None and _key(settings) is None:
        raise JudgeError(
            f"The judge {model} needs an API key: set {KEY_NAME}, or use another judge "
            "(--judge-url URL, --judge-model local:MODEL, or --no-judge to score later)."
        )
    price = parse_price(settings.price) if settings.price else known_price(model)
    Budget(limit=settings.max_cost, price=price)  # refuses a limit without a price
    return JudgeChoice(kind="openai", model=model, base_url=base_url, price=price)


def _key(settings: JudgeSettings) -> str | None:
    if settings.api_key is not None:
        return settings.api_key.get_secret_value() or None
    return os.environ.get(KEY_NAME) or None


# -- what is asked --------------------------------------------------------------------------------


def score_id(answer: Answer, metric: Metric, *, judge: str) -> str:
    """Return 16 hex digits over everything that could change the score."""
    prompt = fill(metric.prompt, question=answer.question, answer=answer.answer)
    parts = (answer.response_id, judge, metric.name, metric.scale, prompt)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def scored_ids(scores: Iterable[Score]) -> set[str]:
    """Return the ids that need no further asking: errors are asked again, refusals are not."""
    return {score.id for score in scores if score.status != "error"}


def build_queries(
    answers: Iterable[Answer],
    metrics: Sequence[Metric],
    *,
    judge: str,
    scored: Collection[str] = frozenset(),
) -> Iterator[JudgeQuery]:
    """Yield one query per answer and metric that is not in ``scored``; none twice."""
    built: set[str] = set()
    for answer in answers:
        for metric in metrics:
            identity = score_id(answer, metric, judge=judge)
            if identity in scored or identity in built:
                continue
            built.add(identity)
            prompt = fill(metric.prompt, question=answer.question, answer=answer.answer)
            yield JudgeQuery(
                id=identity,
                response_id=answer.response_id,
                metric=metric.name,
                messages=({"role": "user", "content": prompt},),
                scale=metric.scale,
            )


def estimate_judging(
    questions: Sequence[str],
    metrics: Sequence[Metric],
    *,
    answers_per_question: int,
    answer_tokens: int,
    price: Price | None,
) -> Estimate:
    """Estimate, before there are answers, what judging them costs.

    ``answer_tokens`` is the length assumed of an answer; four characters count as a token.
    """
    answer = "x" * (4 * answer_tokens)
    prompts = (
        fill(metric.prompt, question=question, answer=answer)
        for question in questions
        for metric in metrics
        for _ in range(answers_per_question)
    )
    return estimate(prompts, price=price)


# -- asking ---------------------------------------------------------------------------------------


def judge_answers(
    answers: Sequence[Answer],
    metrics: Sequence[Metric],
    *,
    judge: Judge,
    scored: Collection[str] = frozenset(),
    on_score: Callable[[Score], None],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Judged:
    """Score what is not in ``scored`` yet; each score goes to ``on_score`` as it finishes.

    Raises ``JudgeError`` when asking is pointless, or when the first round over these answers ends
    without a single score; what was scored has then been handed over.
    """
    left = sum(1 for _ in build_queries(answers, metrics, judge=judge.name, scored=scored))
    skipped = len(answers) * len(metrics) - left
    counts: Counter[str] = Counter()
    detail = ""
    on_progress(Progress(stage=_STAGE, done=0, total=left, unit="scores"))
    for score in judge.score(build_queries(answers, metrics, judge=judge.name, scored=scored)):
        on_score(score)
        counts[score.status] += 1
        detail = score.detail or detail
        done = counts.total()
        missing = {"missing": float(done - counts["ok"])}
        on_progress(Progress(stage=_STAGE, done=done, total=left, unit="scores", extra=missing))
    if counts.total() and not counts["ok"] and not skipped:
        raise JudgeError(
            f"The judge {judge.name} scored none of {counts.total()} questions "
            f"({_spell(counts)}; last: {detail}): try another judge (--judge-model)."
        )
    return Judged(
        counts=dict(counts),
        skipped=skipped,
        unasked=left - counts.total(),
        stopped=judge.stopped,
        spent=judge.spent,
        notes=judge.notes,
    )


def _spell(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())
