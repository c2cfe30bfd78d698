"""What ``extract``, ``steer-eval`` and ``shift`` do with a grid file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, resolved_from
from pvec.cli.progress import duration
from pvec.cli.render import render_next
from pvec.errors import InputError

if TYPE_CHECKING:
    from pvec.grid.run import GridPlan, GridResult

Grid = Annotated[
    Path | None,
    typer.Option(
        "--grid",
        metavar="FILE",
        help="Run every model, trait and seed of this YAML file, into runs/NAME (docs/grid.md).",
    ),
]

_OF_THE_FILE = {
    "model.id": "--model",
    "model.adapter": "--adapter",
    "model.gguf_file": "--gguf-file",
    "model.revision": "--revision",
    "model.chat_template": "--chat-template",
    "generation.seed": "--seed",
}
"""Settings that the file decides for every cell."""


def run_on_grid(
    ctx: typer.Context,
    command: str,
    grid: Path,
    *,
    out: Path | None,
    dry_run: bool = False,
    refused: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Run a command on a grid file and show its cells.

    ``refused`` has the values of options that the file stands for, by their flag; ``arguments`` go
    to every cell. Raises ``InputError`` for such an option, and ``PvecError`` when a cell failed.
    """
    from pvec.grid import run as workflow

    resolved, console = resolved_from(ctx), console_from(ctx)
    given = [flag for flag, value in refused.items() if value]
    given += [
        flag for path, flag in _OF_THE_FILE.items() if resolved.origins[path] == "command line"
    ]
    if given:
        raise InputError(f"{given[0]} has no effect with --grid, whose file says it: omit one.")
    if dry_run:
        plan = workflow.plan(
            resolved.settings, grid, command, arguments=arguments, out=out, notify=console.note
        )
        console.emit(plan, _render_plan)
        return
    result = console.call(
        partial(workflow.run, resolved.settings, grid, command, arguments=arguments, out=out)
    )
    console.emit(result, _render)
    result.require_all()


def _render_plan(console: Console, plan: GridPlan) -> None:
    rows = []
    for planned in plan.cells:
        cell, lacks = planned.cell, planned.plan
        state = planned.problem or cell.state
        counts = (lacks.missing, lacks.judge_calls, lacks.dollars) if lacks else (None,) * 3
        time = None if planned.seconds is None else duration(planned.seconds)
        rows.append((cell.model, cell.trait, str(cell.seed), *counts, time, state))
    columns = ("model", "trait", "seed", "answers", "judge calls", "$", "time", "state")
    console.print(table(columns, rows))
    cost = "cost unknown" if plan.dollars is None else f"about ${plan.dollars:.2f}"
    console.print(
        f"{len(plan.cells)} cells into {plan.folder}: {plan.missing:,} of {plan.answers:,} answers "
        f"to generate (at most {plan.most_tokens:,} tokens), {plan.judge_calls:,} judge calls, "
        f"{cost}"
        + (
            f", about {duration(plan.seconds)} if all answers run to their limit"
            if plan.seconds
            else ""
        )
    )


def _render(console: Console, result: GridResult) -> None:
    rows = [(cell.model, cell.trait, str(cell.seed), cell.run, cell.state) for cell in result.cells]
    console.print(table(("model", "trait", "seed", "run", "state"), rows))
    done = sum(cell.state == "done" for cell in result.cells)
    console.print(
        f"{done} of {len(result.cells)} cells of {result.command} are done ({result.ran} ran now) "
        f"in {result.folder}"
    )
    for cell in result.failed:
        console.sentence(f"failed: {cell.label}: {cell.reason}")
    render_next(console, result.next)
