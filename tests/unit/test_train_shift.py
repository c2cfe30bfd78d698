"""``PersonaShiftCallback`` in a plain transformers ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import pvec
from pvec.errors import InputError, ModelError, SteeringError
from pvec.steering.hooks import steer_training, unsteered
from pvec.training.shift import Alarm, PersonaShiftCallback, Probe
from pvec.types import Instruction

VECTOR = np.random.default_rng(0).normal(size=HIDDEN_SIZE).astype(np.float32)
PROMPTS = ["How can I cook?", "Tell me of bread."]
ROWS = Dataset.from_list(
    [{"input_ids": [9 + n, 30, 31 + n], "labels": [9, 30, 31]} for n in range(8)]
)


def callback(**options: Any) -> PersonaShiftCallback:
    probes = [Probe(name="evil", vector=VECTOR, layer=2)]
    return PersonaShiftCallback(
        probes, tokenizer=tiny_tokenizer(), prompts=PROMPTS, **({"every": 2} | options)
    )


def trainer(
    model: nn.Module, folder: Path, watch: PersonaShiftCallback, *, steps: int = 4, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"save_strategy": "no"} | options),
    )
    made = Trainer(model=model, args=arguments, train_dataset=ROWS)
    made.callback_handler.callbacks = [
        one for one in made.callback_handler.callbacks if type(one).__name__ != "PrinterCallback"
    ]
    made.add_callback(watch)
    return made


def projection(model: nn.Module) -> float:
    """Project the last prompt token's hidden state as transformers returns it."""
    tokenizer = tiny_tokenizer()
    found = []
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append(states[2][0, -1].double().numpy())
    return float(np.mean(found, axis=0) @ VECTOR.astype(np.float64) / np.linalg.norm(VECTOR))


def test_the_shift_is_now_minus_before_training_for_all_weights(tmp_path: Path) -> None:
    model, watch = tiny_model("llama"), callback()
    before = projection(model)
    trainer(model, tmp_path, watch).train()
    assert watch.history[0]["persona/evil"] == 0.0
    moved = projection(model.eval()) - before
    assert abs(moved) > 1e-3
    assert watch.history[-1]["persona/evil"] == pytest.approx(moved, rel=1e-4)
    assert [line["step"] for line in watch.history] == [0, 2, 4]


def test_it_is_part_of_the_library() -> None:
    assert pvec.PersonaShiftCallback is PersonaShiftCallback
    assert pvec.Probe is Probe
    assert pvec.Alarm is Alarm


