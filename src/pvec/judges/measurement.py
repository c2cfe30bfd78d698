"""Contrast judging of a run: measure what is missing, then put every answer on the scale.

Measurements are appended to ``scores.jsonl`` as they come, then the scores that follow from them
and the calibration, under the same ids. A second call measures nothing again and writes only scores
that have changed, because more answers have joined the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pvec.errors import InputError, JudgeError
from pvec.judges.calibration import (
    METADATA_KEY,
    Calibration,
    Fit,
    Measured,
    cross_fitted,
    fit,
)
from pvec.judges.contrast import CHUNK, ContrastJudge, ContrastQuery, contrast_query
from pvec.judges.prompts import Metric
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.types import Progress, Score
from pvec.vectors.files import find_vector, load_vector
from pvec.vectors.vector import PersonaVector

FEWEST_PAIRS = 2
"""An answer is never scored with the instruction pair that produced it, so one pair is too few."""

LEAST_COHERENCE = 25.0
"""Below this an answer gets no trait score: word salad can be likelier under any instruction."""


def require_pairs(metrics: Sequence[Metric]) -> None:
    """Raise ``InputError`` for a trait whose instruction pairs are too few for a contrast."""
    for metric in metrics:
        pairs = 0 if metric.trait is None else len(metric.trait.instructions)
        if not metric.is_coherence and pairs < FEWEST_PAIRS:
            raise InputError(
                f"The contrast judge needs at least {FEWEST_PAIRS} instruction pairs, as it leaves "
                f"out the pair that an answer was given under, and the trait {metric.name!r} has "
                f"{pairs}: add pairs to its file, or use another judge."
            )


def require_questions(metrics: Sequence[Metric], *, limit: int | None) -> None:
    """Raise ``InputError`` for an extraction that asks too little to be cross-fitted."""
    for metric in metrics:
        if metric.trait is not None and len(metric.trait.extract_questions[:limit]) < 2:
            raise InputError(
                f"The contrast judge scores an extraction's answers by those to other questions, "
                f"and {metric.name!r} is asked one question: ask more (--limit)."
            )


def find_calibration(
    judge: str,
    metrics: Sequence[Metric],
    *,
    given: str | Path | None,
    vectors: Iterable[PersonaVector],
    manifest: Mapping[str, Any],
    default: Callable[[str], Path],
) -> Calibration:
    """Return the fits of ``judge`` for ``metrics``: from the file that was ``given``, the vectors
    in use, the run's own manifest, or the vector where ``extract`` writes it (``default``).

    Raises ``InputError`` that says what to do when a trait has none.
    """
    sources = [] if given is None else [load_vector(find_vector(given))]
    sources += vectors
    known = [found for vector in sources if (found := vector_calibration(vector))]
    if recorded := run_calibration(manifest, judge):
        known.append(recorded)
    for metric in metrics:
        path = default(metric.name)
        if path.is_file() and (found := vector_calibration(load_vector(path))):
            known.append(found)
    fits: dict[str, Fit] = {}
    for calibration in known:
        if calibration.judge == judge:
            fits = {**calibration.fits, **fits}
    for metric in metrics:
        if metric.name not in fits:
            others = sorted({c.judge for c in known if metric.name in c.fits})
            seen = f"; there is one of {', '.join(others)}" if others else ""
            raise InputError(
                f"The judge {judge} has no calibration for {metric.name!r}{seen}: make one with "
                f"`pvec extract --trait {metric.name} --judge-model contrast` and name its vector "
                f"with --calibration, or use another judge."
            )
    return Calibration(judge=judge, fits={metric.name: fits[metric.name] for metric in metrics})


def vector_calibration(vector: PersonaVector) -> Calibration | None:
    """Return the calibration that a vector carries, if any. Raises ``InputError`` for a bad one."""
    text = vector.metadata.get(METADATA_KEY)
    if text is None:
        return None
    return _read(text, f"the vector of {vector.trait!r}", remedy="extract the vector again")


def run_calibration(manifest: Mapping[str, Any], judge: str) -> Calibration | None:
    """Return the calibration that a run's manifest keeps for ``judge``, if any."""
    text = manifest.get(METADATA_KEY, {}).get(judge)
    return None if text is None else _read(text, "the manifest", remedy="judge into another run")


