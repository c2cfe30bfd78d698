"""``pvec extract`` killed at twenty random moments ends where an undisturbed run does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = (
    sys.executable, "-m", "pvec", "extract", "--trait", "evil", "-q",
    "--limit", "4", "-n", "2", "--max-tokens", "48", "--seed", "7", "--batch-rows", "16", "--out",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
KILLS = 20


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, str(folder)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(folder: Path) -> float:
    began = time.monotonic()
    process = start(folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    return time.monotonic() - began


def responses(folder: Path) -> dict[str, object]:
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "an answer was generated twice"
    return {line["id"]: line for line in lines}


def scores(folder: Path) -> dict[str, object]:
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "an answer was judged twice"
    return {line["id"]: line for line in lines}


def size(folder: Path) -> int:
    return sum(
        (folder / name).stat().st_size
        for name in ("responses.jsonl", "scores.jsonl")
        if (folder / name).exists()
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = finish(whole)
    draw = random.Random(20)
    progress = []
    for _ in range(KILLS):
        process = start(killed)
        moment = draw.uniform(0.3, 1.0) * seconds
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        progress.append(size(killed) if killed.exists() else 0)
    finish(killed)
    assert len(set(progress)) > 2, "the kills hit nothing: every one came before or after the work"
    assert responses(killed) == responses(whole)
    mine, theirs = scores(killed), scores(whole)
    assert mine.keys() == theirs.keys()
    for key, score in mine.items():
        assert score["score"] == pytest.approx(theirs[key]["score"], abs=1e-3)
    vector = Path("vectors") / "evil.safetensors"
    assert (killed / vector).read_bytes() == (whole / vector).read_bytes()