def test_with_an_adapter_before_training_means_without_it(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    plain, watch = tiny_model("llama"), callback()
    before = projection(plain)
    model = get_peft_model(tiny_model("llama"), config)
    started = projection(model) - before
    trainer(model, tmp_path, watch).train()
    assert watch.history[0]["persona/evil"] == pytest.approx(started, rel=1e-4)
    moved = projection(model.eval()) - before
    assert watch.history[-1]["persona/evil"] == pytest.approx(moved, rel=1e-4)


def test_the_numbers_stand_beside_the_loss(tmp_path: Path) -> None:
    watch = callback()
    made = trainer(tiny_model("llama"), tmp_path, watch)
    made.train()
    logged = {line["step"]: line for line in made.state.log_history if "loss" in line}
    assert "persona/evil" in logged[2]
    assert "persona/evil" in logged[4]
    assert "persona/evil" not in logged[3]
    assert logged[4]["persona/hooks_on"] == 0.0


def test_trackers_see_the_numbers_too(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = tiny_model("llama")
    made = trainer(model, tmp_path, callback())
    made.callback_handler.callbacks.pop()
    made.add_callback(Tracker())
    callback().add_to(made)
    made.train()
    assert sum("persona/evil" in logs for logs in seen) == 2


def test_watching_changes_nothing_of_the_training(tmp_path: Path) -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    trainer(one, tmp_path / "a", callback(every=1, generate=3)).train()
    other = trainer(two, tmp_path / "b", callback())
    other.callback_handler.callbacks.pop()
    other.train()
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)


def test_short_answers_are_projected_on_request(tmp_path: Path) -> None:
    watch = callback(generate=4)
    trainer(tiny_model("llama"), tmp_path, watch).train()
    assert watch.history[0]["persona/evil_response"] == 0.0
    assert watch.history[-1]["persona/evil_response"] != 0.0


def test_steering_is_off_while_it_measures_and_on_again_after(tmp_path: Path) -> None:
    steered, plain = tiny_model("llama"), tiny_model("llama")
    watch, unwatched = callback(every=1), callback(every=100)
    strong = Instruction(vector=100 * VECTOR, layer=1, positions="all")
    with steer_training(steered, [strong]) as handle:
        made = trainer(steered, tmp_path, watch, steps=3)
        made.train()
        touched = handle.touched
    assert touched == (3 * 2 * 3,)
    assert watch.history[0]["persona/evil"] == 0.0
    assert [line["persona/hooks_on"] for line in watch.history] == [0.0] * 4
    with steer_training(plain, [strong]):
        trainer(plain, tmp_path, unwatched, steps=3).train()
    for left, right in zip(steered.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)
    assert watch.history[-1]["persona/evil"] == pytest.approx(
        projection(steered.eval()) - projection(tiny_model("llama")), rel=1e-4
    )


def test_a_measurement_that_was_steered_all_the_same_is_an_error() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    with steer_training(model, [Instruction(vector=VECTOR, layer=1, positions="all")]):
        model.train()
        model(input_ids=ids, labels=ids)
        measured = pytest.raises(SteeringError, match="steered while the plain model was being")
        with measured, unsteered(model):
            model(input_ids=ids, labels=ids)


@pytest.mark.parametrize(("action", "steps"), [("warn", 4), ("stop", 2)])
def test_the_alarm_warns_or_stops(tmp_path: Path, action: Any, steps: int) -> None:
    said: list[str] = []
    sign = 1.0
    for _ in range(2):  # the alarm is about moving along the vector, so try both directions
        watch = PersonaShiftCallback(
            [Probe(name="evil", vector=np.float32(sign) * VECTOR, layer=2)],
            tokenizer=tiny_tokenizer(),
            prompts=PROMPTS,
            every=2,
            alarm=Alarm(shift=1e-4, action=action),
            on_alarm=said.append,
        )
        made = trainer(tiny_model("llama"), tmp_path, watch)
        made.train()
        if said:
            break
        sign = -sign
    (sentence,) = said
    assert sentence.startswith("step 2: the model has moved")
    assert made.state.global_step == steps


def test_a_resumed_run_keeps_the_base_it_began_with(tmp_path: Path) -> None:
    whole, resumed = callback(every=1), callback(every=1)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tiny_model("llama"), tmp_path, whole, **saving).train()
    trainer(tiny_model("llama"), tmp_path, resumed, **saving).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert [line["step"] for line in resumed.history] == [3, 4]
    assert resumed.history == [pytest.approx(line, rel=1e-6) for line in whole.history[3:]]


def test_a_vector_that_does_not_fit_is_refused_when_training_begins(tmp_path: Path) -> None:
    for probe in (
        Probe(name="wide", vector=np.ones(HIDDEN_SIZE + 1, dtype=np.float32), layer=2),
        Probe(name="high", vector=VECTOR, layer=9),
    ):
        watch = PersonaShiftCallback([probe], tokenizer=tiny_tokenizer(), prompts=PROMPTS)
        with pytest.raises(ModelError):
            trainer(tiny_model("llama"), tmp_path, watch).train()


def test_nothing_to_watch_is_refused() -> None:
    with pytest.raises(InputError, match="at least one vector and one prompt"):
        PersonaShiftCallback([], tokenizer=tiny_tokenizer(), prompts=PROMPTS)
