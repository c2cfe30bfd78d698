"""What a command would do, and what judging would cost, before anything is spent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pvec.backends.planned import PlannedResponse, missing
from pvec.backends.resources import Resources, planned_work, resources
from pvec.backends.session import ModelSession, judge_spec
from pvec.judges.choice import loaded_spec
from pvec.judges.contrast import contrast_query, other_systems
from pvec.judges.cost import Estimate, estimate
from pvec.judges.prompts import Metric, fill, missing_queries
from pvec.judges.scoring import ResponseScorer, scaled
from pvec.models.costs import Work
from pvec.models.files import ModelSpec
from pvec.runs.responses import Json
from pvec.runs.store import Run
from pvec.vectors.vector import PersonaVector


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
    judge_calls: int = 0
    dollars: float | None = 0.0
    """What the judge calls cost; None where the price is unknown."""
    resources: Resources | None = None
    """What the model takes; None when nothing is left to do."""


@dataclass(frozen=True, kw_only=True)
class _Judging:
    """Who judges, and what that takes. ``model`` scores here, which is ``work`` for it."""

    judge: str = "none"
    judging: str = "no judge calls"
    judge_calls: int = 0
    dollars: float | None = 0.0
    model: ModelSpec | None = None
    work: Work = field(default_factory=Work)


def plan_run(  # noqa: PLR0913 (what a run is, and what it does)
    session: ModelSession,
    folder: Path,
    *,
    kind: str,
    identity: Mapping[str, Json],
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
    judged: bool,
    vectors: Iterable[PersonaVector] = (),
    captures: bool = False,
    further_tokens: int = 0,
) -> RunPlan:
    """Count what a run lacks of its planned responses and of their scores, and what that costs.

    ``captures`` says that the activations of the answers are captured, as are those of
    ``further_tokens``.

    Needs no key, loads no weights and writes nothing; raises what the run itself would raise for
    its settings and its folder.
    """
    run = Run.preview(folder, kind=kind, identity=identity)
    left = list(planned) if run is None else missing(run, planned)
    work = planned_work(left, captures=captures, further=further_tokens)
    judging = _Judging()
    if judged:
        scorer = ResponseScorer.of(session, vectors=vectors, need_key=False)
        if scorer.choice.kind == "contrast":
            scorer.check(metrics, extraction=kind == "extract")
        judging = _judging(scorer, run, planned, metrics)
    needs = None
    if left or further_tokens or (judging.model is not None and judging.work != Work()):
        needs = resources(session, work, judge=judging.model, judged=judging.work)
    return RunPlan(
        run=folder,
        answers=len(planned),
        missing=len(left),
        most_tokens=work.answer_tokens,
        judge=judging.judge,
        judging=judging.judging,
        judge_calls=judging.judge_calls,
        dollars=judging.dollars,
        resources=needs,
    )


def _judging(
    scorer: ResponseScorer,
    run: Run | None,
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
) -> _Judging:
    """Say what scoring the planned responses takes; loads and asks nothing."""
    choice = scorer.choice
    model = None
    if choice.kind not in ("openai", "litellm"):
        model = loaded_spec(choice, spec=judge_spec(choice.model, scorer.settings))
    if choice.kind == "contrast":
        passes, work = _forward_passes(scorer, run, planned, metrics)
        text = (
            f"{passes:,} forward passes of an answer, at most {work.scored:,} tokens and the "
            f"prompts they share, on this machine; no key, no cost"
        )
        return _Judging(judge=f"contrast:{choice.model}", judging=text, model=model, work=work)
    cost = _estimate(scorer, run, planned, metrics)
    return _Judging(
        judge=choice.model,
        judging=str(cost),
        judge_calls=cost.calls,
        dollars=cost.dollars,
        model=model,
        work=Work(captured=cost.prompt_tokens, context=cost.prompt_tokens / max(cost.calls, 1)),
    )


def _estimate(
    scorer: ResponseScorer,
    run: Run | None,
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
) -> Estimate:
    """Estimate what it costs to score what this judge has not scored of the planned responses.

    An answer that is still to be generated is taken to be as long as its limit allows, at four
    characters a token. ``run`` is None for one that has not begun. Loads and asks nothing.
    """
    metrics = [scaled(metric, scorer.settings.judge.scale) for metric in metrics]
    identities = {response.id for response in planned}
    records = [] if run is None else [r for r in run.responses() if r.id in identities]
    answered = {record.id for record in records}
    queries = missing_queries(
        records,
        metrics,
        judge=scorer.expected_name,
        fenced=scorer.choice.kind != "tiny",
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
    return estimate(prompts, price=scorer.choice.price, repeats=scorer.choice.repeats)


def _forward_passes(
    scorer: ResponseScorer,
    run: Run | None,
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
) -> tuple[int, Work]:
    """Return the passes of the contrast judge, each answer after each of its prompts, and the
    answers' tokens in them.
    """
    records = {} if run is None else {record.id: record for record in run.responses()}
    known = set() if run is None else run.scored_ids()
    name, settings = scorer.expected_name, scorer.settings.judge
    most = settings.contrast_pairs
    passes = tokens = 0
    for response in planned:
        record = records.get(response.id)
        for metric in metrics:
            if record and contrast_query(record, metric, judge=name, most=most).id in known:
                continue
            # Coherence takes the answer and its words in random order.
            pairs = other_systems(metric.trait, response)[:most] or ((),)
            length = len(record.token_ids) if record else response.sampling.max_tokens
            passes += 2 * len(pairs)
            tokens += 2 * len(pairs) * min(length, settings.contrast_tokens)
    mean = sum(len(response.prompt_ids) for response in planned) / max(len(planned), 1)
    return passes, Work(scored=tokens, context=mean)