def _read(text: str, where: str, *, remedy: str) -> Calibration:
    try:
        return Calibration.from_json(text)
    except ValueError as error:
        raise InputError(f"The calibration in {where} is damaged ({error}): {remedy}.") from None


def measure(
    run: Run,
    judge: ContrastJudge,
    records: Sequence[ResponseRecord],
    metrics: Sequence[Metric],
    *,
    on_progress: Callable[[Progress], None],
) -> set[str]:
    """Measure what ``judge`` has not measured yet; return the ids of those scores.

    Measured in portions that depend on what is asked alone, so that a run which was killed and
    resumed holds the same numbers to the last digit: floating-point sums differ by portion.
    """
    queries = portions_of(records, metrics, judge=judge)
    known = run.scored_ids()
    left = sum(query.id not in known for portion in queries for query in portion)
    measured: set[str] = set()

    def show() -> None:
        on_progress(Progress(stage="judging", done=len(measured), total=left, unit="scores"))

    show()
    for portion in queries:
        if all(query.id in known for query in portion):
            continue
        for score in judge.score(portion):
            if score.id not in known:
                run.append_score(score)
                measured.add(score.id)
        show()
    return measured


def portions_of(
    records: Sequence[ResponseRecord], metrics: Sequence[Metric], *, judge: ContrastJudge
) -> list[list[ContrastQuery]]:
    """Return what is to be measured, answers to one question side by side, none twice."""
    queries = {
        query.id: query
        for record in records
        for metric in metrics
        for query in [contrast_query(record, metric, judge=judge.name, most=judge.most_pairs)]
    }
    ordered = sorted(queries.values(), key=lambda query: (query.messages[0]["content"], query.id))
    return [ordered[start : start + CHUNK] for start in range(0, len(ordered), CHUNK)]


def calibrate(
    run: Run,
    judge: str,
    records: Sequence[ResponseRecord],
    metrics: Sequence[Metric],
    *,
    calibration: Calibration | None,
) -> Calibration:
    """Bring the measurements of ``records`` to the scale, and keep the calibration in the run.

    Without ``calibration`` the answers are an extraction's, and cross-fitted. Raises as
    ``calibration.fit`` and ``cross_fitted`` do; the measurements are kept.
    """
    table = run.scores_by_response(judge=judge)
    fits: dict[str, Fit] = {}
    incoherent: dict[str, str] = {}
    for metric in sorted(metrics, key=lambda metric: not metric.is_coherence):
        measured = {
            record.id: (record, score)
            for record in records
            if (score := table.get(record.id, {}).get(metric.name)) and score.raw is not None
        }
        fits[metric.name], values = _scores(
            metric.name,
            {name: both for name, both in measured.items() if name not in incoherent},
            None if calibration is None else calibration.fits[metric.name],
        )
        if metric.is_coherence:
            incoherent = {
                name: f"incoherent (coherence {value:.0f}): its trait cannot be told"
                for name, value in values.items()
                if value < LEAST_COHERENCE
            }
        for name, (_, score) in measured.items():
            final_score = replace(
                score,
                score=values.get(name),
                status="ok" if name in values else "unparsable",
                detail="" if name in values else incoherent[name],
            )
            if final_score != score:
                run.append_score(final_score)
    final = Calibration(judge=judge, fits=fits)
    kept = run.manifest.get(METADATA_KEY, {})
    if kept.get(judge) != final.to_json():
        run.update_manifest(**{METADATA_KEY: {**kept, judge: final.to_json()}})
    return final


def _scores(
    metric: str, measured: Mapping[str, tuple[ResponseRecord, Score]], final: Fit | None
) -> tuple[Fit, dict[str, float]]:
    """Return the fit of a metric, and the scores by it or, for an extraction, cross-fitted."""
    if final is None:
        answers = {name: _measured(*both) for name, both in measured.items()}
        return fit(metric, list(answers.values())), cross_fitted(metric, answers)
    return final, {n: final.score(score.raw or {}) for n, (_, score) in measured.items()}


def _measured(record: ResponseRecord, score: Score) -> Measured:
    if "sign" not in record.condition:
        raise JudgeError("Only the answers of an extraction calibrate the contrast judge.")
    return Measured(
        question=record.question_id,
        sign="pos" if record.condition["sign"] == "pos" else "neg",
        raw=score.raw or {},
    )
