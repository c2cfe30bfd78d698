"""What surrounds the code agrees with it: trees, workflows, metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import pvec

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def tree(page: str) -> str:
    text = (ROOT / page).read_text("utf-8")
    (inside,) = re.findall(r"<!-- tree -->(.*?)<!-- /tree -->", text, re.DOTALL)
    return inside


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_readme_and_contributing_have_the_same_tree() -> None:
    assert tree("README.md") == tree("CONTRIBUTING.md")


def test_the_tree_has_a_line_for_every_folder_and_no_other() -> None:
    lines = tree("CONTRIBUTING.md").splitlines()
    listed = {line.split()[0].strip("/") for line in lines if line.startswith("  ")}
    folders = {path.parent.name for path in (ROOT / "src" / "pvec").glob("*/__init__.py")} | {
        "library.py"
    }
    assert listed == folders
    tops = {line.split()[0].strip("/") for line in lines if line[:1].isalpha()}
    assert all((ROOT / top).is_dir() for top in tops), tops


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`([\w./]+/[a-z_.]+\.[a-z]+)`", text)
    folders = (ROOT, ROOT / "src" / "pvec")
    missing = [name for name in named if not any((folder / name).is_file() for folder in folders)]
    assert len(named) > 10
    assert not missing


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {word for run in steps for word in run.split()[1:] if "=" not in word}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert steps
    assert called <= targets, called - targets


def test_every_supported_python_is_tested() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text("utf-8"))["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert tested == ["3.11", "3.12", "3.13", "3.14"]
    named = [c.rsplit(" ", 1)[-1] for c in project()["project"]["classifiers"] if "Python ::" in c]
    assert set(named) <= set(tested)


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_an_issue_form_asks_for_something(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / name).read_text("utf-8"))
    assert form["name"]
    assert all(part["attributes"]["label"] for part in form["body"])


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == pvec.__version__
    assert citation["license"] == project()["project"]["license"]
    assert "2507.21509" in citation["preferred-citation"]["url"]


def test_no_text_for_users_installs_pvec_from_an_index() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "constraints.txt"]
    for page in pages:
        found = re.findall(r"pip install[^\n`]*[' ]pvec\b[^\n`]*", page.read_text("utf-8"))
        assert not found, f"{page.name}: {found}"


def test_sections_of_the_changelog_are_dated() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d{2}-\d{2}\)", one) for one in headings[1:])
