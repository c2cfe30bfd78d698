"""The files of the page that ``pvec serve`` gives out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pvec
from pvec.report.style import PALETTE

SOURCE = Path(pvec.__file__).parent
PAGE = SOURCE / "serve" / "page"
_COLOUR = re.compile(r"--([a-z0-9-]+): (#[0-9a-f]{6}|\d+%);")


def colours(css: str) -> list[tuple[str, str]]:
    return _COLOUR.findall(css)


def test_its_colours_are_those_of_the_reports_pages() -> None:
    own = colours((PAGE / "page.css").read_text())
    assert len(own) == 24  # twelve, light and dark
    report = set(colours((SOURCE / "report" / "assets" / "page.css").read_text()))
    report |= {(name, colour) for name, pair in PALETTE.items() for colour in pair}
    assert set(own) <= report
    light, dark = dict(own[:12]), dict(own[12:])
    assert light.keys() == dark.keys()
    for name in light.keys() & PALETTE.keys():
        assert (light[name], dark[name]) == PALETTE[name]


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_no_file_asks_another_host_or_writes_markup(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", text, flags=re.MULTILINE)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    if path.suffix == ".html":
        assert not re.search(r"<style|<script>|\son\w+=|\sstyle=", text)
