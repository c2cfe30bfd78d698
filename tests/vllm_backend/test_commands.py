"""The commands on the vLLM backend, as a user types them, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.cli.app import main
from pvec.runs.store import Run
from pvec.vectors.files import load_vector


@pytest.fixture(autouse=True)
def _small_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "CACHE_BYTES": 2**26,
        "BLOCK_SIZE": 32,
        "EAGER": "true",
        "MAX_SEQS": 64,
        "CAPTURES": 64,
    }.items():
        monkeypatch.setenv(f"PVEC_BACKEND__VLLM__{name}", str(value))


def pvec(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


def test_verify_compares_the_engine_with_itself_and_with_transformers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--layer", "2,4", "--coef", "3")
    assert pvec("verify", "--backend", "vllm", *asked, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in result["checks"]}
    assert all(check["passed"] for check in checks.values())
    for words in (
        "positions=prompt: the residual stream changes by coef x v",
        "coefficient 0 is the identity",
        "prefix cache on and off give the same texts",
        "mean activations equal those in transformers",
        "greedy texts equal those of transformers",
    ):
        assert words in checks


def test_extract_captures_while_it_generates_and_gives_the_vector_of_two_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvec.backends.vllm.engine import VLLMBackend

    asked = ("extract", "--trait", "evil", "--backend", "vllm", "--rollouts", "1", "--max-tokens")
    second_passes: list[object] = []
    capture = VLLMBackend.capture

    def counted(self: VLLMBackend, sequences: Any, **options: Any) -> Iterator[Any]:
        second_passes.append(sequences)
        return capture(self, sequences, **options)

    monkeypatch.setattr(VLLMBackend, "capture", counted)
    assert pvec(*asked, "24", "--limit", "6", "--out", str(tmp_path / "run")) == 0
    assert not second_passes
    (path,) = (tmp_path / "run").rglob("*.safetensors")
    once = load_vector(path)
    path.unlink()
    assert pvec(*asked, "24", "--limit", "6", "--out", str(tmp_path / "run")) == 0
    assert second_passes, "the answers of the first run were only on disk"
    twice = load_vector(path)
    for kind, rows in once.kinds.items():
        assert np.allclose(rows, twice.kinds[kind], atol=1e-4), kind


def test_a_killed_engine_costs_no_finished_answer_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import psutil
    from vllm.envs import disable_envs_cache

    from pvec.backends.vllm.engine import VLLMBackend

    folder = tmp_path / "run"
    asked = ("extract", "--trait", "evil", "--backend", "vllm", "--rollouts", "1", "--limit", "5")
    asked += ("--max-tokens", "16", "--out", str(folder))
    generate = VLLMBackend.generate_and_capture

    def killed_after_three(self: VLLMBackend, requests: Any, **options: Any) -> Iterator[Any]:
        for number, answer in enumerate(generate(self, requests, **options)):
            yield answer
            if number == 2:
                engines = [p for p in psutil.Process().children() if "VLLM" in str(p.cmdline())]
                engines[0].kill()
                engines[0].wait()

    with monkeypatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        disable_envs_cache()  # an engine of another test may have read the environment
        patch.setattr(VLLMBackend, "generate_and_capture", killed_after_three)
        assert pvec(*asked) == 2
    assert "A worker of the vLLM engine died" in capsys.readouterr().err
    kept = {one.id: one for one in Run.read(folder).responses()}
    assert 3 <= len(kept) < 50
    assert pvec(*asked) == 0
    whole = {one.id: one for one in Run.read(folder).responses()}
    assert len(whole) == 50
    assert {name: whole[name] for name in kept} == kept


def test_the_choice_of_the_engine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--layer", "3", "--coef", "1", "--model", "tiny")
    assert pvec("verify", "--backend", "auto", *asked) == 0
    assert "on hf (the bundled model needs no engine)" in capsys.readouterr().err
