"""``pvec extract``: a trait's persona vector from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console
from pvec.cli.grid import Grid, run_on_grid
from pvec.cli.options import DryRun, console_from, new_app, options, settings_from
from pvec.cli.render import (
    TINY_NOTE,
    render_filter,
    render_judge,
    render_layers,
    render_means,
    render_next,
    render_plan,
)

if TYPE_CHECKING:
    from pvec.extraction.extract import ExtractPlan, ExtractResult

app = new_app()

Traits = Annotated[
    list[str] | None,
    typer.Option(
        "--trait", "-t", metavar="NAME|FILE", help="A bundled trait or a .json file; repeatable."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder (default: runs/TRAIT-MODEL)."),
]


@app.command()
@options(
    "model", "backend", "pool.workers", "generation", "judge", "filter", "extract", "paths",
    further=("pool",),
)  # fmt: skip
def extract(
    ctx: typer.Context,
    trait: Traits = None,
    out: Out = None,
    grid: Grid = None,
    dry_run: DryRun = False,
) -> None:
    """Make the persona vector of one or more traits.

    Generates answers under opposite system prompts, judges them, keeps those that show the trait
    (or do not), and takes the difference of their mean activations. Run it again and it finishes
    what is missing. A grid file runs many models, traits and seeds.
    """
    if grid is not None:
        run_on_grid(ctx, "extract", grid, out=out, dry_run=dry_run, refused={"--trait": trait})
        return
    from pvec.extraction import extract as workflow

    settings, console, traits = settings_from(ctx), console_from(ctx), trait or ()
    if dry_run:
        plans = workflow.plan(settings, traits, out=out, notify=console.note)
        console.emit(plans, _render_plans)
    else:
        console.emit(console.call(partial(workflow.run, settings, traits, out=out)), _render)


def _render_plans(console: Console, plans: Sequence[ExtractPlan]) -> None:
    for plan in plans:
        render_plan(console, plan, head=f"{plan.trait}: ")


def _render(console: Console, results: Sequence[ExtractResult]) -> None:
    for result in results:
        console.print(
            f"{result.trait} in {result.model}: {result.answers:,} answers "
            f"({result.generated:,} new, {result.cut:,} truncated at the token limit)"
        )
        if result.judge is not None:
            render_judge(console, result.judge)
        if result.vector is not None:
            render_means(console, result.vector.scores)
            render_filter(console, result.vector.filtered)
            render_layers(console, result.vector.summary)
            console.print(f"vector: {result.vector.path}")
        render_next(console, result.next)
    if any(result.model == "tiny" for result in results):
        console.note(TINY_NOTE)
