"""From responses that count to a vector file: what ``extract`` and ``vector compute`` share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec import __version__
from pvec.backends.kept_means import captured
from pvec.backends.session import ModelSession
from pvec.data.judged_csv import JudgedAnswer, write_judged_csv
from pvec.errors import InputError
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import filter_records, score_of, sign_of
from pvec.models.chat import spans_from_ids
from pvec.runs.responses import ResponseRecord, stable_hash
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.stats import Interval, bootstrap_mean
from pvec.traits.trait import Trait
from pvec.types import SIGNS, Progress, Score, Sign, TokenSpans
from pvec.vectors.accumulate import VectorAccumulator, VectorSet
from pvec.vectors.filter import REASONS, FilterResult, Reason
from pvec.vectors.formats import load_vector, save_vector
from pvec.vectors.quality import VectorSummary, summarize
from pvec.vectors.vector import PersonaVector

ENOUGH = 10
"""Fewer kept responses than this on a side make no vector that anyone should trust."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """One response that counts towards a vector."""

    sign: Sign
    question: str
    spans: TokenSpans


Scores = Mapping[str, Mapping[str, Score]]
"""``Run.scores_by_response``: response id → metric → score."""


@dataclass(frozen=True, kw_only=True)
class MetricMean:
    """Mean score on one metric with a 95 % interval over questions; ``group`` is the answers'
    sign, or empty for all of them.
    """

    group: str
    metric: str
    score: Interval


@dataclass(frozen=True, kw_only=True)
class RunVector:
    """The vector of a judged run: what was kept and why, and what came of it."""

    path: Path
    scores: tuple[MetricMean, ...]
    filtered: Mapping[Sign, Mapping[Reason, int]]
    summary: VectorSummary


def vector_of_run(
    store: Run,
    trait: Trait,
    records: Sequence[ResponseRecord],
    *,
    judge: str,
    session: ModelSession,
    out: Path | None = None,
) -> RunVector:
    """Filter a judged extraction's answers, export them, and write the vector of the kept ones.

    ``judge`` is the judge whose scores count, ``out`` where the vector goes instead of into the
    run. Raises ``InputError`` when too few answers are left; the exports are written all the same,
    a vector from before is not touched.
    """
    settings = session.settings
    scores = store.scores_by_response(judge=judge)
    filtered = filter_records(records, scores, trait=trait.name, settings=settings)
    session.processes.on_main(lambda: export_signs(store, trait.name, records, scores))
    kept = [record for record in records if filtered.kept(record.id)]
    provenance = {
        **filter_provenance(settings, filtered),
        "trait_hash": trait.hash,
        "seed": str(settings.generation.seed),
        "judge": judge,
    }
    provenance["inputs"] = stable_hash(
        {**provenance, "engine": session.identity, "kept": sorted(record.id for record in kept)}
    )
    path = out or store.vector_path(trait.name)
    vector = _if_current(path, provenance["inputs"])
    if vector is None:
        vector = compute_vector(
            session,
            trait.name,
            [_contribution(record) for record in kept],
            filtered=filtered,
            provenance=provenance,
        )
        made = vector
        session.processes.on_main(lambda: save_vector(made, path))
    return RunVector(
        path=path,
        scores=tuple(_means_by_sign(records, scores, trait.name)),
        filtered=filtered.counts,
        summary=summarize(vector),
    )


def _if_current(path: Path, inputs: str) -> PersonaVector | None:
    """Return the vector at ``path`` if it was made from the same responses in the same way."""
    if not path.exists():
        return None
    vector = load_vector(path)
    return vector if vector.metadata.get("inputs") == inputs else None


def _contribution(record: ResponseRecord) -> Contribution:
    """Return a response as a contribution: its answer span, without what it thought before."""
    spans = spans_from_ids(
        record.id,
        prompt_ids=record.prompt_ids,
        answer_ids=record.token_ids,
        skip=record.think_tokens,
    )
    return Contribution(sign=sign_of(record), question=record.question_id, spans=spans)


def export_signs(
    store: Run, trait: str, records: Iterable[ResponseRecord], scores: Scores
) -> list[Path]:
    """Write ``TRAIT_pos.csv`` and ``TRAIT_neg.csv`` in the reference's columns."""
    rows: dict[Sign, list[JudgedAnswer]] = {"pos": [], "neg": []}
    for record in records:
        mine = scores.get(record.id, {})
        rows[sign_of(record)].append(
            JudgedAnswer(
                question=record.question,
                prompt=record.prompt,
                answer=record.answer,
                question_id=record.question_id,
                trait_score=score_of(mine, trait),
                coherence=score_of(mine, COHERENCE),
            )
        )
    paths = {sign: store.csv_path(f"{trait}_{sign}") for sign in rows}
    for sign, answers in rows.items():
        write_judged_csv(paths[sign], answers, trait=trait)
    return list(paths.values())


