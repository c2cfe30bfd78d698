"""``pvec judge``: score the answers of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.cli.render import render_filter, render_judge, render_means, render_next

if TYPE_CHECKING:
    from pvec.extraction.agreement import CompareResult
    from pvec.extraction.judge import JudgeResult

app = new_app()

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        metavar="JUDGE|FILE",
        help="Say how far the judge agrees with this one, which scored the run before, or with a "
        "table's column of labels. Twice: compare these two and score nothing.",
    ),
]


@app.command()
@options("judge", "filter", further=("pool",))
def judge(ctx: typer.Context, run: RunFolder, compare: Compare = None) -> None:
    """Score the answers of a run, or score them again with another judge.

    Answers that this judge has scored already are not asked again; other judges' scores stay.
    """
    from pvec.extraction import agreement
    from pvec.extraction import judge as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    if compare:
        compared = console.call(partial(agreement.compare, settings, run, compare))
        files = _write_figures(compared)
        console.emit(compared, partial(_render_comparison, files=files))
        return
    console.emit(console.call(partial(workflow.run, settings, run)), _render)


def _render(console: Console, result: JudgeResult) -> None:
    render_judge(console, result.report)
    render_means(console, result.means)
    if result.filtered:
        render_filter(console, result.filtered)
    render_next(console, result.next)


def _write_figures(result: CompareResult) -> list[Path]:
    """Write a confusion plot, and its numbers, for every metric into the run."""
    from pvec.report.confusion import confusion
    from pvec.report.figure import write_figures
    from pvec.report.sections.common import RunData
    from pvec.runs.store import Run

    source = RunData(run=Run.read(result.run), judge=None).source
    figures = [confusion(agreement, source=source) for agreement in result.agreements]
    return write_figures(figures, result.run / "figures", formats=("svg",))


def _render_comparison(console: Console, result: CompareResult, *, files: Sequence[Path]) -> None:
    if result.report is not None:
        render_judge(console, result.report)
    from pvec.stats import FEW_PAIRS

    console.print(f"first judge:  {result.first}")
    console.print(f"second judge: {result.second}")
    rows = [
        (
            found.metric,
            found.n,
            f"{found.agreement:.1%}",
            "–" if math.isnan(found.kappa) else f"{found.kappa:.2f}",
            f"{found.spearman.r:.2f}" if found.n >= FEW_PAIRS else "–",
            found.both,
            found.only_first,
            found.only_second,
            found.neither,
        )
        for found in result.agreements
    ]
    head = ("score", "n", "same side", "kappa", "rank r")
    console.print(
        table((*head, "both\nhigh", "only\nfirst", "only\nsecond", "neither\nhigh"), rows)
    )
    limits = {f"{found.threshold:g}" for found in result.agreements}
    console.print(f"high: {' or '.join(sorted(limits))} and more; rank r: Spearman's")
    console.print("kappa: Cohen's, 0 for the agreement of chance, 1 for perfect")
    for path in files:
        console.print(f"figure: {path}")
