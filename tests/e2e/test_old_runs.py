"""Runs of an older version are read, and the commands that wrote them have nothing left to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.entry_point import run_pvec
from helpers.frozen_commands import RUNS, VECTOR, working_folder
from safetensors.numpy import load_file

import pvec

GENERATED = ("extract", "steer", "screen", "monitor")
"""Runs with answers in them."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(working_folder(tmp_path))
    return tmp_path


def run(line: str) -> Any:
    done = run_pvec(f"{line} --json")
    assert done.code == 0, done.err
    return done.json


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def frozen(folder: Path) -> dict[str, bytes]:
    """Return the files that hold results and must not change."""
    names = {"responses.jsonl", "scores.jsonl", "log.jsonl", "result.json"}
    paths = (p for p in folder.rglob("*") if p.name in names or p.suffix == ".safetensors")
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_command_repeats_nothing(name: str, folder: Path) -> None:
    before = frozen(folder / name)
    printed = run(RUNS[name].format(out=name))
    result = printed[0] if isinstance(printed, list) else printed
    assert result.get("generated", 0) == 0
    assert frozen(folder / name) == before
    sessions = json.loads((folder / name / "manifest.json").read_text())["sessions"]
    assert sessions[0]["command"][0] == "pvec", "the old session is still in the manifest"


@pytest.mark.parametrize("name", GENERATED)
def test_a_new_run_has_the_ids_and_the_answers_of_the_old_one(name: str, folder: Path) -> None:
    run(RUNS[name].format(out="new"))
    old, new = folder / name, folder / "new"
    answers = [
        {row["id"]: row["token_ids"] for row in rows(place / "responses.jsonl")}
        for place in (old, new)
    ]
    assert answers[1] == answers[0]
    if (old / "scores.jsonl").exists():
        ids = [{row["id"] for row in rows(place / "scores.jsonl")} for place in (old, new)]
        assert ids[1] == ids[0]


@pytest.mark.parametrize("name", ["extract", "steer"])
def test_the_judge_finds_all_answers_scored(name: str, folder: Path) -> None:
    before = frozen(folder / name)
    report = run(f"judge {name}")["report"]
    assert (report["skipped"], report["counts"]) == (len(rows(folder / name / "scores.jsonl")), {})
    assert frozen(folder / name) == before


def test_a_vector_computed_from_the_old_run_is_the_old_vector() -> None:
    filtered = run("vector compute extract --out new.safetensors")["filtered"]
    assert [filtered[sign]["kept"] for sign in ("pos", "neg")] == [10, 10]
    old, new = pvec.load_vector(VECTOR), pvec.load_vector("new.safetensors")
    assert old.kinds.keys() == new.kinds.keys()
    for kind, vectors in old.kinds.items():
        np.testing.assert_allclose(new.kinds[kind], vectors, rtol=1e-4, atol=1e-3)
    same = ("trait_hash", "model_fingerprint", "judge", "kept_pos", "kept_neg")
    assert [new.metadata[key] for key in same] == [old.metadata[key] for key in same]


@pytest.mark.parametrize("name", RUNS)
def test_a_report_is_written(name: str, folder: Path) -> None:
    run(f"report {name}")
    assert (folder / name / "report.html").stat().st_size > 10_000


def test_an_old_training_goes_on_from_its_checkpoint(folder: Path) -> None:
    """As if it had been killed after step 2."""
    train = folder / "train"
    old = json.loads((train / "result.json").read_text())
    weights = load_file(train / "adapter" / "adapter_model.safetensors")
    (train / "result.json").unlink()
    shutil.rmtree(train / "adapter")
    new = run(RUNS["train"].format(out="train"))
    assert (new["steps"], new["touched"]) == (old["steps"], old["touched"])
    assert new["last_loss"] == pytest.approx(old["last_loss"], rel=1e-4)
    assert new["shifts"] == pytest.approx(old["shifts"], rel=1e-2)
    assert [row["step"] for row in rows(train / "log.jsonl")].count(1) == 1, "step 1 was not redone"
    again = load_file(train / "adapter" / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_allclose(again[name], values, atol=1e-5)


def test_the_library_reads_old_runs(folder: Path) -> None:
    old = pvec.Run.read(folder / "extract")
    assert len(list(old.responses())) == 20
    assert len(list(old.scores())) == 40
