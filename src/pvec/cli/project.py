"""``pvec project``: the rows of a file on persona vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import (
    READING,
    SkipBad,
    Vectors,
    console_from,
    new_app,
    options,
    settings_from,
)
from pvec.cli.render import render_blocks
from pvec.data.storage import url_of
from pvec.errors import InputError
from pvec.types import OutputOptions

if TYPE_CHECKING:
    from rich.table import Table

    from pvec.projection.columns import ColumnSummary
    from pvec.projection.project import ProjectResult
    from pvec.projection.project_blocks import BlocksResult

app = new_app()

Inputs = Annotated[
    list[Path], typer.Argument(metavar="FILE", help="A table, data set folder or run.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Output file (default: by the input)."),
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Replace the input by the output.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace columns and files that exist.")
]
Tokens = Annotated[
    bool,
    typer.Option(
        "--tokens", help="Also write every token's projection, which `pvec report` shows."
    ),
]


@app.command()
@options(
    "model.id", "model.adapter", "project.layers", "project.types", "project.spans",
    "project.turns",
    further=(*READING, "model", "backend", "generation.thinking", "project.kind",
             "project.same_model", "project.chunk_rows", "project.scale_out", "project.block_mb",
             "pool", "paths"),
)  # fmt: skip
def project(
    ctx: typer.Context,
    *,
    inputs: Inputs,
    vector: Vectors,
    out: Out = None,
    in_place: InPlace = False,
    overwrite: Overwrite = False,
    skip_bad: SkipBad = False,
    tokens: Tokens = False,
) -> None:
    """Project the rows of a file on vectors.

    Every row gets a column per vector, type and layer. The same command continues where it was
    stopped. Other columns: --prompt-column, --answer-column, --messages-column; --plain-prompts for
    prompts that are questions, not rendered yet. Further options: docs/cli.md.
    """
    if len(inputs) != 1:
        raise InputError(f"One file at a time: {len(inputs)} were given.")
    (file,) = inputs
    settings, console = settings_from(ctx), console_from(ctx)
    output = OutputOptions(
        out=out, in_place=in_place, overwrite=overwrite, skip_bad=skip_bad, tokens=tokens
    )
    if settings.project.scale_out == "ray":
        from pvec.projection import project_blocks

        work = partial(project_blocks.run, settings, file, vector, output=output)
        console.emit(console.call(work), _render_blocks)
    else:
        from pvec.projection import project as workflow

        local = partial(workflow.run, settings, file, vector, output=output)
        console.emit(console.call(local), _render)


def _render(console: Console, result: ProjectResult) -> None:
    """Show what was added to a file, and what was odd about its rows."""
    place = url_of(result.input) or result.input
    console.print(f"{place}: {result.rows:,} rows on {result.model}")
    if result.left_out:
        console.print(f"  {result.left_out:,} rows left out that cannot be used")
    _render_notes(console, result)
    if result.resumed:
        console.print(f"  {result.resumed:,} rows done before")
    if result.output is None:
        console.print("nothing to do: every column is there")
        return
    console.print(_means(result.columns))
    console.print(f"output: {result.output}")
    if result.tokens is not None:
        console.print(f"tokens: {result.tokens}")
        console.print(f"next:   pvec report {result.tokens}")


def _render_blocks(console: Console, result: BlocksResult) -> None:
    """Show what was added to every block, and where the parts are."""
    console.print(f"{result.input}: {result.rows:,} rows on {result.model}")
    render_blocks(console, result)
    _render_notes(console, result)
    console.print(_means(result.columns))
    console.print(f"output: {result.output} ({result.blocks:,} part files)")


def _render_notes(console: Console, result: ProjectResult | BlocksResult) -> None:
    for note in result.counts.notes:
        console.print(f"  {note}")
    if result.kept:
        kept = len(result.kept)
        console.print(f"  {kept:,} columns kept as they were (--overwrite computes them again)")


def _means(columns: Sequence[ColumnSummary]) -> Table:
    rows = [(c.column, c.mean, c.deviation, c.n, c.missing) for c in columns]
    return table(("column", "mean", "sd", "n", "missing"), rows)
