"""A grid that is killed in the middle ends with the runs of separate commands, and its report says
what plain numpy says of their vector files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.judge_server import JudgeServer
from helpers.models import save_adapter, save_model, tiny_model
from helpers.shell import pvec
from safetensors.numpy import load_file

TRAITS, SEEDS = ("evil", "optimistic"), (0, 5)
DEPTHS = {"shallow": 3, "deep": 5}
SMALL = (
    "--limit", "3", "-n", "1", "--max-tokens", "12", "--backend", "hf", "--dtype", "float32",
    "--threshold", "0", "--min-coherence", "0",
)  # fmt: skip
POINTS = ("--layer", "2", "--coef", "1", "--limit", "2", "-n", "1", "--max-tokens", "12")
CELLS = list(product(DEPTHS, TRAITS, SEEDS))


def answers(run: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "an answer was generated twice"
    return {line["id"]: line["answer"] for line in lines}


def kill_in_the_middle(command: tuple[str, ...], folder: Path) -> None:
    """Kill the command when its fourth cell, the last of the first model, has begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pvec", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    model, trait, seed = CELLS[3]
    begun = folder / f"extract-{trait}-{model}-s{seed}" / "responses.jsonl"
    while process.poll() is None and not (begun.exists() and begun.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    states = [cell["state"] for cell in json.loads((folder / "grid.json").read_text())["cells"]]
    assert states == ["done"] * 3 + ["pending"] * 5


def vector(folder: Path, model: str, trait: str, seed: int) -> tuple[np.ndarray, int]:
    run = folder / f"extract-{trait}-{model}-s{seed}"
    stored: Any = json.loads((run / "summary.json").read_text())["suggested"]
    return load_file(run / "vectors" / f"{trait}.safetensors")["response_avg"], stored["layer"]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def check_report(folder: Path, report: Any) -> None:
    """Compare the report's numbers with vector files and scores, read without pvec."""
    middle: dict[tuple[str, str], int] = {}
    for item in report["traits"]:
        model, trait = item["model"], item["trait"]
        own = [vector(folder, model, trait, seed) for seed in SEEDS]
        layer = middle[model, trait] = min(layer for _, layer in own)
        (first, _), (second, _) = own
        assert item["layer"] == layer
        assert item["depth"] == pytest.approx(layer / DEPTHS[model])
        assert item["seed_cosine"]["mean"] == pytest.approx(
            cosine(first[layer].astype(float), second[layer].astype(float)), abs=1e-6
        )
        scores = []
        for seed in SEEDS:
            run = folder / f"extract-{trait}-{model}-s{seed}"
            signs = {
                line["id"]: line["condition"]["sign"]
                for line in map(json.loads, (run / "responses.jsonl").read_text().splitlines())
            }
            scores += [
                line["score"]
                for line in map(json.loads, (run / "scores.jsonl").read_text().splitlines())
                if line["metric"] == trait and signs[line["response_id"]] == "pos"
                if line["score"] is not None
            ]
        assert item["positive"]["n"] == len(scores)
        assert item["positive"]["mean"] == pytest.approx(np.mean(scores), abs=1e-6)

    def mean_row(model: str, trait: str, layer: int) -> np.ndarray:
        rows = [vector(folder, model, trait, seed)[0][layer] for seed in SEEDS]
        return np.mean(np.array(rows, dtype=float), axis=0)

    for matrix in report["trait_cosines"]:
        layers = sorted(vector(folder, matrix["of"], t, s)[1] for t, s in product(TRAITS, SEEDS))
        layer = layers[(len(layers) - 1) // 2]
        rows = [mean_row(matrix["of"], trait, layer) for trait in matrix["names"]]
        for i, j in combinations(range(len(rows)), 2):
            assert matrix["cosines"][i][j] == pytest.approx(cosine(rows[i], rows[j]), abs=1e-6)
    for matrix in report["model_cosines"]:
        trait = matrix["of"]
        share = np.mean([middle[model, trait] / DEPTHS[model] for model in matrix["names"]])
        layers = [round(float(share) * DEPTHS[model]) for model in matrix["names"]]
        assert matrix["layers"] == layers
        pairs = zip(matrix["names"], layers, strict=True)
        rows = [mean_row(model, trait, layer) for model, layer in pairs]
        assert matrix["cosines"][0][1] == pytest.approx(cosine(*rows), abs=1e-6)
    assert len(report["trait_cosines"]) == len(report["model_cosines"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_grid_ends_with_the_runs_of_separate_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key")
    for seed, (name, depth) in enumerate(DEPTHS.items()):
        save_model(tiny_model("qwen2", seed=seed, num_layers=depth), tmp_path / name)
    save_adapter(tmp_path / "deep", tmp_path / "adapter")
    # JSON is YAML
    (tmp_path / "g.yaml").write_text(
        json.dumps(
            {
                "models": ["shallow", {"id": "deep", "checkpoints": "adapter"}],
                "traits": TRAITS,
                "seeds": SEEDS,
            }
        )
    )
    folder = tmp_path / "runs" / "g"
    with JudgeServer() as server:
        judge = ("--judge-url", server.url)
        command = ("extract", "--grid", "g.yaml", *SMALL, *judge)
        kill_in_the_middle(command, folder)
        done = pvec(*command, "--json")
        assert done.code == 0, done.err
        assert done.json["ran"] == 5
        assert done.err.count("loading ") == 2
        for model, trait, seed in CELLS:
            own = pvec(
                "extract", "--trait", trait, "--model", model, "--seed", seed, *SMALL, *judge,
                "--out", f"own-{model}-{trait}-{seed}",
            )  # fmt: skip
            assert own.code == 0, own.err
            pair = (
                Path(f"own-{model}-{trait}-{seed}"),
                folder / f"extract-{trait}-{model}-s{seed}",
            )
            assert answers(pair[0]) == answers(pair[1])
            file = f"vectors/{trait}.safetensors"
            assert (pair[0] / file).read_bytes() == (pair[1] / file).read_bytes()
        steered = pvec("steer-eval", "--grid", "g.yaml", *POINTS, *judge)
        assert steered.code == 0, steered.err
    shifted = pvec("shift", "--grid", "g.yaml", "--dtype", "float32")
    assert shifted.code == 0, shifted.err
    alone = pvec(
        "shift", "deep", "adapter", "--vector", folder / "extract-evil-deep-s5", "--dtype",
        "float32", "--json",
    )  # fmt: skip
    report = pvec("report", folder, "--json")
    assert report.code == 0, report.err
    (numbers,) = report.json["grids"]
    check_report(folder, numbers)
    sweeps = {cell["run"] for cell in numbers["steering"]}
    assert sweeps == {f"steer-{trait}-{model}-s{seed}" for model, trait, seed in CELLS}
    assert len(numbers["shifts"]) == len(TRAITS) * len(SEEDS)
    (shift,) = (s["shift"] for s in numbers["shifts"] if s["run"] == "shift-evil-deep-s5")
    assert shift["mean"] == pytest.approx(alone.json["shifts"][0]["shift"]["mean"], rel=1e-6)
