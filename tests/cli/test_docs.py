"""The command-line reference is written from the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvec.cli.docs import check, reference, write
from pvec.errors import InputError


def test_a_written_page_is_current_and_a_changed_one_is_not(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "cli.md"
    with pytest.raises(InputError, match="make docs"):
        check(page)
    write(page)
    check(page)
    page.write_text(page.read_text() + "more\n")
    with pytest.raises(InputError, match=r"is not current; run `make docs`\.$"):
        check(page)


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    narrow = reference()
    monkeypatch.setenv("COLUMNS", "200")
    assert reference() == narrow


def test_options_carry_their_help_and_default() -> None:
    page = reference()
    assert "## pvec config" in page
    assert "- `--seed N`: Random seed; the same seed" in page
    assert "(default: 0)." in page
