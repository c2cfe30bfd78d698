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


def finish(folder: Path) -> None:
    process = start(folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


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


def kill_at(folder: Path, *, grown_to: int, seconds: float) -> int:
    """Kill a run when its files have grown so far, or after ``seconds``; return their size."""
    process = start(folder)
    until = time.monotonic() + seconds
    while process.poll() is None and size(folder) < grown_to and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return size(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """Kills are spread over the run by its progress, as start-up takes most of its time; some come
    at a moment of the start-up instead."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    step = size(whole) / (KILLS - 2)
    draw = random.Random(20)
    progress = [0]
    for number in range(KILLS):
        if number % 7 == 3:
            progress.append(kill_at(killed, grown_to=1 << 40, seconds=draw.uniform(0.1, 3.0)))
        else:
            goal = progress[-1] + 1 + int(draw.uniform(0.2, 1.4) * step)
            progress.append(kill_at(killed, grown_to=goal, seconds=120))
    assert len(set(progress)) >= KILLS // 2, f"too few kills hit the work: {progress}"
    finish(killed)
    assert responses(killed) == responses(whole)
    mine, theirs = scores(killed), scores(whole)
    assert mine.keys() == theirs.keys()
    for key, score in mine.items():
        assert score["score"] == pytest.approx(theirs[key]["score"], abs=1e-3)
    vector = Path("vectors") / "evil.safetensors"
    assert (killed / vector).read_bytes() == (whole / vector).read_bytes()
