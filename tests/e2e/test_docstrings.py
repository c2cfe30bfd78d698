"""The examples in the docstrings of public names run as they stand, on the bundled model."""

from __future__ import annotations

import doctest
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest

import pvec

FUNCTIONS = (
    "capture_means",
    "evaluate",
    "extract",
    "load_trait",
    "load_vector",
    "monitor",
    "project",
    "record_activations",
    "save_vector",
    "screen",
    "plot.cosines",
    "plot.figures",
    "plot.layers",
    "plot.tokens",
    "steer",
    "train",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the vector that the example of ``pvec.extract`` makes."""
    folder, before = tmp_path_factory.mktemp("docstrings"), Path.cwd()
    os.chdir(folder)
    try:
        pvec.extract("evil", limit=3, rollouts=2, max_tokens=32)
        yield folder
    finally:
        os.chdir(before)


def public_names() -> list[str]:
    """Return every public name after ``pvec.``, those of its module of figures included."""
    own = [name for name in pvec.__all__ if name[0] != "_" and name != "plot"]
    return [*own, *(f"plot.{name}" for name in pvec.plot.__all__)]


def test_every_public_function_has_an_example() -> None:
    named = (name for name in public_names() if name[0].islower())
    assert sorted(named) == sorted(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_prints_what_it_says(name: str, folder: Path) -> None:
    globs = {"pvec": pvec}
    tests = doctest.DocTestFinder(recurse=False).find(attrgetter(name)(pvec), name, globs=globs)
    assert any(test.examples for test in tests)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    printed: list[str] = []
    for test in tests:
        runner.run(test, out=printed.append)
    assert runner.failures == 0, "".join(printed)


def test_the_reference_page_names_every_public_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
    listed = [line.strip() for line in page.splitlines() if line.startswith("   pvec.")]
    assert sorted(listed) == sorted(f"pvec.{name}" for name in public_names())
