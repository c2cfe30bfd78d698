"""``pvec shift``: how far finetuning moved models along vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.grid import Grid, run_on_grid
from pvec.cli.options import (
    READING,
    RunOut,
    SkipBad,
    Traits,
    console_from,
    new_app,
    options,
    settings_from,
)
from pvec.cli.render import intervals, r_interval, render_next
from pvec.errors import InputError
from pvec.runs.names import model_label
from pvec.types import OutputOptions

if TYPE_CHECKING:
    from pvec.projection.shift import ShiftResult

app = new_app()

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="BASE FINETUNED...", help="The base model, then its finetunes or their adapters."
    ),
]
ShiftVectors = Annotated[
    list[str] | None,
    typer.Option("--vector", metavar="FILE", help="Vector file or run; repeatable."),
]
Questions = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        help="Measure on the prompts of this file, not on a trait's evaluation questions.",
    ),
]


@app.command()
@options(
    "project.layers", "pool.workers",
    further=("model.dtype", "model.device", "model.device_map", "model.revision",
             "model.chat_template", "model.allow_pickle", "model.trust_remote_code",
             "backend.token_budget", "pool", "project.kind", "project.same_model",
             *READING, "paths"),
)  # fmt: skip
def shift(
    ctx: typer.Context,
    *,
    models: Models = None,
    vector: ShiftVectors = None,
    trait: Traits = None,
    questions: Questions = None,
    out: RunOut = None,
    grid: Grid = None,
    skip_bad: SkipBad = False,
) -> None:
    """Measure how far finetuning moved models along vectors.

    The shift is the mean over prompts of the last prompt token's activation, finetuned minus base,
    projected on the vector. With a grid file the models are those with `checkpoints:` and the
    vectors those that `pvec extract` made with it. Further options: docs/cli.md.
    """
    if grid is not None:
        refused = {"BASE FINETUNED...": models, "--vector": vector, "--trait": trait}
        arguments = {"questions": questions, "skip_bad": skip_bad}
        run_on_grid(ctx, "shift", grid, out=out, refused=refused, arguments=arguments)
        return
    if not vector:
        raise InputError("No vector was named: give --vector FILE, a vector file or a run.")
    from pvec.projection import shift as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    result = console.call(
        partial(
            workflow.run,
            settings,
            models or (),
            vector,
            traits=trait or (),
            questions=questions,
            output=OutputOptions(out=out, skip_bad=skip_bad),
        )
    )
    console.emit(result, _render)


def _render(console: Console, result: ShiftResult) -> None:
    """Show shifts by checkpoint, and how they go with trait scores."""
    from pvec.stats import FEW_PAIRS

    console.print(f"shift from {result.base} over {result.prompts:,} prompts")
    labels = {name: model_label(name) for name in result.checkpoints}
    if len(set(labels.values())) < len(labels):
        labels = {name: name for name in labels}
    rows = [
        (
            labels[item.checkpoint],
            f"{item.vector} @ {item.layer}",
            shift,
            score,
        )
        for item, shift, score in zip(
            result.shifts,
            intervals([item.shift for item in result.shifts]),
            intervals([item.score_interval for item in result.shifts]),
            strict=True,
        )
    ]
    console.print(table(("checkpoint", "vector", "shift [95 %]", "trait score [95 %]"), rows))
    for trend in result.trends:
        console.sentence(
            f"{trend.vector} @ {trend.layer}: shift and trait score correlate at "
            f"r {r_interval(trend.pearson)}, by rank {r_interval(trend.spearman)} "
            f"({trend.pearson.n} models)"
            if trend.pearson.n >= FEW_PAIRS
            else f"{trend.vector} @ {trend.layer}: {trend.pearson.n} models are too few to state "
            f"how shift and trait score correlate (from {FEW_PAIRS} on)",
        )
    render_next(console, result.next, model=result.base)
