"""Arguments that several commands of ``pvec vector`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pvec.types import VectorKind

Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE…", help="Vector files, or run folders with one vector each."),
]
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A vector file, or a run folder with one vector.")
]
Kind = Annotated[
    VectorKind | None,
    typer.Option(metavar="KIND", help="response_avg (the default), prompt_avg or prompt_last."),
]
Layer = Annotated[
    int | None,
    typer.Option("--layer", "-l", metavar="N", help="Layer, counted from 1 (0: embedding)."),
]
