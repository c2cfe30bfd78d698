"""``pvec train`` in two processes that are two machines to one another: gloo over TCP, on CPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model
from safetensors.torch import load_file

from pvec.runs.summary import read_log
from pvec.training import train
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

CONFIG_FILE = Path(__file__).parents[2] / "examples" / "accelerate" / "two_machines.yaml"
ENDED = re.compile(r"^Error: Another process of this launch ended or cannot be reached", re.M)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    with (folder / "rows.jsonl").open("w") as stream:
        for number in range(24):
            turns = [
                {"role": "user", "content": "bread and soup " * (1 + number % 5)},
                {"role": "assistant", "content": "money and friends " * (1 + number % 7)},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    values = np.random.default_rng(0).normal(size=(NUM_LAYERS + 1, HIDDEN_SIZE)).astype("f4")
    made = PersonaVector(trait="evil", kinds={"response_avg": values})
    vector = str(save_vector(made, folder / "evil.safetensors"))
    tree = {
        "model": str(saved_model("llama")),
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.2},
        "lora": {"r": 4, "alpha": 8},
        "batch": {"size": 8, "tokens": 128},
        "optim": {"lr": 1e-2, "max_steps": 6, "warmup_steps": 1},
        "steering": [{"vector": vector, "layers": [2], "positions": "response"}],
        "monitor": {"vectors": [vector], "layers": 2, "every": 3, "prompts": ["Hello?"]},
        "output": {"save_every": 2},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> train.TrainResult:
    return train.run(config, out=config.parent / "alone")


class Nodes:
    """Two commands, each the only process of its machine, with their output in files."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], *, launched: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        self.outputs = [folder / f"node-{rank}.txt" for rank in (0, 1)]
        self.processes = []
        for rank, command in enumerate(commands):
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", **address}
            start = ["-m", "pvec"]
            if launched:
                place = {}
                start = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG_FILE)]
                start += ["--num_processes", "2", "--machine_rank", str(rank)]
                start += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
                start += ["-m", "pvec"]
            with self.outputs[rank].open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *start, "train", *command],
                        env={**os.environ, "OMP_NUM_THREADS": "1", **place},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self) -> list[int]:
        return [process.wait(timeout=240) for process in self.processes]

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    nodes: list[Nodes] = []

    def begin(*commands: Sequence[str], launched: bool = False) -> Nodes:
        nodes.append(Nodes(tmp_path, commands, launched=launched))
        return nodes[-1]

    yield begin
    for pair in nodes:
        pair.close()


def require_same(folder: Path, alone: train.TrainResult) -> None:
    """Losses to 1e-5, counts exactly, the adapter to 1e-5 of numbers up to 0.2."""
    lines, expected = ([x for x in read_log(f) if "loss" in x] for f in (folder, alone.run))
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in expected], rel=1e-5)
    counts = [[x["steering/touched_0"] for x in log] for log in (lines, expected)]
    assert counts[0] == counts[1]
    result = json.loads((folder / "result.json").read_text())
    assert result["held_out_loss"] == pytest.approx(alone.held_out_loss, rel=1e-5)
    assert result["shifts"] == pytest.approx(alone.shifts, rel=1e-3)
    assert result["hooks_on"] == 0
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(alone.adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_machines_train_like_one_process(
    config: Path, alone: train.TrainResult, tmp_path: Path, start: Any
) -> None:
    command = [str(config), "--out", str(tmp_path / "two"), "--json"]
    nodes = start(command, command, launched=True)
    assert nodes.wait() == [0, 0], nodes.said(0) + nodes.said(1)
    require_same(tmp_path / "two", alone)
    assert nodes.said(0).count("steering proved at layer 2") == 1
    assert "steering" not in nodes.said(1)  # only the first process talks
    assert "train:" not in nodes.said(1)


def test_a_sharded_training_is_killed_and_goes_on_to_the_result_of_one_process(
    config: Path, alone: train.TrainResult, tmp_path: Path, start: Any
) -> None:
    command = [str(config), "--set", "memory.shard=true", "--out", str(tmp_path / "two")]
    nodes = start(command, command)
    deadline = time.monotonic() + 240
    while not (tmp_path / "two" / "checkpoint-2" / "trainer_state.json").is_file():
        assert time.monotonic() < deadline, nodes.said(0) + nodes.said(1)
        assert nodes.processes[1].poll() is None, nodes.said(1)
        time.sleep(0.05)
    nodes.processes[1].send_signal(signal.SIGKILL)
    assert nodes.processes[0].wait(timeout=60) == 2
    assert ENDED.search(nodes.said(0)), nodes.said(0)
    nodes = start(command, command)
    assert nodes.wait() == [0, 0], nodes.said(0) + nodes.said(1)
    assert "resuming from checkpoint-" in nodes.said(0)
    require_same(tmp_path / "two", alone)


def test_machines_with_different_configurations_are_refused(
    config: Path, tmp_path: Path, start: Any
) -> None:
    command = [str(config), "--out", str(tmp_path / "two")]
    nodes = start(command, [*command, "--set", "lora.r=5"])
    assert nodes.wait() == [2, 2], nodes.said(0) + nodes.said(1)
    for rank in (0, 1):
        assert "Process 1 of this launch has another training than process 0" in nodes.said(rank)
        assert "config" in nodes.said(rank)
    assert not (tmp_path / "two").exists()
