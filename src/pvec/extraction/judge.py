"""``pvec judge``: score the answers of a run, now or again with another judge.

Also what extracting and judging say of judged answers: mean scores and the exported tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pvec.backends.session import Notify, ignore
from pvec.data.judged_csv import JudgedAnswer, write_judged_csv
from pvec.errors import StoreError
from pvec.judges.prompts import COHERENCE, metrics_of
from pvec.judges.scoring import JudgeReport, ResponseScorer, judged_answer, score_of
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.settings.tree import FilterSettings
from pvec.stats import Interval, bootstrap_mean
from pvec.types import SIGNS, Progress, Score, Sign
from pvec.vectors.filter import FilterResult, Reason, ScoredResponse, filter_responses

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
class JudgeResult:
    """What judging a run gave: means by metric with what is missing, and for an extraction which
    answers would count towards a vector.
    """

    run: Path
    kind: str
    answers: int
    report: JudgeReport
    means: tuple[MetricMean, ...]
    filtered: Mapping[Sign, Mapping[Reason, int]] = field(default_factory=dict)
    next: tuple[str, ...] = ()


def run(
    settings: Settings,
    path: Path,
    *,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> JudgeResult:
    """Score every answer of the run in ``path`` that this judge has not scored yet.

    Every trait that the run keeps and coherence are scored. Scores of other judges stay. Raises
    ``StoreError`` for a folder that is no run or has no answers, ``JudgeError`` as judging does.
    """
    seen = Run.read(path)
    traits = seen.traits()
    bundled = seen.manifest.get("model", {}).get("bundled", False)
    with ResponseScorer(settings, bundled=bundled, notify=notify) as scorer:
        scorer.check()
        with Run.reopen(path) as store, store.session():
            for note in store.notes:
                notify(note)
            records = list(store.responses())
            if not records:
                raise StoreError(f"{path} has no answers yet: run the command that made it again.")
            report = scorer.score(store, records, metrics_of(*traits), on_progress=on_progress)
            scores = store.scores_by_response(judge=report.judge)
            filtered: Mapping[Sign, Mapping[Reason, int]] = {}
            if store.kind == "extract":
                export_signs(store, traits[0].name, records, scores)
                filtered = filter_records(records, scores, traits[0].name, settings.filter).counts
    metrics = [*(trait.name for trait in traits), COHERENCE]
    following = "vector compute" if seen.kind == "extract" else "report"
    return JudgeResult(
        run=path,
        kind=seen.kind,
        answers=len(records),
        report=report,
        means=tuple(metric_means(records, scores, metrics)),
        filtered=filtered,
        next=(f"pvec {following} {path}",),
    )


def sign_of(record: ResponseRecord) -> Sign:
    """Return under which sign an extraction's answer was given."""
    return "pos" if record.condition["sign"] == "pos" else "neg"


def filter_records(
    records: Iterable[ResponseRecord], scores: Scores, trait: str, settings: FilterSettings
) -> FilterResult:
    """Decide which of an extraction's answers count, by the thresholds of the settings."""
    return filter_responses(
        [
            ScoredResponse(
                id=record.id,
                sign=sign_of(record),
                trait=score_of(scores.get(record.id, {}), trait),
                coherence=score_of(scores.get(record.id, {}), COHERENCE),
                pair=(
                    record.question_id,
                    record.condition["instruction"],
                    record.condition["rollout"],
                ),
            )
            for record in records
        ],
        threshold=settings.threshold,
        coherence=settings.coherence,
        paired=settings.paired,
    )


def metric_means(
    records: Sequence[ResponseRecord], scores: Scores, metrics: Sequence[str], *, group: str = ""
) -> Iterator[MetricMean]:
    """Yield the mean of each metric over ``records``, missing scores counted."""
    questions = [record.question_id for record in records]
    for metric in metrics:
        values = [score_of(scores.get(record.id, {}), metric) for record in records]
        yield MetricMean(group=group, metric=metric, score=bootstrap_mean(values, groups=questions))


def means_by_sign(
    records: Iterable[ResponseRecord], scores: Scores, metrics: Sequence[str]
) -> Iterator[MetricMean]:
    """Yield the mean of each metric over the positive answers, then over the negative ones."""
    by_sign: dict[Sign, list[ResponseRecord]] = {sign: [] for sign in SIGNS}
    for record in records:
        by_sign[sign_of(record)].append(record)
    for sign, answers in by_sign.items():
        yield from metric_means(answers, scores, metrics, group=sign)


def export_signs(
    store: Run, trait: str, records: Iterable[ResponseRecord], scores: Scores
) -> list[Path]:
    """Write ``TRAIT_pos.csv`` and ``TRAIT_neg.csv`` in the reference's columns."""
    rows: dict[Sign, list[JudgedAnswer]] = {sign: [] for sign in SIGNS}
    for record in records:
        rows[sign_of(record)].append(judged_answer(record, scores.get(record.id, {}), trait))
    paths = {sign: store.csv_path(f"{trait}_{sign}") for sign in SIGNS}
    for sign, answers in rows.items():
        write_judged_csv(paths[sign], answers, trait=trait)
    return list(paths.values())
