"""Every architecture of ``docs/models.md`` does what the table says, on a tiny random model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.architectures import ARCHITECTURES, COLUMNS, TABLE_BEGINS, try_all

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAST = ("LFM2", "SmolVLM", "Gemma 3n (text)")
ALL = (
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("ALL_ARCHITECTURES"),
        reason="set ALL_ARCHITECTURES=1 to try every architecture",
    ),
)


def rows() -> dict[str, list[str]]:
    """Return the cells of the table by architecture."""
    lines = PAGE.read_text(encoding="utf-8").split(TABLE_BEGINS)[1].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {name: row for name, *row in cells[2:]}


def test_the_table_has_known_architectures() -> None:
    assert rows()
    assert set(rows()) <= set(ARCHITECTURES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else ALL) for name in rows()],
)
def test_an_architecture_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    results = try_all(name, tmp_path)
    assert ["yes" if results[c] == "yes" else "no" for c in COLUMNS] == [
        cell.split()[0] for cell in rows()[name]
    ]
