"""``pvec judge``: score the answers of a run, now or again with another judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pvec.backends.session import Notify, ignore
from pvec.errors import StoreError
from pvec.extraction.vectors import MetricMean, export_signs, metric_means
from pvec.judges.judging import COHERENCE_METRIC, Metric
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import JudgeReport, ResponseScorer, filter_records
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import Progress, Sign
from pvec.vectors.filter import Reason


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
    metrics = [Metric(name=trait.name, prompt=trait.eval_prompt) for trait in traits]
    with ResponseScorer(settings, bundled=bundled, notify=notify) as scorer:
        scorer.check()
        with Run.reopen(path) as store, store.session():
            for note in store.notes:
                notify(note)
            records = list(store.responses())
            if not records:
                raise StoreError(f"{path} has no answers yet: run the command that made it again.")
            report = scorer.score(
                store, records, [*metrics, COHERENCE_METRIC], on_progress=on_progress
            )
            scores = store.scores_by_response(judge=report.judge)
            filtered: Mapping[Sign, Mapping[Reason, int]] = {}
            if store.kind == "extract":
                name = traits[0].name
                export_signs(store, name, records, scores)
                filtered = filter_records(records, scores, trait=name, settings=settings).counts
    names = [*(trait.name for trait in traits), COHERENCE]
    return JudgeResult(
        run=path,
        kind=seen.kind,
        answers=len(records),
        report=report,
        means=tuple(metric_means(records, scores, names)),
        filtered=filtered,
        next=_next(seen.kind, path),
    )


def _next(kind: str, path: Path) -> tuple[str, ...]:
    return (f"pvec vector compute {path}",) if kind == "extract" else (f"pvec report {path}",)
