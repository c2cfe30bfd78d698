"""From judged responses to a vector file: capture those that count, take the difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec import __version__
from pvec.backends.kept_means import captured
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.extraction.judge import MetricMean, conclude, sign_of
from pvec.judges.calibration import METADATA_KEY
from pvec.judges.measurement import run_calibration
from pvec.models.chat import spans_from_ids
from pvec.runs.responses import ResponseRecord, stable_hash
from pvec.runs.store import Run
from pvec.runs.summary import update_summary
from pvec.settings.sections import FilterSettings
from pvec.stats import Interval
from pvec.traits.trait import Trait
from pvec.types import SIGNS, Progress, Sign, TokenSpans
from pvec.vectors.accumulate import VectorAccumulator, VectorSet
from pvec.vectors.filter import REASONS, FilterResult, Reason
from pvec.vectors.formats import load_vector, save_vector
from pvec.vectors.quality import VectorSummary, summarize
from pvec.vectors.vector import PersonaVector

ENOUGH = 10
"""Fewer kept responses than this on a side make no vector that anyone should trust."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """One response as tokens: what is averaged of it, its length and how much of it is thinking."""

    sign: Sign
    question: str
    spans: TokenSpans
    tokens: int
    think_tokens: int
    merged: bool = False
    """Whether its first token holds the prompt's last characters."""


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
    settings = session.settings.filter
    outcome = session.processes.on_main(
        lambda: conclude(store, trait.name, records, judge=judge, settings=settings)
    )
    filtered = outcome.filtered
    kept = [record for record in records if filtered.kept(record.id)]
    provenance = {
        **filter_provenance(settings, filtered),
        "trait_hash": trait.hash,
        "seed": str(session.settings.generation.seed),
        "judge": judge,
    }
    if calibration := run_calibration(store.manifest, judge):
        provenance[METADATA_KEY] = calibration.to_json()
    provenance["inputs"] = stable_hash(
        {**provenance, "engine": session.identity, "kept": sorted(record.id for record in kept)}
    )
    path = out or store.vector_path(trait.name)
    vector = _if_current(path, provenance["inputs"])
    if vector is None:
        contributions = [contribution_of(record) for record in kept]
        vector = computed = compute_vector(
            session, trait.name, contributions, filtered=filtered, provenance=provenance
        )
        session.processes.on_main(lambda: save_vector(computed, path))
    summary = summarize(vector)
    suggestion = {"judge": judge, "layer": summary.suggested_layer, "reason": summary.reason}
    session.processes.on_main(lambda: update_summary(store.path, suggested=suggestion))
    return RunVector(path=path, scores=outcome.means, filtered=filtered.counts, summary=summary)


def _if_current(path: Path, inputs: str) -> PersonaVector | None:
    """Return the vector at ``path`` if it was made from the same responses in the same way."""
    if not path.exists():
        return None
    vector = load_vector(path)
    return vector if vector.metadata.get("inputs") == inputs else None


def contribution_of(record: ResponseRecord) -> Contribution:
    """Return a response of a run: its answer span, without what it thought before."""
    return Contribution(
        sign=sign_of(record),
        question=record.question_id,
        spans=spans_from_ids(
            record.id,
            prompt_ids=record.prompt_ids,
            answer_ids=record.token_ids,
            skip=record.think_tokens,
        ),
        tokens=len(record.token_ids),
        think_tokens=record.think_tokens,
    )


def compute_vector(
    session: ModelSession,
    trait: str,
    contributions: Sequence[Contribution],
    *,
    filtered: FilterResult,
    provenance: Mapping[str, str],
) -> PersonaVector:
    """Capture the responses and return their persona vector (all three kinds) with its quality.

    Each process of ``session`` captures its share, and all return the same. Raises
    ``InputError`` when a side has fewer than ``ENOUGH`` responses, with the reasons for which
    ``filtered`` dropped the others.
    """
    _require_enough(trait, contributions, filtered)
    accumulator = VectorAccumulator(questions=[response.question for response in contributions])
    share = session.processes.share(
        contributions, cost=lambda response: len(response.spans.token_ids)
    )
    by_id = {response.spans.id: response for response in share}
    stage, on_progress = f"{trait}: activations", session.on_progress
    on_progress(Progress(stage=stage, done=0, total=len(share), unit="responses"))
    rows = captured(session, (response.spans for response in share))
    for done, row in enumerate(rows, start=1):
        response = by_id[row.id]
        accumulator.add(row, sign=response.sign, question=response.question)
        on_progress(Progress(stage=stage, done=done, total=len(share), unit="responses"))
    parts = session.processes.gather(accumulator)
    return session.processes.on_main(lambda: _finish(session, trait, parts, provenance))


def _finish(
    session: ModelSession,
    trait: str,
    parts: Sequence[VectorAccumulator],
    provenance: Mapping[str, str],
) -> PersonaVector:
    """Return the vector of what all processes accumulated."""
    whole, *rest = parts
    for part in rest:
        whole.merge(part)
    result = whole.result()
    stats = {"auc": whole.separation(), "stability": whole.stability()}
    return PersonaVector(
        trait=trait,
        kinds=result.vectors,
        mean_norm=result.mean_norm,
        stats={
            **dict(_stat_arrays(stats)),
            **whole.class_projections(),
            **whole.class_quantiles(),
        },
        metadata={**_provenance(session, result), **provenance},
    )


def _require_enough(
    trait: str, contributions: Sequence[Contribution], filtered: FilterResult
) -> None:
    counts = Counter(response.sign for response in contributions)
    if min(counts[sign] for sign in SIGNS) >= ENOUGH:
        return
    raise InputError(
        f"Too few answers count towards a vector for {trait!r}: {counts['pos']} positive and "
        f"{counts['neg']} negative were kept (positive: {_reasons(filtered, 'pos')}; negative: "
        f"{_reasons(filtered, 'neg')}) and {ENOUGH} of each are needed; ask for more "
        f"(--rollouts), loosen --threshold or --min-coherence, or use a model that follows the "
        f"trait's instructions better."
    )


def _reasons(filtered: FilterResult, sign: Sign) -> str:
    counts = filtered.counts[sign]
    return ", ".join(f"{n} {REASONS[reason]}" for reason, n in counts.items() if n)


def filter_provenance(settings: FilterSettings, filtered: FilterResult) -> dict[str, str]:
    """Return what a vector file says of the filter: its thresholds and how many it dropped."""
    dropped = {sign: sum(n.values()) - n["kept"] for sign, n in filtered.counts.items()}
    return {
        "threshold": str(settings.threshold),
        "min_coherence": str(settings.coherence),
        "paired": str(settings.paired).lower(),
        "dropped_pos": str(dropped["pos"]),
        "dropped_neg": str(dropped["neg"]),
    }


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
        for part, suffix in (("mean", ""), ("low", "_low"), ("high", "_high")):
            values = [getattr(interval, part) for interval in intervals]
            yield f"{name}{suffix}", np.array(values, dtype=np.float32)
