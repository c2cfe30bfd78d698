"""``pvec monitor``: prompts against the trait scores of their answers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import (
    READING,
    DryRun,
    File,
    RunOut,
    SkipBad,
    Traits,
    Vectors,
    console_from,
    new_app,
    options,
    settings_from,
)
from pvec.cli.render import r_interval, render_judge, render_next, render_plan
from pvec.types import OutputOptions

if TYPE_CHECKING:
    from pvec.projection.monitor import MonitorResult

app = new_app()

Score = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="COLUMN",
        help="Column with trait scores: nothing is generated or judged.",
    ),
]
Condition = Annotated[
    str,
    typer.Option(
        "--condition",
        metavar="COLUMN",
        help="Column of the prompts' conditions (else: their system prompts).",
    ),
]


@app.command()
@options(
    "model.id", "model.adapter", "project.layers", "project.rollouts",
    further=("model", "backend", "pool", "generation", "judge", "project.judge", "project.kind",
             "project.same_model",
             *READING, "project.chunk_rows", "paths"),
)  # fmt: skip
def monitor(
    ctx: typer.Context,
    *,
    file: File,
    vector: Vectors,
    trait: Traits = None,
    score: Score = None,
    condition: Condition = "condition",
    out: RunOut = None,
    skip_bad: SkipBad = False,
    dry_run: DryRun = False,
) -> None:
    """Predict from prompts how much of a trait their answers will show.

    Correlates the projection at the last prompt token with the trait scores of the answers: of a
    judged run, of a column, or of answers generated and judged now (--judge-model, --no-judge).
    Further options: docs/cli.md.
    """
    from pvec.projection import monitor as workflow

    output = OutputOptions(out=out, skip_bad=skip_bad)
    settings, console = settings_from(ctx), console_from(ctx)
    arguments: dict[str, Any] = {
        "traits": trait or (), "score": score, "condition": condition, "output": output,
    }  # fmt: skip
    if dry_run:
        plan = workflow.plan(settings, file, vector, notify=console.note, **arguments)
        console.emit(plan, render_plan)
    else:
        work = partial(workflow.run, settings, file, vector, **arguments)
        console.emit(console.call(work), _render)


def _render(console: Console, result: MonitorResult) -> None:
    """Show how well each vector predicts the scores."""
    console.print(
        f"{result.prompts:,} prompts under {result.conditions:,} conditions on {result.model} "
        f"({result.generated:,} answers generated)",
    )
    if result.judge is not None:
        render_judge(console, result.judge)
    named = any(column.metric != column.vector for column in result.columns)
    rows = [
        (
            f"{column.vector} @ {column.layer}{' *' if column.suggested else ''}",
            *((column.metric,) if named else ()),
            r_interval(column.overall),
            r_interval(column.within),
            r_interval(column.same_question),
        )
        for column in result.columns
    ]
    columns = ("vector", *(("score",) if named else ()), "r overall [95 %]")
    console.print(table((*columns, "within a condition", "within a question"), rows))
    if any(column.suggested for column in result.columns):
        console.print("* the layer that the vector suggests for prompts, whatever the scores say")
    render_next(console, result.next, model=result.model)
