"""What a command would do, and what judging would cost, before anything is spent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pvec.backends.planned import PlannedResponse, missing
from pvec.backends.session import ModelSession
from pvec.judges.contrast import contrast_query, other_systems
from pvec.judges.cost import Estimate, estimate
from pvec.judges.prompts import Metric, fill, missing_queries
from pvec.judges.scoring import ResponseScorer, scaled
from pvec.runs.responses import Json
from pvec.runs.store import Run
from pvec.settings.judging import JudgeSettings
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


def plan_run(
    session: ModelSession,
    folder: Path,
    *,
    kind: str,
    identity: Mapping[str, Json],
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
    judged: bool,
    vectors: Iterable[PersonaVector] = (),
) -> RunPlan:
    """Count what a run lacks of its planned responses and of their scores, and what that costs.

    Needs no key, loads no weights and writes nothing; raises what the run itself would raise for
    its settings and its folder.
    """
    run = Run.preview(folder, kind=kind, identity=identity)
    left = list(planned) if run is None else missing(run, planned)
    judge, judging = "none", "no judge calls"
    calls = 0
    dollars: float | None = 0.0
    if judged:
        scorer = ResponseScorer.of(session, vectors=vectors, need_key=False)
        judge, settings = scorer.choice.model, session.settings.judge
        if scorer.choice.kind == "contrast":
            scorer.check(metrics, extraction=kind == "extract")
            judge = f"contrast:{judge}"
            judging = _forward_passes(scorer, settings, run, planned, metrics)
        else:
            cost = _estimate(scorer, settings, run, planned, metrics)
            judging, calls, dollars = str(cost), cost.calls, cost.dollars
    return RunPlan(
        run=folder,
        answers=len(planned),
        missing=len(left),
        most_tokens=sum(response.sampling.max_tokens for response in left),
        judge=judge,
        judging=judging,
        judge_calls=calls,
        dollars=dollars,
    )


def _estimate(
    scorer: ResponseScorer,
    settings: JudgeSettings,
    run: Run | None,
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
) -> Estimate:
    """Estimate what it costs to score what this judge has not scored of the planned responses.

    An answer that is still to be generated is taken to be as long as its limit allows, at four
    characters a token. ``run`` is None for one that has not begun. Loads and asks nothing.
    """
    metrics = [scaled(metric, settings.scale) for metric in metrics]
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
    settings: JudgeSettings,
    run: Run | None,
    planned: Sequence[PlannedResponse],
    metrics: Sequence[Metric],
) -> str:
    """Say how much the contrast judge would compute: every answer after each of its prompts."""
    records = {} if run is None else {record.id: record for record in run.responses()}
    known = set() if run is None else run.scored_ids()
    name, most = scorer.expected_name, settings.contrast_pairs
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
    return (
        f"{passes:,} forward passes of an answer, at most {tokens:,} tokens and the prompts they "
        f"share, on this machine; no key, no cost"
    )
