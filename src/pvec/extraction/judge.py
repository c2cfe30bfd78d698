"""``pvec judge``: score the answers of a run, now or again with another judge.

Also what extracting and judging say of judged answers: mean scores and the exported tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pvec.backends.session import Notify, ignore
from pvec.errors import StoreError
from pvec.judges.prompts import COHERENCE, metrics_of
from pvec.judges.scoring import JudgeReport, ResponseScorer, export_answers, score_of
from pvec.runs.manifest import FILE_NAME
from pvec.runs.responses import Json, ResponseRecord
from pvec.runs.store import Run
from pvec.runs.summary import update_summary
from pvec.settings import Settings
from pvec.settings.commands import FilterSettings
from pvec.settings.sections import ModelSettings
from pvec.stats import SCORES, Interval, grouped_mean
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
    """What judging a run gave: means by metric with what is missing; for an extraction by sign,
    and which answers would count towards a vector.
    """

    run: Path
    kind: str
    answers: int
    report: JudgeReport
    means: tuple[MetricMean, ...]
    filtered: Mapping[Sign, Mapping[Reason, int]] = field(default_factory=dict)
    next: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JudgedExtraction:
    """What a judge's scores say of an extraction: which answers count, and means by sign."""

    filtered: FilterResult
    means: tuple[MetricMean, ...]


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
    source = Run.read(path)
    traits = source.traits()
    settings = _with_model(settings, source)
    with ResponseScorer(
        settings,
        bundled=source.manifest.get("model", {}).get("bundled", False),
        studied=settings.model.id,
        notify=notify,
    ) as scorer:
        scorer.check(
            metrics_of(*traits), extraction=source.kind == "extract", manifest=source.manifest
        )
        with Run.reopen(path) as store, store.session():
            for note in store.notes:
                notify(note)
            records = list(store.responses())
            if not records:
                raise StoreError(f"{path} has no answers yet: run the command that made it again.")
            report = scorer.score(store, records, metrics_of(*traits), on_progress=on_progress)
            scores = store.scores_by_response(judge=report.judge)
            names = [*(trait.name for trait in traits), COHERENCE]
            means = tuple(metric_means(records, scores, names))
            filtered: Mapping[Sign, Mapping[Reason, int]] = {}
            if store.kind == "extract":
                # An average over answers that were asked for opposite things would mean nothing.
                outcome = conclude(
                    store, traits[0].name, records, judge=report.judge, settings=settings.filter
                )
                means, filtered = outcome.means, outcome.filtered.counts
    following = "vector compute" if source.kind == "extract" else "report"
    return JudgeResult(
        run=path,
        kind=source.kind,
        answers=len(records),
        report=report,
        means=means,
        filtered=filtered,
        next=(f"pvec {following} {path}",),
    )


def _with_model(settings: Settings, run: Run) -> Settings:
    """Return ``settings`` with the model of the run, which may be the judge, on this device."""
    recorded = dict(run.manifest.get("settings", {}).get("model", {}))
    recorded.setdefault("id", run.manifest.get("model", {}).get("id", settings.model.id))
    recorded["device"] = settings.model.device
    known = {k: v for k, v in recorded.items() if k in ModelSettings.model_fields}
    try:
        model = ModelSettings.model_validate(known)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StoreError(
            f"{run.path / FILE_NAME} is damaged (at settings.model.{field}): restore it from a "
            f"copy."
        ) from None
    return settings.model_copy(update={"model": model})


def conclude(
    store: Run,
    trait: str,
    records: Sequence[ResponseRecord],
    *,
    judge: str,
    settings: FilterSettings,
) -> JudgedExtraction:
    """Decide which answers of a judged extraction count, and keep that in the run.

    The counts and the means by sign go into ``summary.json`` under the judge's name, the answers
    with their scores into ``TRAIT_pos.csv`` and ``TRAIT_neg.csv`` (the reference's columns).
    """
    scores = store.scores_by_response(judge=judge)
    means: list[MetricMean] = []
    for sign in SIGNS:
        answers = answers_of(records, sign)
        means += metric_means(answers, scores, [trait, COHERENCE], group=sign)
        export_answers(store, f"{trait}_{sign}", answers, trait=trait, scores=scores)
    outcome = JudgedExtraction(
        filtered=filter_answers(records, scores, trait, settings), means=tuple(means)
    )
    judged = {
        "filter": settings.model_dump(mode="json"),
        "filtered": outcome.filtered.counts,
        "means": [asdict(mean) for mean in outcome.means],
    }
    update_summary(store.path, judged={judge: judged})
    return outcome


def answers_of(records: Iterable[ResponseRecord], sign: Sign) -> list[ResponseRecord]:
    """Return the answers of an extraction that were given under a sign."""
    return [record for record in records if sign_of(record) == sign]


def sign_of(record: ResponseRecord) -> Sign:
    """Return under which sign an extraction's answer was given."""
    return "pos" if record.condition["sign"] == "pos" else "neg"


def pair_of(record: ResponseRecord) -> tuple[str, Json, Json]:
    """Return what an extraction's answer and its opposite number have in common."""
    return record.question_id, record.condition["instruction"], record.condition["rollout"]


def filter_answers(
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
                pair=pair_of(record),
            )
            for record in records
        ],
        **settings.model_dump(),
    )


def metric_means(
    records: Sequence[ResponseRecord], scores: Scores, metrics: Sequence[str], *, group: str = ""
) -> Iterator[MetricMean]:
    """Yield the mean of each metric over ``records``, missing scores counted."""
    questions = [record.question_id for record in records]
    for metric in metrics:
        values = [score_of(scores.get(record.id, {}), metric) for record in records]
        yield MetricMean(
            group=group, metric=metric, score=grouped_mean(values, groups=questions, limits=SCORES)
        )
