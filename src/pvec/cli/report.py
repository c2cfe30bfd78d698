"""``pvec report``: a self-contained page about one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console
from pvec.cli.options import console_from, new_app, options

if TYPE_CHECKING:
    from pvec.report.report import ReportResult

app = new_app()

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Run folders, grid folders, or logs of `pvec serve`."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="The page (default: report.html in the run's folder)."
    ),
]
Svg = Annotated[bool, typer.Option("--svg", help="Write every figure as SVG beside the page.")]
Png = Annotated[bool, typer.Option("--png", help="Write every figure as PNG beside the page.")]
JudgeName = Annotated[
    str | None,
    typer.Option("--judge", metavar="NAME", help="Whose scores count, if several judges scored."),
]
Beside = Annotated[
    bool,
    typer.Option(
        "--beside", help="Put tokens into files beside the page, so that all answers open."
    ),
]


@app.command()
@options()
def report(
    ctx: typer.Context,
    runs: Runs,
    out: Out = None,
    svg: Svg = False,
    png: Png = False,
    judge: JudgeName = None,
    beside: Beside = False,
) -> None:
    """Write a self-contained HTML report of one or more runs.

    The page needs no network. The numbers behind every figure are written beside it as CSV.
    A folder of `pvec project --tokens` is shown token by token.
    """
    from pvec.report import report as workflow

    formats = [name for name, requested in (("svg", svg), ("png", png)) if requested]
    result = workflow.run(runs, out=out, formats=formats, judge=judge, beside=beside)
    console_from(ctx).emit(result, _render)


def _render(console: Console, result: ReportResult) -> None:
    for finding in result.findings:
        console.print(finding)
    console.print(f"page:    {result.page}")
    if result.files:
        folder = result.files[0].parent
        console.print(f"figures: {len(result.files)} files in {folder}")
    if result.parts:
        folder = result.parts[0].parent
        console.print(f"tokens:  {len(result.parts)} files in {folder}")
