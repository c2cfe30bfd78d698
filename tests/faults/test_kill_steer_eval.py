"""``pvec steer-eval``, killed again and again, ends with the answers of an undisturbed run.

    KILLS=100 pytest tests/faults/test_kill_steer_eval.py

runs as many kills.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.frozen_commands import OLD, VECTOR
from helpers.killed import KilledCommand, run_chains

KILLS = int(os.environ.get("KILLS", "6"))
COMMAND = (
    "steer-eval", "--trait", "evil", "--also", "optimistic", "--vector", OLD / VECTOR,
    "--layer", "2,3",
    "--coef", "0.5,1", "--limit", "2", "-n", "1", "--max-tokens", "24", "--batch-rows", "5",
)  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that an evaluation leaves and that does not depend on time."""
    logs = {}
    for name in ("responses.jsonl", "scores.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        logs[name] = {line["id"]: line for line in lines}
        assert len(logs[name]) == len(lines), f"{name} has a line twice"
    for score in logs["scores.jsonl"].values():
        score["score"] = round(score["score"], 2)  # a batch of others differs at rounding level
    tables = {path.name: len(path.read_text().splitlines()) for path in folder.glob("answers/*")}
    return {**logs, "tables": tables}


@pytest.mark.slow
@pytest.mark.timeout(240 + 30 * KILLS)
def test_kills_change_nothing(tmp_path: Path) -> None:
    with KilledCommand(*COMMAND) as command:
        chains = run_chains(command, tmp_path, kills=KILLS, outcome=outcome, seed=5)
    assert chains < KILLS, "most kills must hit an evaluation"
