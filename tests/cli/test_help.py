"""Options follow from the settings: nothing is declared twice, nothing collides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import typer.main

from pvec.cli.app import app
from pvec.cli.options import COMMON, FLAGS
from pvec.settings.tree import RENAMED, fields


def commands(command: Any = None, ctx: Any = None) -> Iterator[tuple[str, Any]]:
    """Yield every command that runs something, with its path."""
    command = command or typer.main.get_command(app)
    ctx = ctx or typer.Context(command, info_name="pvec")
    if not hasattr(command, "list_commands"):
        yield ctx.command_path, command
        return
    for name in command.list_commands(ctx):
        _, child, _ = command.resolve_command(ctx, [name])
        yield from commands(child, typer.Context(child, info_name=name, parent=ctx))


ALL = list(commands())


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_no_flag_means_two_things(path: str, command: Any) -> None:
    flags = Counter(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))
    assert not [flag for flag, times in flags.items() if times > 1], path


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_every_command_takes_the_common_options(path: str, command: Any) -> None:
    assert {parameter.name for parameter in command.params} >= set(COMMON), path


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_everything_has_help(path: str, command: Any) -> None:
    assert command.help, path
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    assert all(parameter.help for parameter in shown), path


def test_spellings_are_those_of_settings_that_exist() -> None:
    assert set(FLAGS) <= {*fields(), *RENAMED}


def test_no_command_takes_a_key() -> None:
    names = {parameter.name for _, command in ALL for parameter in command.params}
    assert "judge__api_key" not in names
