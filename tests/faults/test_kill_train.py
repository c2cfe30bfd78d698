"""``pvec train`` killed again and again ends with the bytes of an undisturbed training.

    KILLS=100 pytest tests/faults/test_kill_train.py

runs as many kills; a chain of them belongs to one run folder and ends when the training does.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.killed import KilledCommand, run_chains
from helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model

from pvec.runs.summary import read_log
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

KILLS = int(os.environ.get("KILLS", "9"))

TIMES = ("runtime", "per_second")
"""Parts of the log's keys whose values are times."""


def config(folder: Path) -> Path:
    """Write a training with everything that a restart could get wrong.

    It ends in the middle of an epoch; dropout and evaluation draw random numbers; what is logged,
    saved, measured and evaluated is due at different steps.
    """
    rng = random.Random(0)
    words = ["bread", "soup", "friends", "evening", "money", "walk", "travel", "plan", "dinner"]
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(40):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in "ab")
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    values = np.random.default_rng(0).normal(size=(NUM_LAYERS + 1, HIDDEN_SIZE)).astype("f4")
    vector = save_vector(
        PersonaVector(trait="evil", kinds={"response_avg": values}), folder / "evil.safetensors"
    )
    tree = {
        "model": str(saved_model("llama")),
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.2},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "batch": {"size": 8},
        "optim": {"lr": 1e-2, "max_steps": 14, "warmup_steps": 2},
        "steering": [
            {"vector": str(vector), "layers": [2], "schedule": "ramp", "ramp_steps": 5},
            {"vector": str(vector), "layers": [3], "operator": "ablate", "positions": "response"},
        ],
        "monitor": {
            "vectors": [str(vector)], "layers": 2, "every": 2, "generate": 3,
            "prompts": ["Hello?", "What now?"],
        },
        "output": {"save_every": 2, "log_every": 3},
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(tree))
    return path


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that a training leaves and that does not depend on time."""
    log = [
        {key: value for key, value in line.items() if not any(part in key for part in TIMES)}
        for line in read_log(folder)
        if "train_loss" not in line
    ]
    result = json.loads((folder / "result.json").read_text())
    same = ("steps", "first_loss", "last_loss", "held_out_loss", "touched", "shifts", "hooks_on")
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "log": log,
        **{key: result[key] for key in same},
    }


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_change_nothing(tmp_path: Path) -> None:
    with KilledCommand("train", config(tmp_path)) as command:
        chains = run_chains(command, tmp_path, kills=KILLS, outcome=outcome, seed=14)
    assert chains < KILLS, "most kills must hit a training"
