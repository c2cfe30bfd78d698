"""``pvec train``: finetune a model, steered if wanted, and watch its persona."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, duration, table
from pvec.cli.options import console_from, new_app, options, settings_from

if TYPE_CHECKING:
    from pvec.training.train import TrainPlan, TrainResult

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

    Steering proves itself before the first step, or nothing starts. Run it again and it goes on
    from the last checkpoint. Several processes: `accelerate launch -m pvec train CONFIG`.
    `examples/configs` has a commented configuration for each use.
    """
    from pvec.backends.processes import Processes
    from pvec.training import train as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    main = Processes.launched().main
    if not main:
        console.quiet = True
    overrides, runs = tuple(set_ or ()), settings.paths.runs
    with console.progress() as on_progress:
        if check:
            plan = workflow.check(
                file, overrides=overrides, out=out, runs=runs,
                notify=console.note, on_progress=on_progress,
            )  # fmt: skip
        else:
            result = workflow.run(
                file, overrides=overrides, out=out, runs=runs,
                notify=console.note, on_progress=on_progress,
            )  # fmt: skip
    if not main:
        return
    if check:
        console.emit(plan, lambda shown: _render_plan(shown, plan))
    else:
        console.emit(result, lambda shown: _render(shown, result))


def _render_plan(console: Console, plan: TrainPlan) -> None:
    share = plan.adapter_parameters / plan.parameters
    rows = [
        ("model", f"{plan.model}, {plan.parameters:,} parameters, {plan.dtype} on {plan.device}"),
        (
            "adapter",
            f"{plan.adapter_parameters:,} parameters ({share:.1%}) in "
            f"{plan.adapter_modules:,} modules",
        ),
        (
            "data",
            f"{plan.rows:,} rows, {plan.tokens:,} tokens ({plan.learnt_tokens:,} learnt), "
            f"longest {plan.longest:,}; {plan.held_out:,} rows held out",
        ),
        (
            "steps",
            f"{plan.steps:,} ({plan.steps_per_epoch:,} per epoch) of {plan.batch} rows in "
            f"{plan.passes} {'pass' if plan.passes == 1 else 'passes'} of up to "
            f"{plan.most_tokens:,} tokens on {plan.processes} "
            f"{'process' if plan.processes == 1 else 'processes'}, {plan.padding:.0%} padding",
        ),
        ("memory", f"about {_bytes(plan.memory_bytes)} per process"),
        *(("steering", line) for line in plan.steering or ("none",)),
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
    for position, command in enumerate(result.next):
        console.out.print(
            f"{'next' if position == 0 else 'then'}:   {command}", markup=False, soft_wrap=True
        )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
