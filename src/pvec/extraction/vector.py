"""From judged responses to a vector file: capture those that count, take the difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pvec import __version__
from pvec.activations.answers import (
    ActivationWriter,
    KeptActivations,
    KeptAnswer,
    activation_bytes,
)
from pvec.backends.kept_means import captured
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.extraction.judge import MetricMean, conclude, pair_of, sign_of
from pvec.extraction.methods import estimated_vector
from pvec.judges.calibration import METADATA_KEY
from pvec.judges.measurement import run_calibration
from pvec.models.chat import spans_from_ids
from pvec.runs.responses import ResponseRecord, stable_hash
from pvec.runs.store import Run
from pvec.runs.summary import update_summary
from pvec.settings.commands import FilterSettings
from pvec.traits.trait import Trait
from pvec.types import MEAN_DIFF, SIGNS, Method, Progress, Sign, TokenSpans
from pvec.vectors.accumulate import VectorAccumulator, VectorSet
from pvec.vectors.files import load_vector, save_vector
from pvec.vectors.filter import REASONS, FilterResult, Reason
from pvec.vectors.quality import VectorSummary, stat_arrays, summarize
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    from pvec.models.load import ModelMetadata

ENOUGH = 10
"""Fewer kept responses than this on a side make no vector that anyone should trust."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """One response as tokens: what is averaged of it, its length and how much of it is thinking."""

    answer: KeptAnswer
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
    method: Method = MEAN_DIFF,
    keep_activations: bool = False,
) -> RunVector:
    """Filter a judged extraction's answers, export them, and write the vector of the kept ones.

    ``judge`` is the judge whose scores count, ``out`` where the vector goes instead of into the
    run. ``method`` estimates it, from the activations that the run keeps if they are of these
    answers; ``keep_activations`` puts them there. Raises ``InputError`` when too few answers are
    left; the exports are written all the same, a vector from before is not touched.
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
    path = out or method_path(store.vector_path(trait.name), method)
    folder = activations_of(store.path)
    stored = KeptActivations.current(folder, inputs=provenance["inputs"])
    vector = _if_current(path, provenance["inputs"], method)
    if vector is None or (keep_activations and stored is None):
        contributions = [contribution_of(record) for record in kept]
        if stored is not None and method != MEAN_DIFF:
            computed = estimated_vector(stored, method, on_progress=session.on_progress)
        else:
            computed = compute_vector(
                session,
                trait.name,
                contributions,
                filtered=filtered,
                provenance=provenance,
                method=method,
                keep=folder if keep_activations else None,
            )
        vector = computed
        session.processes.on_main(lambda: save_vector(computed, path))
    summary = summarize(vector)
    suggestion = {"judge": judge, "layer": summary.suggested_layer, "reason": summary.reason}
    session.processes.on_main(lambda: update_summary(store.path, suggested=suggestion))
    return RunVector(path=path, scores=outcome.means, filtered=filtered.counts, summary=summary)


def method_path(path: Path, method: Method) -> Path:
    """Return where a vector by ``method`` is kept: beside ``path``, in a folder of the method."""
    return path if method == MEAN_DIFF else path.parent / method / path.name


def activations_of(run: Path) -> Path:
    """Return the folder of a run for the activations of its answers."""
    return run / "activations"


def _if_current(path: Path, inputs: str, method: Method) -> PersonaVector | None:
    """Return the vector at ``path`` if it was made from the same responses in the same way."""
    if not path.exists():
        return None
    vector = load_vector(path)
    made = vector.metadata.get("inputs"), vector.metadata.get("method", MEAN_DIFF)
    return vector if made == (inputs, method) else None


def contribution_of(record: ResponseRecord) -> Contribution:
    """Return a response of a run: its answer span, without what it thought before."""
    return Contribution(
        answer=KeptAnswer(
            id=record.id,
            sign=sign_of(record),
            question=record.question_id,
            pair="/".join(map(str, pair_of(record))),
        ),
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
    method: Method = MEAN_DIFF,
    keep: Path | None = None,
) -> PersonaVector:
    """Capture the responses and return their persona vector (all three kinds) with its quality.

    Each process of ``session`` captures its share, and all return the same. ``keep`` is a folder
    for the activations of every response, which methods other than the mean difference need (a
    temporary one without it). Raises ``InputError`` when a side has fewer than ``ENOUGH``
    responses, with the reasons for which ``filtered`` dropped the others, and for activations of
    single responses in several processes.
    """
    _require_enough(trait, contributions, filtered)
    if keep is None and method == MEAN_DIFF:
        return _captured_vector(session, trait, contributions, provenance, writer=None)
    if session.processes.size > 1:
        raise InputError(
            "Activations of single answers (--keep-activations, --method) are written by one "
            "process: run the command without the launcher."
        )
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(TemporaryDirectory()))
        session.notify(activations_note(session.metadata, len(contributions), folder=keep))
        writer = stack.enter_context(
            ActivationWriter(
                folder,
                answers=len(contributions),
                num_layers=session.metadata.num_layers,
                hidden_size=session.metadata.hidden_size,
            )
        )
        vector = _captured_vector(session, trait, contributions, provenance, writer=writer)
        assert vector.mean_norm is not None
        stored = writer.finish(trait=trait, mean_norm=vector.mean_norm, metadata=vector.metadata)
        if method == MEAN_DIFF:
            return vector
        return estimated_vector(stored, method, on_progress=session.on_progress)


def activations_note(model: ModelMetadata, answers: int, *, folder: Path | None) -> str:
    """Say how much disk the activations of ``answers`` responses take, and where."""
    size = activation_bytes(answers, num_layers=model.num_layers, hidden_size=model.hidden_size)
    where = f"in {folder}" if folder else "in a temporary folder"
    return (
        f"the activations of {answers:,} answers take {size / 2**20:,.1f} MiB {where}, and three "
        f"times that while they are captured"
    )


def _captured_vector(
    session: ModelSession,
    trait: str,
    contributions: Sequence[Contribution],
    provenance: Mapping[str, str],
    *,
    writer: ActivationWriter | None,
) -> PersonaVector:
    """Capture the responses into ``writer`` and return their mean difference."""
    accumulator = VectorAccumulator(questions=[r.answer.question for r in contributions])
    share = session.processes.share(
        contributions, cost=lambda response: len(response.spans.token_ids)
    )
    answers = {response.answer.id: response.answer for response in share}
    stage, on_progress = f"{trait}: activations", session.on_progress
    on_progress(Progress(stage=stage, done=0, total=len(share), unit="responses"))
    rows = captured(session, (response.spans for response in share))
    for done, row in enumerate(rows, start=1):
        answer = answers[row.id]
        accumulator.add(row, sign=answer.sign, question=answer.question)
        if writer is not None:
            writer.add(row, answer)
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
            **stat_arrays(stats),
            **whole.class_projections(),
            **whole.class_quantiles(),
        },
        metadata={**_provenance(session, result), **provenance, "method": MEAN_DIFF},
    )


def _require_enough(
    trait: str, contributions: Sequence[Contribution], filtered: FilterResult
) -> None:
    counts = Counter(response.answer.sign for response in contributions)
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
        "dtype": f"{info.dtype}, {info.quantize} weights" if info.quantize else info.dtype,
        "kept_pos": str(counts["pos"]),
        "kept_neg": str(counts["neg"]),
    }
