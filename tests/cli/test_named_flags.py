"""Messages and documents name commands and options that exist: what a user reads can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from pvec.cli.app import RENAMED_FLAGS, app

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
OTHERS = frozenset({
    "--force-reinstall", "--no-deps",  # pip
    "--control-vector", "--control-vector-layer-range", "--merge",  # llama.cpp
    "--enable-auto-tool-choice", "--tool-call-parser",  # vLLM
    "--address", "--head",  # ray
    "--cpu", "--multi", "--num", "--use",  # accelerate (its flags have underscores)
    "--no",  # the beginning of many, in cli/options.py
})  # fmt: skip


def flags(command: Any = None) -> set[str]:
    """Return the flags of a command and of everything below it."""
    command = command or typer.main.get_command(app)
    ctx = typer.Context(command, info_name="pvec")
    found = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    for name in command.list_commands(ctx) if hasattr(command, "list_commands") else ():
        found |= flags(command.resolve_command(ctx, [name])[1])
    return found | set(RENAMED_FLAGS) | {"--help", "--check"}  # of `python -m pvec.cli.docs`


def shown_commands() -> Iterator[tuple[str, str]]:
    """Yield every ``pvec`` line of the documents' bash blocks with its page, joined to one line."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("pvec "):
                    yield page.name, line


def test_every_flag_that_the_source_names_is_one() -> None:
    known = flags() | OTHERS
    wrong = {
        f"{path.relative_to(ROOT)}: {flag}"
        for path in (ROOT / "src" / "pvec").rglob("*.py")
        for flag in FLAG.findall(path.read_text("utf-8"))
        if flag not in known
    }
    assert not sorted(wrong)


@pytest.mark.parametrize(("page", "line"), list(shown_commands()))
def test_every_command_that_the_documents_show_parses(page: str, line: str) -> None:
    _, *words = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(app)
    ctx = typer.Context(command, info_name="pvec")
    while hasattr(command, "list_commands"):
        name, command, words = command.resolve_command(ctx, words)
        ctx = typer.Context(command, info_name=name, parent=ctx)
    command.make_context(command.name, list(words), parent=ctx.parent)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
