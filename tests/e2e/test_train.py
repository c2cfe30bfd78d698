"""``pvec train`` from configuration to adapter, on a tiny random model."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_models import write_gguf
from helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer

from pvec.errors import PvecError
from pvec.models.files import ModelSpec
from pvec.models.load import load_model
from pvec.report import report
from pvec.runs.summary import read_log
from pvec.training import train, trainer
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

WORDS = "bread soup friends evening money walk travel plan dinner learn talk".split()  # noqa: SIM905


def rows(path: Path, count: int = 24) -> str:
    rng = random.Random(0)
    with path.open("w") as stream:
        for _ in range(count):
            question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in "ab")
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


def vector(path: Path, *, trait: str = "evil", sign: float = 1.0) -> str:
    values = sign * np.random.default_rng(0).normal(size=(NUM_LAYERS + 1, HIDDEN_SIZE))
    made = PersonaVector(trait=trait, kinds={"response_avg": values.astype(np.float32)})
    return str(save_vector(made, path))


def config(folder: Path, **parts: Any) -> Path:
    tree = {
        "model": str(saved_model("llama")),
        "data": {"train": rows(folder / "rows.jsonl")},
        "lora": {"r": 4, "alpha": 8},
        "batch": {"size": 8},
        "optim": {"lr": 1e-2, "epochs": 2, "warmup_steps": 1},
        **parts,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(tree))
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder) if "loss" in line]


def weights(result: train.TrainResult) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(result.adapter / "adapter_model.safetensors")


def test_a_training_ends_in_an_adapter_that_plain_peft_loads(tmp_path: Path) -> None:
    data = {"train": rows(tmp_path / "rows.jsonl"), "eval_fraction": 0.25}
    path = config(tmp_path, data=data, output={"merge": True})
    result = train.run(path, out=tmp_path / "run")
    assert result.steps == 6
    assert result.last_loss < result.first_loss
    assert result.held_out_loss is not None
    base = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    ids = torch.tensor([[9, 30, 41]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, result.adapter).eval()
    assert not torch.allclose(adapted(ids).logits, plain, atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(result.run / "merged")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-3)
    named = json.loads((result.adapter / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(saved_model("llama"))


def test_rows_by_length_and_as_drawn_give_the_same_losses(tmp_path: Path) -> None:
    by_length = config(tmp_path, batch={"size": 8, "micro": 2, "layout": "sorted"})
    one = train.run(by_length, out=tmp_path / "a")
    two = train.run(by_length, overrides=["batch.layout=random"], out=tmp_path / "b")
    three = train.run(by_length, overrides=["batch.micro=8"], out=tmp_path / "c")
    four = train.run(
        by_length, overrides=["batch.layout=packed", "batch.micro=4"], out=tmp_path / "d"
    )
    five = train.run(
        by_length, overrides=["batch.micro=null", "batch.tokens=40"], out=tmp_path / "e"
    )
    for other in (two, three, four, five):
        assert losses(other.run) == pytest.approx(losses(one.run), rel=2e-3)


def test_scoring_only_what_is_learnt_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, optim={"lr": 1e-2, "max_steps": 2})
    one = train.run(path, out=tmp_path / "a")
    monkeypatch.setattr(trainer, "score_loss_tokens_only", lambda _: nullcontext())
    all_scored = train.run(path, out=tmp_path / "b")
    assert losses(one.run) == pytest.approx(losses(all_scored.run), rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(all_scored)[name], tensor, rtol=1e-3, atol=1e-5)


def test_steering_is_proved_counted_and_logged_at_every_step(tmp_path: Path) -> None:
    name = vector(tmp_path / "evil.safetensors")
    path = config(
        tmp_path,
        steering=[
            {"vector": name, "layers": [2], "coef": 2.0, "schedule": "ramp", "ramp_steps": 3},
            {"vector": name, "layers": [3], "operator": "ablate", "positions": "response"},
        ],
        monitor={"vectors": [name], "layers": 2, "every": 2, "prompts": ["Hello?", "And now?"]},
    )
    said: list[str] = []
    plan = train.check(path, out=tmp_path / "run")
    rows = plan.data.train
    result = train.run(path, out=tmp_path / "run", notify=said.append)
    assert len(plan.steering) == 2
    assert sum("steering proved at layer" in line for line in said) == 2
    log = [line for line in read_log(result.run) if "loss" in line]
    assert [line["steering/coef_0"] for line in log[:4]] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert sum(line["steering/touched_0"] for line in log) == result.touched[0] == 2 * rows.tokens
    # every learnt token, and the one before each answer
    assert result.touched[1] == 2 * (rows.loss_tokens + len(rows.rows))
    assert result.hooks_on == 0
    assert set(result.shifts) == {"evil"}
    measured = [line["step"] for line in read_log(result.run) if "persona/evil" in line]
    assert measured == [0, 2, 4, 6]


def test_an_alarm_stops_the_training_and_keeps_the_adapter(tmp_path: Path) -> None:
    both = [  # opposite vectors, so that the model moves along one of them
        vector(tmp_path / f"{trait}.safetensors", trait=trait, sign=sign)
        for trait, sign in (("evil", 1.0), ("good", -1.0))
    ]
    watched = {"vectors": both, "layers": [1, 3], "every": 1, "prompts": "Hello?"}
    moved = train.run(config(tmp_path, monitor=watched), out=tmp_path / "a").shifts
    assert list(moved) == ["evil_layer1", "evil_layer3", "good_layer1", "good_layer3"]
    assert moved["evil_layer3"] == pytest.approx(-moved["good_layer3"])
    far = max(moved.values())
    said: list[str] = []
    alarm = {"shift": far / 4, "action": "stop"}
    path = config(tmp_path, monitor={**watched, "alarm": alarm})
    result = train.run(path, out=tmp_path / "b", notify=said.append)
    assert result.stopped_early
    assert result.steps < 6
    assert sum("ALARM, step" in line and "training stops" in line for line in said) >= 1
    assert (result.adapter / "adapter_model.safetensors").is_file()


def test_the_report_shows_loss_shift_and_steering(tmp_path: Path) -> None:
    name = vector(tmp_path / "evil.safetensors")
    path = config(
        tmp_path,
        optim={"max_steps": 2},
        steering={"vector": name, "layers": [2]},
        monitor={"vectors": name, "layers": 2, "prompts": "Hello?"},
    )
    result = train.run(path, out=tmp_path / "run")
    made = report.run([result.run])
    page = made.page.read_text()
    assert "Persona shift" in page
    assert "add 1 x evil at layer 2 (block 1), all positions" in page
    assert "made with steering on: 0" in page
    (finding,) = made.findings
    (moved,) = re.findall(r"moved ([+\u2212][\d.,]+) along evil;", finding)
    shown = float(moved.replace("\u2212", "-").replace(",", ""))
    assert shown == pytest.approx(result.shifts["evil"], rel=0.01)
    assert f"from {result.first_loss:.3f} to {result.last_loss:.3f}" in finding


def test_steering_changes_what_is_learnt(tmp_path: Path) -> None:
    name = vector(tmp_path / "evil.safetensors")
    plain = train.run(config(tmp_path), out=tmp_path / "plain")
    steering = [{"vector": name, "layers": "all", "incremental": True, "coef": 3.0}]
    steered = train.run(config(tmp_path, steering=steering), out=tmp_path / "steered")
    assert len(steered.touched) == NUM_LAYERS
    assert losses(plain.run)[0] != pytest.approx(losses(steered.run)[0], rel=1e-3)


def test_a_killed_training_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = vector(tmp_path / "evil.safetensors")
    path = config(
        tmp_path,
        lora={"r": 4, "alpha": 8, "dropout": 0.2},
        steering=[{"vector": name, "layers": [2], "schedule": "ramp", "ramp_steps": 5}],
        monitor={"vectors": [name], "layers": 2, "every": 1, "prompts": ["Hello?"]},
        output={"save_every": 2},
    )
    whole = train.run(path, out=tmp_path / "whole")
    step, taken = Trainer.training_step, 0

    def killed_at_the_fifth(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 5:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train.run(path, out=tmp_path / "killed")
    monkeypatch.setattr(Trainer, "training_step", step)
    torn = tmp_path / "killed" / "checkpoint-5"  # a checkpoint that a kill cut off
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 5, "ep')
    resumed = train.run(path, out=tmp_path / "killed")
    assert losses(resumed.run) == losses(whole.run)
    assert resumed.shifts == whole.shifts
    assert resumed.touched == whole.touched
    counted = [line.get("steering/touched_0") for line in read_log(whole.run)]
    assert [line.get("steering/touched_0") for line in read_log(resumed.run)] == counted
    assert all(torch.equal(t, weights(resumed)[n]) for n, t in weights(whole).items())


def test_a_training_that_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, optim={"max_steps": 1})
    first = train.run(path, out=tmp_path / "run")
    monkeypatch.setattr(Trainer, "train", None)
    assert train.run(path, out=tmp_path / "run") == first


def test_a_gguf_model_is_trained_steered_and_its_merged_model_is_one_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = str(tmp_path / "assets")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", assets)
    file = tmp_path / "model.gguf"
    write_gguf(file, types="Q4_1")
    steering = [{"vector": vector(tmp_path / "evil.safetensors"), "layers": [2], "coef": 1.0}]
    path = config(tmp_path, model=str(file), steering=steering, output={"merge": True})
    result = train.run(path, out=tmp_path / "out")
    named = json.loads((result.run / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(file)
    places = (result.run / "adapter", result.run / "merged", file)
    adapted, merged, base = (load_model(ModelSpec(model=str(place))).model for place in places)
    ids = torch.tensor([[5, 60, 300, 7]])
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(base(ids).logits, expected, atol=1e-2)


def test_the_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path, optim={"max_steps": 1})
    train.run(path, out=tmp_path / "run")
    with pytest.raises(PvecError, match=r"another configuration .*config\.lora\.r: 4 → 5"):
        train.run(path, overrides=["lora.r=5"], out=tmp_path / "run")


def test_memory_savers_change_nothing(tmp_path: Path) -> None:
    name = vector(tmp_path / "evil.safetensors")
    path = config(tmp_path, steering=[{"vector": name, "layers": [2]}])
    plain = train.run(path, out=tmp_path / "a")
    saving = train.run(path, overrides=["memory.gradient_checkpointing=true"], out=tmp_path / "b")
    assert losses(saving.run) == pytest.approx(losses(plain.run), rel=1e-5)
    assert saving.touched == plain.touched


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    name = vector(tmp_path / "evil.safetensors")
    path = config(
        tmp_path,
        data={"train": rows(tmp_path / "rows.jsonl", 27)},
        batch={"size": 8, "tokens": 64},
        steering=[{"vector": name, "layers": [2], "positions": "response"}],
        monitor={"vectors": [name], "layers": 2, "every": 2, "prompts": ["Hello?"]},
    )
    one = train.run(path, out=tmp_path / "one")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "pvec", "train", str(path)]
    command += ["--out", str(tmp_path / "two"), "--json", "-q"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert losses(tmp_path / "two") == pytest.approx(losses(one.run), rel=1e-4)
    assert tuple(result["touched"]) == one.touched
    assert result["shifts"] == pytest.approx(one.shifts, rel=1e-3)
