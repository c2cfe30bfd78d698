"""``python -m pvec.cli.docs``: the command-line reference, written from the commands themselves.

With ``--check`` nothing is written and a stale file is an error. The text depends on the options
and their help alone, never on the width of a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from pvec.cli.app import app
from pvec.cli.options import COMMON_PANEL, FURTHER_PANEL
from pvec.errors import InputError

PAGE = Path("docs/cli.md")

HEAD = """\
# Command-line reference

Written by `make docs` from the commands' own help; `make check` fails when it is stale.
Every option that is a setting can also be given as `PVEC_SECTION__NAME` in the environment or in
`.env`, and in `pvec.yaml`; `pvec config` lists them with the value in force and its origin.
"""


def reference() -> str:
    """Return the whole page."""
    root = typer.main.get_command(app)
    return "\n".join([HEAD, *_command(root, typer.Context(root, info_name="pvec"))])


def write(page: Path = PAGE) -> None:
    """Write the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(reference(), encoding="utf-8")


def check(page: Path = PAGE) -> None:
    """Raise ``InputError`` when the page is not what ``write`` would write."""
    if not page.is_file() or page.read_text(encoding="utf-8") != reference():
        raise InputError(f"{page} is not current; run `make docs`.")


def _command(command: Any, ctx: Any) -> Iterator[str]:
    """Yield the lines about a command and, after it, its subcommands."""
    usage = " ".join((ctx.command_path, *command.collect_usage_pieces(ctx)))
    yield f"## {ctx.command_path}\n\n    {usage}\n\n{(command.help or '').strip()}\n"
    yield from _parameters(command, ctx)
    names = command.list_commands(ctx) if hasattr(command, "list_commands") else []
    if names:
        yield "**Commands**\n"
    for name in names:
        path = f"{ctx.command_path} {name}"
        summary = command.get_command(ctx, name).help.splitlines()[0]
        yield f"- [`{path}`](#{path.replace(' ', '-')}): {summary}"
    if names:
        yield ""
    for name in names:
        _, child, _ = command.resolve_command(ctx, [name])
        yield from _command(child, typer.Context(child, info_name=name, parent=ctx))


def _parameters(command: Any, ctx: Any) -> Iterator[str]:
    """Yield the options by panel; those that every command takes stand under ``pvec`` only."""
    panels: dict[str, list[str]] = {}
    for parameter in command.get_params(ctx):
        panel = getattr(parameter, "rich_help_panel", None) or "Options"
        if panel == FURTHER_PANEL:
            parameter.hidden = False  # in the help it is, here it is not
        record = parameter.get_help_record(ctx)
        everywhere = panel == COMMON_PANEL or parameter.name == "help"
        if record is None or (everywhere and ctx.parent):
            continue
        flags, text = record
        panels.setdefault(panel, []).append(f"- `{flags.strip()}`: {' '.join(text.split())}")
    for panel, lines in panels.items():
        yield f"**{panel}**\n"
        yield from lines
        yield ""


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--check"]:
            check()
        else:
            write()
    except InputError as error:
        sys.exit(f"Error: {error}")
