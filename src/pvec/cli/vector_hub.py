"""``pvec vector push`` and ``pull``: vectors on the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pvec.cli.console import table
from pvec.cli.options import VectorFiles, console_from, new_app, options

app = new_app()


@app.command()
@options()
def push(
    ctx: typer.Context,
    files: VectorFiles,
    repo: Annotated[
        str, typer.Option("--to", metavar="OWNER/NAME", help="The hub's model repository.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Commit message.")] = None,
) -> None:
    """Put vectors on the model hub, with a card that explains them.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from pvec.vectors import hub

    console = console_from(ctx)
    result = hub.push(files, repo, private=private, message=message, notify=console.note)
    text = f"{', '.join(result.files)} → {result.url}"
    console.emit(result, lambda console, _: console.print(text))


@app.command()
@options()
def pull(
    ctx: typer.Context,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository.")],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE…", help="Which files (default: all).")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder they are put into.")
    ] = Path("vectors"),
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit.")
    ] = None,
) -> None:
    """Fetch vectors from the model hub."""
    from pvec.vectors import hub

    result = hub.pull(repo, files or (), out=out, revision=revision)
    rows = [(file.trait, file.model or "–", file.path) for file in result.files]
    listing = table(("trait", "model", "file"), rows)
    console_from(ctx).emit(result, lambda console, _: console.print(listing))
