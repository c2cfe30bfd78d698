"""``pvec judge --compare``: how far two judges, or a judge and people, agree on a run's answers.

A judge is a name in a run's scores, or a person: a column of labels in a table. Agreement is
Cohen's kappa, the share of equal verdicts, and the rank correlation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pvec.backends.session import Notify, ignore
from pvec.data.table import Row
from pvec.data.tables import open_table
from pvec.errors import InputError
from pvec.extraction import judge as judging
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import JudgeReport
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.stats import Correlation, correlation
from pvec.types import Progress

LABEL = "label"
"""A table's column of labels, besides one that is called as the trait."""

_WORDS = {"yes": 100.0, "true": 100.0, "no": 0.0, "false": 0.0}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two judges said of the ``n`` answers that both scored on one metric.

    A score of ``threshold`` or more is *high*. ``both``, ``only_first``, ``only_second`` and
    ``neither`` count the answers that each found high. ``kappa`` is Cohen's: 0 is the agreement of
    chance, 1 perfect; NaN where either judge found all answers alike.
    """

    metric: str
    first: str
    second: str
    threshold: float
    n: int
    both: int
    only_first: int
    only_second: int
    neither: int
    agreement: float
    kappa: float
    spearman: Correlation


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


def agree(
    metric: str,
    scores: Sequence[tuple[float, float]],
    *,
    judges: tuple[str, str],
    threshold: float,
) -> Agreement:
    """Compare two judges' scores (0 to 100) of the same answers, pair by pair."""
    high = [(first >= threshold, second >= threshold) for first, second in scores]
    both, only_first = high.count((True, True)), high.count((True, False))
    only_second, neither = high.count((False, True)), high.count((False, False))
    return Agreement(
        metric=metric,
        first=judges[0],
        second=judges[1],
        threshold=threshold,
        n=len(scores),
        both=both,
        only_first=only_first,
        only_second=only_second,
        neither=neither,
        agreement=(both + neither) / len(scores) if scores else float("nan"),
        kappa=cohen_kappa(both, only_first, only_second, neither),
        spearman=correlation([a for a, _ in scores], [b for _, b in scores], method="spearman"),
    )


def cohen_kappa(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Return Cohen's kappa of a table of two judges who say yes or no (Cohen 1960).

    >>> round(cohen_kappa(20, 5, 10, 15), 3)
    0.4
    """
    n = both + only_first + only_second + neither
    if not n:
        return float("nan")
    yes = (both + only_first) * (both + only_second)
    no = (neither + only_first) * (neither + only_second)
    expected = (yes + no) / n**2
    return ((both + neither) / n - expected) / (1 - expected) if expected < 1 else float("nan")


def read_labels(
    path: Path, records: Sequence[ResponseRecord], *, trait: str
) -> tuple[dict[str, dict[str, float]], int]:
    """Return ``{metric: {response id: score}}`` from a table of labels, and the rows left over.

    Labels stand in a column called as the trait, or ``label``, and in ``coherence`` if it is there;
    empty cells are left out. They are scores from 0 to 100, or 0 and 1, or yes and no. A row is an
    answer of the run by its ``id``, else by its ``question`` and ``answer``. Raises ``InputError``
    for a missing column, a label that is none, and a table in which no row is an answer of the run.
    """
    table = open_table(path)
    column = trait if trait in table.columns else LABEL
    keys = {"id"} if "id" in table.columns else {"question", "answer"}
    missing = {column, *keys} - set(table.columns)
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(sorted(missing))}: labels need a column {trait!r} or "
            f"{LABEL!r}, and `id`, or `question` and `answer`, to say which answer they are of."
        )
    known = {(record.question, record.answer): record.id for record in records}
    identities = {record.id for record in records}
    columns = {trait: column, COHERENCE: COHERENCE}
    found: dict[str, dict[str, float]] = {}
    unknown = 0
    for row in table.rows():
        name = row.values.get("id")
        if name is None:
            name = known.get((row.values["question"], row.values["answer"]))
        if name not in identities:
            unknown += 1
            continue
        for metric, cells in columns.items():
            value = _label(row, cells, path) if cells in table.columns else None
            if value is not None:
                found.setdefault(metric, {})[str(name)] = value
    if not found:
        raise InputError(
            f"No row of {path} with a label is an answer of this run: give its `id`, or its "
            f"`question` and `answer` as the run's CSV files have them."
        )
    return {metric: _to_scale(labels) for metric, labels in found.items()}, unknown


def _label(row: Row, column: str, path: Path) -> float | None:
    cell = row.values.get(column)
    text = "" if cell is None else str(cell).strip().lower()
    if not text:
        return None
    try:
        value = _WORDS[text] if text in _WORDS else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise InputError(
            f"{path}:{row.line} has {cell!r} as its {column!r}: write a number from 0 to 100, or "
            f"yes or no."
        )
    return value


def _to_scale(labels: Mapping[str, float]) -> dict[str, float]:
    """Return labels that are all 0 or 1 as 0 or 100."""
    factor = 100.0 if set(labels.values()) <= {0.0, 1.0} else 1.0
    return {name: factor * value for name, value in labels.items()}
