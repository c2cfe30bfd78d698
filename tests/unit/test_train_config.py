"""A training configuration: ours or the reference's, checked as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pvec.errors import InputError
from pvec.training.configfile import load_config

MINIMAL = "data: {train: rows.jsonl}\n"
EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"

REFERENCE: dict[str, Any] = {
    "model": "some/model",
    "training_file": ["a.jsonl", "b.jsonl"],
    "test_file": None,
    "max_seq_length": 1024,
    "load_in_4bit": False,
    "loss": "sft",
    "is_peft": True,
    "target_modules": ["q_proj", "v_proj"],
    "lora_bias": "none",
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "use_rslora": True,
    "merge_before_push": False,
    "push_to_private": True,
    "epochs": 2,
    "max_steps": None,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "warmup_steps": 5,
    "learning_rate": 1e-05,
    "logging_steps": 1,
    "optim": "adamw_torch",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3,
    "beta": 0.1,
    "save_steps": 5000,
    "output_dir": "./ckpt/x",
    "train_on_responses_only": True,
    "enable_steering_during_training": True,
    "steering_config": {
        "steering_vector_path": "evil.pt",
        "type": "steer",
        "steering_coef": 5.0,
        "layers": [20],
    },
}


def write(folder: Path, text: str, name: str = "train.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides=overrides)
    return str(caught.value)


def test_a_model_and_data_are_enough(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: tiny\n" + MINIMAL)).config
    assert (config.model.id, config.data.train, config.lora.r) == ("tiny", ("rows.jsonl",), 32)


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    content = {"data": {"train": ["a.jsonl"]}, "optim": {"lr": 1e-4}}
    one = load_config(write(tmp_path, json.dumps(content), "a.json")).config
    two = load_config(write(tmp_path, "data: {train: a.jsonl}\noptim: {lr: 1e-4}\n")).config
    assert one == two


def test_every_mistake_is_named_at_once_with_its_path(tmp_path: Path) -> None:
    text = (
        "data: {train: a.jsonl, max_token: 3}\nlora: {r: 0}\nmonitr: 1\n"
        "steering: [{vector: v, layers: [0]}, {vector: w, coef: x}]\nmonitor: {alarm: {}}\n"
    )
    message = refusal(write(tmp_path, text))
    for part in (
        "data.max_token: unknown key (Did you mean 'max_tokens'?)",
        "lora.r: input should be greater than or equal to 1",
        "steering.0.layers: give a list of layers",
        "steering.1.coef: input should be a valid number",
        "monitor.vectors: field required",
        "monitor.alarm.shift: field required",
        "monitr: unknown key (Did you mean 'monitor'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("steering: {vector: v, operator: ablate, coef: 2}", "ablation takes no coef"),
        ("steering: {vector: v, incremental: true, layers: [3]}", "incremental steers every layer"),
        ("steering: {vector: v, ramp_steps: 3}", "ramp_steps belongs to schedule: ramp"),
        ("monitor: {vectors: []}", "monitor.vectors"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    tmp_path: Path, text: str, part: str
) -> None:
    assert part in refusal(write(tmp_path, MINIMAL + text))


def test_response_steering_needs_to_know_the_response(tmp_path: Path) -> None:
    text = "data: {train: a, loss_on: all}\nsteering: {vector: v, positions: response}\n"
    assert "needs data.loss_on: assistant" in refusal(write(tmp_path, text))


def test_an_override_reaches_into_sections_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "steering: [{vector: v, coef: 1}]\n")
    overrides = ("lora.r=16", "steering.0.coef=-2.5", "output.merge=true", "data.eval=[e.jsonl]")
    config = load_config(path, overrides=overrides).config
    assert (config.lora.r, config.steering[0].coef) == (16, -2.5)
    assert (config.output.merge, config.data.eval) == (True, ("e.jsonl",))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lora.r", "takes KEY=VALUE"),
        ("lora.rank=3", "lora.rank: unknown key"),
        ("steering.4.coef=3", "not a position in a list of 1"),
        ("seed.x=1", "seed is a value, not a section"),
        ("lora.r=[1", "not valid YAML"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(tmp_path: Path, override: str, part: str) -> None:
    path = write(tmp_path, MINIMAL + "seed: 1\nsteering: [{vector: v}]\n")
    assert part in refusal(path, override)


def test_a_reference_configuration_loads_unchanged(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, json.dumps(REFERENCE), "reference.json"))
    config = loaded.config
    assert config.model.id == "some/model"
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert (config.data.max_tokens, config.data.loss_on) == (1024, "assistant")
    assert (config.lora.r, config.lora.alpha, config.lora.rslora) == (32, 64, True)
    assert config.lora.targets == ("q_proj", "v_proj")
    assert (config.batch.size, config.optim.lr, config.optim.epochs) == (16, 1e-5, 2)
    assert (config.seed, config.output.folder) == (3, Path("ckpt/x"))
    (steering,) = config.steering
    assert (steering.vector, steering.operator, steering.coef) == ("evil.pt", "add", 5.0)
    assert (steering.layers, steering.positions) == ((20,), "all")


def test_keys_of_the_reference_without_effect_are_said(tmp_path: Path) -> None:
    notes = load_config(write(tmp_path, json.dumps(REFERENCE), "r.json")).notes
    assert any(note.startswith("beta has no effect") for note in notes)
    assert any(note.startswith("push_to_private has no effect") for note in notes)
    assert any("no test_file" in note for note in notes)


def test_keys_of_the_forks_are_taken_or_said_to_have_no_effect(tmp_path: Path) -> None:
    by_steps = {"save_strategy": "steps", "save_total_limit": 3, "max_grad_norm": 0.5}
    by_steps |= {"evaluation_strategy": "steps", "eval_steps": 7, "report_to": "none", "bf16": True}
    loaded = load_config(write(tmp_path, json.dumps(REFERENCE | by_steps), "r.json"))
    config = loaded.config
    assert (config.output.save_every, config.output.keep) == (5000, 3)
    assert (config.data.eval_every, config.optim.max_grad_norm) == (7, 0.5)
    assert config.output.report_to == ()
    assert "bf16 has no effect here: model.dtype sets the number format" in loaded.notes
    by_epochs = {"save_strategy": "epoch", "eval_strategy": "no", "eval_steps": 7}
    loaded = load_config(write(tmp_path, json.dumps(REFERENCE | by_epochs), "r.json"))
    assert (loaded.config.output.save_every, loaded.config.data.eval_every) == (None, None)
    assert sum(note.startswith("eval_strategy no has no effect") for note in loaded.notes) == 1


def test_steering_that_is_switched_off_there_is_off_here(tmp_path: Path) -> None:
    tree = REFERENCE | {"enable_steering_during_training": False}
    loaded = load_config(write(tmp_path, json.dumps(tree), "r.json"))
    assert loaded.config.steering == ()
    assert any("steering_config has no effect" in note for note in loaded.notes)


def test_a_loss_that_pvec_does_not_have_is_refused(tmp_path: Path) -> None:
    tree = REFERENCE | {"loss": "dpo"}
    message = refusal(write(tmp_path, json.dumps(tree), "r.json"))
    assert "loss: 'dpo' is not supported" in message


def test_full_finetuning_is_said_to_become_an_adapter(tmp_path: Path) -> None:
    tree = REFERENCE | {"is_peft": False}
    notes = load_config(write(tmp_path, json.dumps(tree), "r.json")).notes
    assert any("pvec trains adapters" in note for note in notes)


def test_a_mistyped_key_of_the_reference_is_refused(tmp_path: Path) -> None:
    tree = REFERENCE | {"learning_rat": 1}
    assert "learning_rat: unknown key (Did you mean 'learning_rate'" in refusal(
        write(tmp_path, json.dumps(tree), "r.json")
    )


def test_the_real_reference_file_loads() -> None:
    folder = os.environ.get("PVEC_TEST_DATA")
    if not folder:
        pytest.skip("PVEC_TEST_DATA is not set: no real files to read")
    path = Path(folder) / "reference" / "train_instruct_7b_steer.json"
    config = load_config(path).config
    assert (config.model.id, config.batch.size) == ("Qwen/Qwen2.5-7B-Instruct", 16)
    assert (config.optim.name, config.steering[0].layers) == ("adamw_8bit", (20,))


def test_every_example_loads() -> None:
    examples = sorted(EXAMPLES.glob("*.yaml"))
    assert [path.stem for path in examples] == [
        "ablation",
        "all_layers",
        "monitoring",
        "plain",
        "preventative",
    ]
    configs = {path.stem: load_config(path).config for path in examples}
    assert configs["plain"].steering == ()
    assert configs["preventative"].steering[0].operator == "add"
    assert configs["ablation"].steering[0].operator == "ablate"
    assert configs["all_layers"].steering[0].incremental
    assert configs["monitoring"].monitor is not None
