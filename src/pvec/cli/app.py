"""The ``pvec`` command: its subcommands, loaded when they are called, and its exit codes.

To add a command, write ``cli/NAME.py`` (a dash in the name is an underscore in the file) with a
module-level ``app = new_app()`` from ``cli/options.py`` and its functions decorated with
``@app.command()`` and ``@options(…)``; then give it a line in ``COMMANDS``. A group of subcommands
is the same with ``new_app("What the group is about.")``. Its module is imported only when the
command runs, so that ``pvec --help`` stays fast; what it does with torch, it imports at use.

Exit codes: 0 done; for the others see ``cli/boundary.py``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from pvec import __version__
from pvec.cli.boundary import run_command
from pvec.cli.options import options
from pvec.errors import InputError, did_you_mean

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Torch's threads sleep while they wait for each other, unless the user set something about it:
spinning takes the cores that other processes, and so the threads waited for, could run on."""

MAIN = "Main commands"
MORE = "More commands"


@dataclass(frozen=True)
class Command:
    """A line of ``pvec --help``, known without importing the command's module."""

    name: str
    summary: str
    panel: str = MORE

    @property
    def module(self) -> str:
        """The module that holds the command's ``app``."""
        return "pvec.cli." + self.name.replace("-", "_")


COMMANDS = (
    Command("extract", "Make the persona vector of one or more traits.", MAIN),
    Command("vector", "Compute, inspect, compare, combine and convert vectors.", MAIN),
    Command("steer-eval", "Evaluate steering: trait and coherence by layer and coefficient.", MAIN),
    Command("project", "Project the rows of a file on vectors.", MAIN),
    Command("screen", "Screen training data before it is used.", MAIN),
    Command("monitor", "Predict from prompts how much of a trait their answers will show.", MAIN),
    Command("shift", "Measure how far finetuning moved models along vectors.", MAIN),
    Command("train", "Finetune with LoRA, optionally steered, logging the persona shift.", MAIN),
    Command("judge", "Score the answers of a run, or score them again with another judge."),
    Command(
        "verify", "Verify independently that steering changes activations exactly as specified."
    ),
    Command("chat", "Chat with a model while steering it."),
    Command("serve", "Serve a model to OpenAI clients, steered and measured by request."),
    Command("report", "Write a self-contained HTML report of one or more runs."),
    Command("trait", "List, show, check and write trait definitions."),
    Command("config", "Show every setting and where its value comes from."),
    Command("doctor", "Check the installation."),
)


RENAMED_FLAGS = {"--diff": "screen", "--prompts": "monitor", "--shift": "shift"}
"""Flag of `pvec project` → the command that does its job now."""

_OF_RENAMED_FLAGS = {"--reference": "--diff", "--score": "--prompts", "--questions": "--shift"}
"""Options that went with those flags."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they run, not when they are listed."""

    commands_by_name: ClassVar = {command.name: command for command in COMMANDS}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the commands' names in the order of help."""
        return list(self.commands_by_name)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Return a command's name and summary for help; see ``resolve_command``."""
        command = self.commands_by_name.get(cmd_name)
        if command is None:
            return None
        return TyperCommand(command.name, help=command.summary, rich_help_panel=command.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is called; an unknown one gets the nearest names."""
        if args and args[0] not in self.commands_by_name and not ctx.resilient_parsing:
            raise InputError(
                f"There is no command {args[0]!r}.{did_you_mean(args[0], self.commands_by_name)}"
                " `pvec --help` lists the commands."
            )
        name, command, rest = super().resolve_command(ctx, _with_new_name(ctx, args))
        return name, command and load(self.commands_by_name[command.name or ""]), rest


def _with_new_name(ctx: Any, args: list[str]) -> list[str]:
    """Return `project --diff …` as the command that it is now, which a note names.

    Raises ``InputError`` for two such flags, and for an option of theirs without its flag.
    """
    words = {word.partition("=")[0] for word in args}
    flags = [flag for flag in RENAMED_FLAGS if flag in words]
    if args[:1] != ["project"] or ctx.resilient_parsing:
        return args
    if len(flags) > 1:
        raise InputError(f"{flags[0]} and {flags[1]} are two different jobs: give one.")
    for option in _OF_RENAMED_FLAGS.keys() & words:
        flag = _OF_RENAMED_FLAGS[option]
        if flag not in flags:
            raise InputError(
                f"{option} has no effect here: it goes with {flag} (pvec {RENAMED_FLAGS[flag]})."
            )
    if not flags:
        return args
    command = RENAMED_FLAGS[flags[0]]
    ctx.meta["pvec.notes"] = [f"`pvec project {flags[0]}` is `pvec {command}` now"]
    return [command, *(word for word in args[1:] if word != flags[0])]


def load(command: Command) -> Any:
    """Import a command's module and return the command."""
    loaded = typer.main.get_command(importlib.import_module(command.module).app)
    loaded.name = command.name
    return loaded


app = typer.Typer(cls=LazyGroup, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"pvec {__version__}")
        raise typer.Exit


@app.callback()
@options()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Persona vectors: find, inspect, steer, prevent and monitor traits of language models.

    Start with `pvec extract --trait evil`; it needs no network, GPU or key.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit; every failure is one sentence on stderr."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if not os.environ.keys() & {*WAITING, "GOMP_SPINCOUNT"}:
        os.environ.update(WAITING)  # before torch is loaded
    run_command(
        lambda: typer.main.get_command(app).main(args, prog_name="pvec", standalone_mode=False),
        as_json="--json" in args,
        debug="--debug" in args,
    )
