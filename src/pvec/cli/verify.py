"""``pvec verify``: proof that steering works on this model and vector."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.errors import SteeringError

if TYPE_CHECKING:
    from pvec.evaluation.verify.verify import VerifyResult

app = new_app()

Vector = Annotated[
    Path | None,
    typer.Option(
        "--vector",
        metavar="FILE",
        help="A vector file or a run that has one (default: a random direction).",
    ),
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough", help="Try all five automatic layers, and each on every prompt of the batch."
    ),
]


@app.command()
@options(
    "model", "backend", "pool.workers", "steer.kind", "steer.layer", "steer.coef",
    "steer.coef_unit",
    further=("pool",),
)  # fmt: skip
def verify(ctx: typer.Context, vector: Vector = None, thorough: Thorough = False) -> None:
    """Verify independently that steering changes activations exactly as specified.

    Plain hooks read the residual stream: it must change by exactly coefficient x vector at the
    steered layer and tokens and nowhere else; coefficient 0 must change nothing; the rows of a
    mixed batch must equal what they are alone. On vLLM, where hooks cannot look into the engine,
    its results are compared with each other, with the prefix cache on and off, and with
    transformers. With --workers every worker is verified. Exits with 2 when a check fails.
    """
    from pvec.evaluation.verify import verify as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    result = console.call(partial(workflow.verify, settings, vector=vector, thorough=thorough))
    console.emit(result, _render)
    failed = [check.name for check in result.checks if not check.passed]
    if failed:
        raise SteeringError(
            f"{len(failed)} of {len(result.checks)} checks failed, the first: {failed[0]}. "
            f"Do not trust steering on this model; please report it with the model's name."
        )


def _render(console: Console, result: VerifyResult) -> None:
    layers = ", ".join(map(str, result.layers))
    console.print(f"{result.vector} on {result.model} ({result.dtype}), layers {layers}")
    for check in result.checks:
        detail = f"; {check.detail}" if check.detail else ""
        console.out.print(
            f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: "
            f"{check.measured:.2g} {check.unit} (allowed {check.allowed:.2g}{detail})",
            markup=False,
            style=None if check.passed else "bold red",
        )
    if result.passed:
        console.print(f"All {len(result.checks)} checks passed.")
        console.print(f"Proved: {result.proved}.")
        console.print(f"Not proved: {result.not_proved}.")
