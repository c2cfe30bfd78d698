"""The README's and the documents' Python runs as it stands, after the commands before it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.shell import pvec

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the vector that `make demo` makes, from fewer answers."""
    folder = tmp_path_factory.mktemp("readme")
    done = pvec(
        "extract", "--trait", "evil", "--limit", 3, "-n", 2,
        "--runs", folder / "runs",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_block(beginning: str) -> str:
    (code,) = (code for code in blocks("README.md") if code.startswith(beginning))
    return code


def test_the_quick_start_of_the_readme_extracts_and_evaluates(folder: Path) -> None:
    first, *points = run(readme_block("import pvec\n\n# A small"), folder).splitlines()
    assert first.startswith("(160,) suggested layer: ")
    scores = {name: float(trait) for name, trait, _ in (line.rsplit(" ", 2) for line in points)}
    assert len(scores) == 7, "unsteered, two coefficients, their controls, and two prompts"
    assert all(0 <= score <= 100 for score in scores.values())


def test_the_library_example_of_the_readme_steers(folder: Path) -> None:
    code = readme_block("import pvec\n\nbackend")
    assert len(code.splitlines()) <= 16
    answer, touched = run(code, folder).strip().rsplit("\n", 1)
    assert answer
    (count,) = re.fullmatch(r"\((\d+),\)", touched).groups()  # type: ignore[union-attr]
    assert int(count) > 1


def test_the_callback_example_of_the_readme_makes_a_callback(folder: Path) -> None:
    before = (
        "import pvec\n"
        "class trainer:\n    add_callback = print\n"
        "tokenizer = pvec.HFBackend('tiny').tokenizer\n"
        "vector = pvec.load_vector('runs/evil-tiny/vectors/evil.safetensors')\n"
    )
    code = readme_block("watch = ").replace("20", "3")  # the bundled model has five layers
    assert "PersonaShiftCallback" in run(before + code, folder)


def test_a_vector_file_is_read_as_the_formats_page_says(folder: Path) -> None:
    (code,) = blocks("docs/formats.md")
    vectors = folder / "runs" / "evil-tiny" / "vectors"
    assert run(f"{code}\nprint(vectors.shape, about['trait'])", vectors) == "(6, 160) evil\n"
