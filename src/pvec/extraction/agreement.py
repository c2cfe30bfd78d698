"""``pvec judge --compare``: how far two judges, or a judge and people, agree on a run's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pvec.backends.session import Notify, ignore
from pvec.errors import InputError
from pvec.extraction import judge as judging
from pvec.judges.agreement import Agreement, agree, read_labels
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import JudgeReport
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import Progress


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """How far two judges agree, by metric. ``report`` is there when this call also scored."""

    run: Path
    first: str
    second: str
    agreements: tuple[Agreement, ...]
    report: JudgeReport | None = None


def compare(
    settings: Settings,
    path: Path,
    others: Sequence[str],
    *,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> CompareResult:
    """Compare the judge of the settings with another, or two others with each other.

    Each of ``others`` is the name of a judge that scored the run (its beginning will do), or a
    table with a column of labels. With one, the judge of the settings scores first what it has not
    scored yet; with two, nobody is asked. The threshold is that of the filter for the trait and for
    coherence. Raises ``InputError`` for a judge that is not there, or no answer that both scored.
    """
    if not 1 <= len(others) <= 2:
        raise InputError(f"--compare takes one judge or two, not {len(others)}.")
    report = None
    names = list(others)
    if len(names) == 1:
        report = judging.run(settings, path, notify=notify, on_progress=on_progress).report
        names.insert(0, report.judge)
    run = Run.read(path)
    records, trait = list(run.responses()), run.traits()[0].name
    first, second = (_scores(run, name, records, trait, notify) for name in names)
    thresholds = {COHERENCE: settings.filter.coherence}
    agreements = []
    for metric in first.scores:
        mine, theirs = first.scores[metric], second.scores.get(metric, {})
        pairs = [(mine[name], theirs[name]) for name in sorted(mine.keys() & theirs.keys())]
        if pairs:
            agreements.append(
                agree(
                    metric,
                    pairs,
                    judges=(first.name, second.name),
                    threshold=thresholds.get(metric, settings.filter.threshold),
                )
            )
    if not agreements:
        raise InputError(f"There is no answer that both {first.name} and {second.name} scored.")
    return CompareResult(
        run=path,
        first=first.name,
        second=second.name,
        agreements=tuple(agreements),
        report=report,
    )


@dataclass(frozen=True, kw_only=True)
class _Side:
    name: str
    scores: Mapping[str, Mapping[str, float]]


def _scores(
    run: Run, name: str, records: Sequence[ResponseRecord], trait: str, notify: Notify
) -> _Side:
    judges = [judge for judge in run.judges() if judge.startswith(name)]
    if not judges and Path(name).is_file():
        labels, unknown = read_labels(Path(name), records, trait=trait)
        if unknown:
            notify(f"{name}: {unknown} rows are no answers of {run.path} and are left out")
        return _Side(name=name, scores=labels)
    if len(judges) > 1 and name not in judges:
        raise InputError(
            f"{name!r} is the beginning of {len(judges)} judges ({', '.join(judges)}): write more "
            f"of the name."
        )
    judge = run.choose_judge(name if name in judges or not judges else judges[0])
    scores: dict[str, dict[str, float]] = {}
    for identity, row in run.scores_by_response(judge=judge).items():
        for metric, score in row.items():
            if score.score is not None:
                scores.setdefault(metric, {})[identity] = score.score
    return _Side(name=str(judge), scores=scores)
