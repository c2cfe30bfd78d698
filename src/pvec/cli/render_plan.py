"""What ``--dry-run`` shows: how much is generated and judged, and what that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvec.cli.console import Console
from pvec.cli.progress import duration

if TYPE_CHECKING:
    from pvec.backends.resources import Resources
    from pvec.judges.plan import RunPlan


def render_plan(console: Console, plan: RunPlan, *, head: str = "") -> None:
    """Say what a command would generate and judge, and what that takes; ``head`` begins it."""
    console.print(
        f"{head}{plan.missing:,} of {plan.answers:,} answers to generate "
        f"(at most {plan.most_tokens:,} tokens) into {plan.run}"
    )
    console.print(f"  judge {plan.judge}: {plan.judging}")
    if plan.resources is not None:
        _render_resources(console, plan.resources)


def _render_resources(console: Console, needs: Resources) -> None:
    """Say how much memory and how many workers a command takes, and about how long."""
    each = " on each worker" if needs.workers else ""
    console.print(
        f"  memory: {_bytes(needs.memory_bytes)}{each}: {_bytes(needs.weight_bytes)} of weights "
        f"({needs.parameters / 1e6:,.0f} M parameters, {needs.dtype}), and {needs.rows:,} answers "
        f"at once"
    )
    free = _bytes(needs.free_bytes)
    if needs.gpus and not needs.times:
        console.print(f"  that does not fit: a worker needs {needs.gpus} GPUs (--worker-gpus)")
    elif needs.gpus is None:
        console.print(f"  that does not fit, on any number of GPUs of {free}")
    elif needs.gpus > 1:
        console.print(f"  one GPU is too small: {needs.gpus} of them have {free} together")
    elif needs.memory_bytes > needs.free_bytes:
        console.print(f"  that does not fit: {free} are free{each}")
    if not needs.times:
        return
    times = [
        duration(time.seconds)
        + (f" with {time.workers} worker{'s' * (time.workers > 1)}" if needs.workers else "")
        for time in needs.times
    ]
    console.sentence(
        f"  time: about {', '.join(times)} if all answers run to their limit ({needs.basis})"
    )


def _bytes(count: int) -> str:
    """Return a size in the units in which GPUs are sold."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"
