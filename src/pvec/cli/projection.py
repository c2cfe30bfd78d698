"""What `pvec project`, `screen`, `monitor` and `shift` have in common on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, with_interval
from pvec.cli.render import TINY_NOTE

if TYPE_CHECKING:
    from pvec.projection.inputs import OutputOptions
    from pvec.stats import Correlation, Interval

File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A table, data set folder or run.",
    ),
]
Vectors = Annotated[
    list[str],
    typer.Option("--vector", metavar="FILE", help="Vector file or run; repeatable."),
]
RunOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder (default: by the input)."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and count bad rows.")]
Traits = Annotated[
    list[str] | None,
    typer.Option("--trait", "-t", metavar="NAME|FILE", help="Trait (default: the vectors')."),
]

READING = ("project.prompt_column", "project.answer_column", "project.messages_column",
           "project.plain_prompts")  # fmt: skip
"""Settings of where conversations are in a file."""


def output_options(
    *,
    out: Path | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> OutputOptions:
    """Return the options as the workflows take them."""
    from pvec.projection.inputs import OutputOptions

    return OutputOptions(out=out, in_place=in_place, overwrite=overwrite, skip_bad=skip_bad)


def line(console: Console, text: str) -> None:
    """Show a line that is not wrapped and in which nothing is markup."""
    console.out.print(text, markup=False, soft_wrap=True)


def next_steps(console: Console, model: str, commands: Sequence[str]) -> None:
    """Show the commands to go on with, and what the bundled model is."""
    for command in commands:
        line(console, f"next:   {command}")
    if model == "tiny":
        console.note(TINY_NOTE)


def interval(value: Interval) -> str:
    """Return ``71.3 [68.0, 74.1]``."""
    return with_interval(value.mean, value.low, value.high)


def r_interval(value: Correlation) -> str:
    """Return ``0.71 [0.60, 0.79]``."""
    return with_interval(value.r, value.low, value.high, digits=2)


def shortened(text: str, *, limit: int = 160) -> str:
    """Return the text in one line of at most ``limit`` characters."""
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= limit else f"{one_line[:limit]}…"
