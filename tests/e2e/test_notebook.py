"""The notebook: what is committed is whole, and it runs from top to bottom as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "persona_vectors.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(notebook: Any) -> int:
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs)


def means(notebook: Any, trait: str) -> dict[str, float]:
    """Return the mean trait score of every condition in the sweep's table."""
    (table,) = (printed(c) for c in code_cells(notebook) if "random coef" in printed(c))
    _, _, own = table.partition(f" {trait}   coherence     n\n")
    lines = (re.split(r"\s{2,}", line.strip()) for line in own.splitlines()[:9])
    return {name: float(mean) for name, mean, *_ in lines}


def test_it_was_committed_as_one_run_from_top_to_bottom() -> None:
    cells = code_cells(read())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert not [o for cell in cells for o in cell.outputs if o.get("name") == "stderr"]
    assert pictures(read()) == 3


def test_it_shows_nothing_of_the_machine_it_ran_on() -> None:
    shown = "".join(printed(cell) for cell in code_cells(read()))
    assert not re.search(r"/(home|root|work|Users|tmp)/|\x1b", shown)


def test_it_uses_the_public_api_alone_and_names_the_real_model() -> None:
    source = "".join(cell.source for cell in read().cells)
    assert not re.search(r"from pvec[. ]|import pvec\.", source)
    assert 'MODEL = "tiny"  # or "meta-llama/Llama-3.1-8B-Instruct"' in source


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_and_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::RuntimeWarning")  # zmq's, of the kernel's start
    notebook = read()
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert pictures(notebook) == 3
    for trait in ("evil", "optimistic"):
        found = means(notebook, trait)
        assert found["coef 1"] > found["unsteered"] + 30
        assert found["coef -1"] < found["unsteered"] + 5
        assert found["random coef 1"] < found["coef 0.5"]
        assert found == means(read(), trait), "the committed outputs are those of this run"
