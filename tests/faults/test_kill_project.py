"""``pvec project --in-place`` killed at random moments leaves the old or the new file, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.models import saved_model

from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

KILLS = 25
ROWS = 400

# One process imports everything once; each attempt is a fork of it, killed from outside.
DRIVER = """
import os, random, signal, sys, time
import torch
from pvec.backends.hf import backend as hf
from pvec.models import adapters
from pvec.cli.app import main
from pvec.projection import project
from pvec.projection import projector
from pvec.projection import inputs as project_input

seconds, kills, *arguments = sys.argv[1:]
draw = random.Random(5)

def attempt(moment):
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            main(arguments)
        except SystemExit as done:
            os._exit(done.code or 0)
    while time.monotonic() - started < moment:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status, time.monotonic() - started
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, moment

for _ in range(int(kills)):
    status, _ = attempt(draw.uniform(0.1, 1.0) * float(seconds))
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    sys.stdin.readline()  # the test looks at the file now
status, taken = attempt(120)
print("done", os.waitstatus_to_exitcode(status), taken, flush=True)
"""


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    rows = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = PersonaVector(trait="evil", kinds={"response_avg": rows})
    return save_vector(one, tmp_path / "evil.safetensors")


def write_rows(path: Path) -> bytes:
    lines = [
        {"messages": [{"role": "user", "content": f"question {i}"},
                      {"role": "assistant", "content": f"answer {i} " + "word " * (i % 20)}]}
        for i in range(ROWS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.read_bytes()


def driver(path: Path, vector: Path, *, kills: int, seconds: float) -> subprocess.Popen[str]:
    arguments = (
        "project", str(path), "--in-place", "--model", str(saved_model("qwen2")), "--vector",
        str(vector), "--layer", "2", "--chunk-rows", "64", "-q",
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(seconds), str(kills), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_the_moment_the_file_is_the_old_or_the_new_one(
    tmp_path: Path, vector: Path
) -> None:
    whole, killed = tmp_path / "whole" / "data.jsonl", tmp_path / "data.jsonl"
    whole.parent.mkdir()
    write_rows(whole)
    first, _ = driver(whole, vector, kills=0, seconds=1).communicate(timeout=300)
    _, code, taken = first.split()
    assert code == "0"
    new = whole.read_bytes()
    old = write_rows(killed)
    process = driver(killed, vector, kills=KILLS, seconds=float(taken))
    assert process.stdin is not None
    assert process.stdout is not None
    outcomes, kept = [], 0
    for _ in range(KILLS):
        outcomes.append(process.stdout.readline().strip())
        assert killed.read_bytes() in (old, new)
        log = tmp_path / ".data.jsonl.pvec" / "chunks.jsonl"
        kept += log.exists() and log.stat().st_size > 0
        if killed.read_bytes() == new:
            write_rows(killed)  # from the start again
        process.stdin.write("\n")
        process.stdin.flush()
    _, code, _ = process.stdout.readline().split()
    assert process.wait(timeout=60) == 0
    process.stdin.close()
    process.stdout.close()
    assert code == "0"
    assert killed.read_bytes() == new
    assert outcomes.count("killed") > KILLS / 2
    assert kept, "no kill came while rows were being projected"
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {"data.jsonl", "whole", "evil.safetensors"} <= {
        name for name in left if name.endswith(".tmp")
    }
