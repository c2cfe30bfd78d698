"""``pvec judge``: score the answers of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.cli.render import render_filter, render_judge, render_means, render_next

if TYPE_CHECKING:
    from pvec.extraction.judge import JudgeResult

app = new_app()

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command()
@options("judge", "filter")
def judge(ctx: typer.Context, run: RunFolder) -> None:
    """Score the answers of a run, or score them again with another judge.

    Answers that this judge has scored already are not asked again; other judges' scores stay.
    """
    from pvec.extraction import judge as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    console.emit(console.call(partial(workflow.run, settings, run)), _render)


def _render(console: Console, result: JudgeResult) -> None:
    render_judge(console, result.report)
    render_means(console, result.means)
    if result.filtered:
        render_filter(console, result.filtered)
    render_next(console, result.next)
