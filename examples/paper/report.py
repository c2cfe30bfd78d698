"""The page: what was found, figure by figure, and every figure beside it as a file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pvec
from examples.paper import (
    finetuning_figures,
    monitoring_figures,
    prevention_figures,
    relation_figures,
    steering_figures,
)
from examples.paper.numbers import RULE
from examples.paper.replication import Replication, Results, join_words
from examples.paper.sizes import Size
from pvec.report.figure import Table, write_figures
from pvec.report.page import Chapter, Section, render_page

FIGURES = (
    steering_figures.extraction,
    steering_figures.sweep,
    monitoring_figures.monitoring,
    finetuning_figures.finetuning,
    prevention_figures.rescue,
    prevention_figures.prevention,
    monitoring_figures.screening,
    relation_figures.relations,
)


def write(results: Results, size: Size, out: Path) -> tuple[Path, list[Replication]]:
    """Write ``report.html`` and ``figures/`` (SVG, CSV), and return what is told."""
    told = [figure(results, size) for figure in FIGURES]
    for one in told:
        write_figures(one.section(size).exported, out / "figures", formats=("svg",))
    checks = checks_table(told)
    (out / "figures" / "checks.csv").write_text(checks.csv(), encoding="utf-8")
    page = render_page(
        title="Persona vectors in miniature",
        chapters=[
            Chapter(summary=summary(told, size), sections=(_overview(told, size),)),
            Chapter(summary="", sections=tuple(one.section(size) for one in told)),
        ],
        made=datetime.now(tz=UTC),
        version=pvec.__version__,
        footnote="Intervals are 95 % by Student's t over seeds.",
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path, told


def summary(told: Sequence[Replication], size: Size) -> str:
    """Return the page's first sentence."""
    words = {
        "agrees": "agreeing",
        "disagrees": "disagreeing",
        "cannot tell": "undecided",
        "same side": "on the paper's side",
        "other side": "partly on the other side",
    }
    parts = []
    for outcome, word in words.items():
        numbers = [str(one.number) for one in told if one.outcome == outcome]
        if numbers:
            parts.append(f"{word}: {join_words(numbers)}")
    return (
        f"Eight findings of the paper, replayed on pvec's bundled model of two million parameters "
        f"with {len(size.seeds)} seed{'s' * (len(size.seeds) > 1)}. "
        f"{'; '.join(parts).capitalize()}."
    )


def checks_table(told: Sequence[Replication]) -> Table:
    """Return every check with its numbers."""
    rows = []
    for one in told:
        for check in one.checks:
            found = check.interval
            numbers = (found.mean, found.low, found.high, found.n)
            rows.append((one.number, check.what, check.expected, *numbers, check.outcome))
    return Table(
        columns=("figure", "check", "expected", "mean", "low_95", "high_95", "seeds", "outcome"),
        rows=tuple(rows),
    )


def _overview(told: Sequence[Replication], size: Size) -> Section:
    rows = tuple(
        (
            one.outcome,
            f"{one.number}. {one.title}",
            sum(check.outcome in {"agrees", "same side"} for check in one.checks),
            len(one.checks),
        )
        for one in told
    )
    return Section(
        id="overview",
        title="Overview",
        summary=RULE,
        notes=(
            "The bundled model speaks a small grammar with a word list for each trait, and its "
            "judge knows nothing else. What happens here shows how the methods work, and whether "
            "they do; it is no evidence about real assistants.",
            f"Size {size.name}: seeds {join_words(list(map(str, size.seeds)))}; each repeats "
            "everything random from the vectors' answers to the order of the training rows.",
        ),
        tables=(
            (
                "Figures",
                Table(
                    columns=(
                        "outcome",
                        "figure",
                        "checks that agree or are on the same side",
                        "of",
                    ),
                    rows=rows,
                ),
            ),
        ),
    )
