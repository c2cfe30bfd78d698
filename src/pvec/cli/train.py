"""``pvec train``: finetune a model, optionally with steering, logging the persona shift."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.cli.progress import duration
from pvec.cli.render import render_next

if TYPE_CHECKING:
    from pvec.training.plan import TrainPlan
    from pvec.training.train import TrainResult

app = new_app()

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A training configuration, YAML or JSON.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one field, such as lora.r=16; repeatable."
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="Validate everything and print the plan; train nothing.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder (default: runs/train-CONFIG)."),
]


@app.command()
@options("paths")
def train(
    ctx: typer.Context,
    file: ConfigFile,
    set_: Set = None,
    check: Check = False,
    out: Out = None,
) -> None:
    """Finetune with LoRA, optionally steered, logging the persona shift.

    Steering is verified before the first step. Running the command again resumes from the last
    checkpoint. Several processes: `accelerate launch --multi_gpu --num_processes N -m pvec train
    CONFIG` (docs/training.md).
    `examples/configs` has a commented configuration for each use.
    """
    from pvec.backends.processes import Processes
    from pvec.training import train as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    main = Processes.launched().main
    if not main:
        console.quiet = True
    arguments: dict[str, Any] = {"overrides": set_ or (), "out": out, "runs": settings.paths.runs}
    if check:
        plan = console.call(partial(workflow.check, file, **arguments))
        if main:
            console.emit(plan.summary(), lambda console, _: _render_plan(console, plan))
    else:
        result = console.call(partial(workflow.run, file, **arguments))
        if main:
            console.emit(result, _render)


def _render_plan(console: Console, plan: TrainPlan) -> None:
    train, batches, adapter = plan.data.train, plan.batches, plan.adapter
    passes = "1 pass" if batches.passes == 1 else f"{batches.passes} passes"
    processes = "1 process" if batches.processes == 1 else f"{batches.processes} processes"
    steering = [scheduled.description for scheduled in plan.steering]
    rows = [
        (
            "model",
            f"{plan.metadata.id}, {adapter.model_parameters:,} parameters, "
            f"{plan.dtype_name} on {plan.device}",
        ),
        (
            "adapter",
            f"{adapter.parameters:,} parameters "
            f"({adapter.parameters / adapter.model_parameters:.1%}) in "
            f"{sum(adapter.adapted.values()):,} modules",
        ),
        ("adapted", _counts(adapter.adapted)),
        ("frozen", _counts(adapter.frozen)),
        (
            "data",
            f"{len(train.rows):,} rows, {train.tokens:,} tokens ({train.loss_tokens:,} with loss), "
            f"longest {max(train.lengths):,}; {len(plan.data.held_out.rows):,} rows held out",
        ),
        (
            "steps",
            f"{plan.steps:,} ({batches.steps_per_epoch:,} per epoch) of {batches.size} rows in "
            f"{passes} of up to {batches.most_tokens:,} tokens on {processes}, "
            f"{batches.padding:.0%} padding",
        ),
        ("memory", f"about {_bytes(adapter.memory_bytes)} per process"),
        *(("steering", line) for line in steering or ["none"]),
        *(("note", line) for line in plan.notes),
        ("folder", str(plan.folder)),
    ]
    console.print(table(("plan", ""), rows))


def _render(console: Console, result: TrainResult) -> None:
    rows = [
        ("steps", f"{result.steps:,}{' (stopped by the alarm)' if result.stopped_early else ''}"),
        ("loss", f"{result.first_loss:.3f} at first, {result.last_loss:.3f} at the end"),
    ]
    if result.held_out_loss is not None:
        rows.append(("held-out loss", f"{result.held_out_loss:.3f}"))
    rows += [
        ("steered", f"{what}: {touched:,} positions touched")
        for what, touched in zip(result.steering, result.touched, strict=True)
    ]
    rows += [("persona shift", f"{name}: {shift:+.3f}") for name, shift in result.shifts.items()]
    if result.hooks_on is not None:
        rows.append(("measured while steered", str(result.hooks_on)))
    rows.append(("time", f"{duration(result.seconds)}, {result.tokens_per_second:,.0f} tokens/s"))
    rows.append(("adapter", str(result.adapter)))
    if result.merged is not None:
        rows.append(("merged model", str(result.merged)))
    console.print(table(("training", ""), rows))
    render_next(console, result.next)


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(kind if count == 1 else f"{kind} x {count}" for kind, count in kinds.items())


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
