"""A training whose folder was damaged continues from what is whole and ends in the same adapter."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import saved_model

from pvec.errors import StoreError
from pvec.training import train


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def truncate(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return damage


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def pipe(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)

    return damage


def trap(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (
        (checkpoint / name).write_bytes(pickle.dumps(Trap(checkpoint.parent / "sprung"))) and None
    )


DAMAGES = {
    "weights cut off": truncate("adapter_model.safetensors"),
    "no weights": remove("adapter_model.safetensors"),
    "weights of nothing": replace("adapter_model.safetensors", b"\2\0\0\0\0\0\0\0{}"),
    "weights of another adapter": replace(
        "adapter_model.safetensors",
        b"\x46\0\0\0\0\0\0\0" + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(70)
        + b"\0" * 4,
    ),
    "optimiser cut off": truncate("optimizer.pt"),
    "no optimiser": remove("optimizer.pt"),
    "optimiser with code": trap("optimizer.pt"),
    "schedule with code": trap("scheduler.pt"),
    "random state with code": trap("rng_state.pth"),
    "no random state": remove("rng_state.pth"),
    "state cut off": truncate("trainer_state.json"),
    "state of another kind": replace("trainer_state.json", b"[1, 2]"),
    "state of many levels": replace("trainer_state.json", b"[" * 100_000 + b"]" * 100_000),
    "optimiser that is a pipe": pipe("optimizer.pt"),
    "weights that are a pipe": pipe("adapter_model.safetensors"),
    "state of another step": replace("trainer_state.json", b'{"global_step": 9}'),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a configuration and its finished training of four steps."""
    folder = tmp_path_factory.mktemp("training")
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(16):
            answer = " ".join(rng.choices(["bread", "soup", "walk"], k=rng.randint(1, 9)))
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    tree = {
        "model": str(saved_model("llama")),
        "data": {"train": str(folder / "rows.jsonl")},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "batch": {"size": 8},
        "optim": {"lr": 1e-2, "max_steps": 4, "warmup_steps": 1, "schedule": "constant"},
        "output": {"save_every": 1, "keep": 3},
    }
    (folder / "config.json").write_text(json.dumps(tree))
    train.run(folder / "config.json", out=folder / "whole")
    return folder


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def unfinished(finished: Path, run: Path) -> Path:
    """Copy the training without what it wrote last, as after a kill."""
    shutil.copytree(finished / "whole", run)
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(finished: Path, tmp_path: Path, damage: str) -> None:
    run = unfinished(finished, tmp_path / "run")
    DAMAGES[damage](run / "checkpoint-4")
    notes: list[str] = []
    train.run(finished / "config.json", out=run, notify=notes.append)
    assert sum(note.startswith("checkpoint-4 is damaged (") for note in notes) == 1
    assert "resuming from checkpoint-3" in notes
    assert not (run / "sprung").exists(), "code in a checkpoint was run"
    assert adapter(run) == adapter(finished / "whole")


def test_without_a_whole_checkpoint_the_training_begins_again(
    finished: Path, tmp_path: Path
) -> None:
    run = unfinished(finished, tmp_path / "run")
    for checkpoint in run.glob("checkpoint-*"):
        truncate("adapter_model.safetensors")(checkpoint)
    train.run(finished / "config.json", out=run)
    assert adapter(run) == adapter(finished / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        truncate("adapter/adapter_model.safetensors"),
        remove("adapter/adapter_model.safetensors"),
        truncate("adapter/adapter_config.json"),
        truncate("result.json"),
        replace("result.json", b"{}"),
        replace("result.json", b"[[]]"),
        replace("result.json", b"[" * 100_000 + b"]" * 100_000),
    ],
)
def test_a_damaged_result_is_made_again(
    finished: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "whole", run)
    damage(run)
    result = train.run(finished / "config.json", out=run)
    assert result.steps == 4
    assert adapter(run) == adapter(finished / "whole")


def test_a_result_that_is_a_pipe_is_refused_before_the_training(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "whole", run)
    log = (run / "log.jsonl").read_bytes()
    pipe("result.json")(run)
    with pytest.raises(StoreError, match="it is a pipe or a device"):
        train.run(finished / "config.json", out=run)
    assert (run / "log.jsonl").read_bytes() == log