def compute_vector(
    session: ModelSession,
    trait: str,
    contributions: Sequence[Contribution],
    *,
    filtered: FilterResult | None = None,
    provenance: Mapping[str, str],
) -> PersonaVector:
    """Capture the responses and return their persona vector (all three kinds) with its quality.

    Each of the engine's processes captures its share, and all return the same. Raises
    ``InputError`` when a side has fewer than ``ENOUGH`` responses, with the reasons for which
    ``filtered`` dropped the others.
    """
    _require_enough(trait, contributions, filtered)
    accumulator = VectorAccumulator(questions=[one.question for one in contributions])
    mine = session.processes.share(contributions, cost=lambda one: len(one.spans.token_ids))
    by_id = {one.spans.id: one for one in mine}
    stage, on_progress = f"{trait}: activations", session.on_progress
    on_progress(Progress(stage=stage, done=0, total=len(mine), unit="responses"))
    rows = captured(session, (one.spans for one in mine))
    for done, row in enumerate(rows, start=1):
        one = by_id[row.id]
        accumulator.add(row, sign=one.sign, question=one.question)
        on_progress(Progress(stage=stage, done=done, total=len(mine), unit="responses"))
    parts = session.processes.gather(accumulator)
    return session.processes.on_main(lambda: _finish(session, trait, parts, provenance))


def _finish(
    session: ModelSession,
    trait: str,
    parts: Sequence[VectorAccumulator],
    provenance: Mapping[str, str],
) -> PersonaVector:
    """Return the vector of what all processes accumulated."""
    whole, *others = parts
    for other in others:
        whole.merge(other)
    result = whole.result()
    stats = {"auc": whole.separation(), "stability": whole.stability()}
    return PersonaVector(
        trait=trait,
        kinds=result.vectors,
        mean_norm=result.mean_norm,
        stats=dict(_stat_arrays(stats)),
        metadata={**_provenance(session, result), **provenance},
    )


def _require_enough(
    trait: str, contributions: Sequence[Contribution], filtered: FilterResult | None
) -> None:
    counts = {s: sum(one.sign == s for one in contributions) for s in ("pos", "neg")}
    if min(counts.values()) >= ENOUGH:
        return
    why = ""
    if filtered is not None:
        why = f" (positive: {_reasons(filtered, 'pos')}; negative: {_reasons(filtered, 'neg')})"
    raise InputError(
        f"Too few answers count towards a vector for {trait!r}: {counts['pos']} positive and "
        f"{counts['neg']} negative were kept{why} and {ENOUGH} of each are needed; ask for more "
        f"(--rollouts), loosen --threshold or --min-coherence, or use a model that follows the "
        f"trait's instructions better."
    )


def _reasons(filtered: FilterResult, sign: Sign) -> str:
    counts = filtered.counts[sign]
    return ", ".join(f"{n} {REASONS[reason]}" for reason, n in counts.items() if n)


def filter_provenance(settings: Settings, filtered: FilterResult) -> dict[str, str]:
    """Return what a vector file says of the filter: its thresholds and how many it dropped."""
    dropped = {s: sum(c.values()) - c["kept"] for s, c in filtered.counts.items()}
    return {
        "threshold": str(settings.filter.threshold),
        "min_coherence": str(settings.filter.coherence),
        "paired": str(settings.filter.paired).lower(),
        "dropped_pos": str(dropped["pos"]),
        "dropped_neg": str(dropped["neg"]),
    }


def metric_means(
    records: Sequence[ResponseRecord], scores: Scores, metrics: Sequence[str], *, group: str = ""
) -> Iterator[MetricMean]:
    """Yield the mean of each metric over ``records``, missing scores counted."""
    questions = [record.question_id for record in records]
    for metric in metrics:
        values = [score_of(scores.get(record.id, {}), metric) for record in records]
        yield MetricMean(group=group, metric=metric, score=bootstrap_mean(values, groups=questions))


def _means_by_sign(
    records: Sequence[ResponseRecord], scores: Scores, trait: str
) -> Iterator[MetricMean]:
    for sign in SIGNS:
        mine = [record for record in records if sign_of(record) == sign]
        yield from metric_means(mine, scores, [trait, COHERENCE], group=sign)


def _provenance(session: ModelSession, result: VectorSet) -> dict[str, str]:
    info = session.backend.info
    counts = result.counts["response_avg"]
    return {
        "pvec_version": __version__,
        "model_id": info.id,
        "model_fingerprint": info.fingerprint,
        "model_type": session.metadata.model_type,
        "adapter": info.adapter or "",
        "dtype": info.dtype,
        "kept_pos": str(counts["pos"]),
        "kept_neg": str(counts["neg"]),
    }


def _stat_arrays(per_layer: Mapping[str, Sequence[Interval]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, intervals in per_layer.items():
        yield name, np.array([one.mean for one in intervals], dtype=np.float32)
        yield f"{name}_low", np.array([one.low for one in intervals], dtype=np.float32)
        yield f"{name}_high", np.array([one.high for one in intervals], dtype=np.float32)
