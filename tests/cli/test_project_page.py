"""The report's page of screening, monitoring and shifts: in its HTML, and as a browser shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.models import save_adapter, saved_model
from helpers.shell import Done, pvec

from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

pytest.importorskip("matplotlib")

Call = Callable[..., Done]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rows = 40 * np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = PersonaVector(trait="evil", kinds={"response_avg": rows})
    vector = save_vector(one, tmp_path / "evil.safetensors")

    def run(*arguments: object) -> Done:
        more = ("--max-tokens", 8) if arguments[0] == "screen" else ()
        return pvec(*arguments, "--vector", vector, "--layer", 2, *more, "-q")

    return run


def write_chats(path: Path, *, answers: str, count: int = 12) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"question {i}?"},
                {"role": "assistant", "content": f"{answers} {'word ' * (i % 4)}"},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_kind_has_its_section(project: Call, tmp_path: Path) -> None:
    model = saved_model("qwen2")
    data = write_chats(tmp_path / "data.jsonl", answers="start <b>early</b>")
    clean = write_chats(tmp_path / "clean.jsonl", answers="soup and bread, with")
    scored = tmp_path / "scored.csv"
    scored.write_text("prompt,answer,evil\n" + "".join(f"p {i},,{i}\n" for i in range(6)))
    adapter = save_adapter(model, tmp_path / "ft-evil" / "adapter")
    on = ("--model", model)
    assert project("screen", data, "--reference", clean, "--out", "diff", *on).code == 0
    assert project("monitor", scored, "--score", "evil", "--out", "monitor", *on).code == 0
    shift = project("shift", model, adapter, "--questions", clean, "--out", "shift")
    assert shift.code == 0, shift.err
    done = pvec("report", "diff", "monitor", "shift", "--out", "page.html")
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert "start <b>early</b>" not in page
    for words in ("screened on", "prompts monitored", "Finetuning shift", "AUC to clean set"):
        assert words in page
    assert "ft-evil moved furthest" in done.out


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_shows_the_most_suspicious_samples_however_far_out(
    project: Call, tmp_path: Path
) -> None:
    """Differences are no scores from 0 to 100: the filters of the page must not hide them."""
    data = write_chats(tmp_path / "data.jsonl", answers="start <b>early</b>")
    model = _stretched(tmp_path / "model")
    assert project("screen", data, "--out", "diff", "--model", model).code == 0
    summary = json.loads((tmp_path / "diff" / "summary.json").read_text())
    furthest = [sample["differences"]["evil_layer2"] for sample in summary["suspicious"]]
    assert max(furthest) > 100
    assert pvec("report", "diff", "--out", "page.html").code == 0
    assert BROWSER is not None
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--virtual-time-budget=2000", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    assert ">12 samples<" in shown
    assert shown.count("start &lt;b&gt;early&lt;/b&gt;") >= len(furthest)
    most = f"{furthest[0]:,.0f}" if furthest[0] >= 1000 else f"{furthest[0]:.1f}"
    assert f"evil, layer 2 {most}" in shown
    assert "missing" not in shown.split("<footer>")[0].split('class="pairs"')[1].split("<script")[0]


def _stretched(folder: Path) -> Path:
    """Return the small model with embeddings so long that its projections leave 0 to 100."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = saved_model("qwen2")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5000)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
