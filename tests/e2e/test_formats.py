"""What each command prints with ``--json`` and writes is what its golden file says.

They change on purpose only: ``PVEC_UPDATE_GOLDEN=1 pytest tests/e2e/test_formats.py`` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from helpers import golden
from helpers.entry_point import run_pvec
from helpers.frozen_commands import COMMANDS, working_folder

import pvec
from pvec.cli.app import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(working_folder(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_and_writes_what_it_did(name: str, folder: Path) -> None:
    before = golden.snapshot(folder)
    printed = {}
    for line in COMMANDS[name]:
        done = run_pvec(f"{line} --json")
        assert name == "errors" or done.code == 0, done.err
        printed[line] = {"exit code": done.code, **golden.tree(done.json)}
    golden.compare(name, {"printed": printed, "files": golden.written(folder, before)})


def test_the_health_check_has_the_keys_it_had() -> None:
    done = run_pvec("doctor --json")
    types = golden.tree(done.json, values=False)
    golden.compare("doctor", {"exit code": done.code, **types})


def test_commands_have_the_options_they_had() -> None:
    root = typer.main.get_command(app)
    golden.compare("options", dict(_options(root, typer.Context(root, info_name="pvec"))))


def test_settings_have_the_choices_limits_and_defaults_they_had() -> None:
    schema = pvec.Settings.model_json_schema()
    golden.compare("settings", _fields(schema, schema["$defs"]))


def _options(command: Any, ctx: Any) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Yield for each command its parameters by all their spellings; of the help nothing is kept."""
    options = {}
    for parameter in command.get_params(ctx):
        option = parameter.param_type_name == "option"
        spellings = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.name]
        repeated = parameter.multiple if option else parameter.nargs == -1
        options[" ".join(sorted(spellings))] = [
            "option" if option else "argument",
            *(["flag"] if option and parameter.is_flag else []),
            *(["required"] if parameter.required else []),
            *(["repeatable"] if repeated else []),
        ]
    yield ctx.command_path, dict(sorted(options.items()))
    for name in command.list_commands(ctx) if hasattr(command, "list_commands") else ():
        _, child, _ = command.resolve_command(ctx, [name])
        yield from _options(child, typer.Context(child, info_name=name, parent=ctx))


def _fields(schema: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema's fields without their descriptions and the names of classes."""
    fields: dict[str, Any] = {}
    for name, field in sorted(schema["properties"].items()):
        if "$ref" in field:
            fields[name] = _fields(classes[field["$ref"].rpartition("/")[2]], classes)
        else:
            kept = {k: v for k, v in field.items() if k not in ("description", "title")}
            fields[name] = [kept]
    return fields
