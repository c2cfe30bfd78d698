"""Steering in training: gradients as a hand-written module's, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import HIDDEN_SIZE, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from pvec.errors import InputError, ModelError, SteeringError
from pvec.steering.proof import prove_steering
from pvec.training.forward import prove_isolation
from pvec.training.steering import ScheduledInstruction, TrainingSteering
from pvec.types import Instruction

VECTOR = np.random.default_rng(0).normal(size=HIDDEN_SIZE).astype(np.float32)
OTHER = np.random.default_rng(1).normal(size=HIDDEN_SIZE).astype(np.float32)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 9 and 6 tokens; the last four of each are the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, :2] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


DUE = {
    "all": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    "response": torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 5 + [0] * 3]),
}
"""Which tokens of ``batch`` are steered, written down by hand."""


def instruction(layer: int = 2, **options: Any) -> Instruction:
    return Instruction(vector=VECTOR, layer=layer, **({"positions": "all", "coef": 1.5} | options))


class HandWritten(nn.Module):
    """A block with the steering written into its forward."""

    def __init__(self, block: nn.Module, instruction: Instruction) -> None:
        super().__init__()
        self.block = block
        self.instruction = instruction

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        on = DUE[self.instruction.positions][..., None]
        vector = torch.from_numpy(self.instruction.vector)
        if self.instruction.operator == "add":
            hidden = hidden + on * self.instruction.coef * vector
        else:
            unit = vector / vector.norm()
            hidden = hidden - on * (hidden @ unit)[..., None] * unit
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name.replace(".block.", "."): grad for name, grad in found.items()}


def step(
    model: nn.Module, scheduled: Sequence[ScheduledInstruction], times: int = 1
) -> tuple[int, ...]:
    model.train()
    with TrainingSteering(model, scheduled) as steering:
        steering.at_step(0)
        for _ in range(times):
            model(**batch()).loss.backward()
        return steering.finish_step()


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "response"},
        {"operator": "ablate"},
        {"operator": "ablate", "positions": "response"},
    ],
)
def test_gradients_are_those_of_a_hand_written_module(
    architecture: str, options: dict[str, Any]
) -> None:
    one = instruction(**options)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = tiny_model(architecture, **(no_dropout if architecture == "gpt2" else {}))
    step(model, [ScheduledInstruction(instruction=one)])
    found = gradients(model)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks[1] = HandWritten(blocks[1], one)
    model(**batch()).loss.backward()
    assert_same(gradients(model), found)


@pytest.mark.parametrize("operator", ["add", "ablate"])
def test_checkpointing_steers_again_in_the_recomputation_and_counts_once(operator: str) -> None:
    scheduled = [ScheduledInstruction(instruction=instruction(operator=operator))]
    model = tiny_model("llama")
    touched = step(model, scheduled)
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert step(model, scheduled) == touched == (15,)
    assert_same(plain, gradients(model))


def test_under_lora_only_the_adapter_gets_gradients_and_the_steering_is_there() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = get_peft_model(tiny_model("llama"), config)
    steered = get_peft_model(tiny_model("llama"), config)
    steered.load_state_dict(plain.state_dict())
    step(steered, [ScheduledInstruction(instruction=instruction())])
    found = gradients(steered)
    assert found
    assert all("lora_" in name for name in found)
    blocks = plain.base_model.model.model.layers
    blocks[1] = HandWritten(blocks[1], instruction())
    plain.train()
    plain(**batch()).loss.backward()
    assert_same(gradients(plain), found)


def test_several_vectors_and_layers_are_applied_at_once() -> None:
    first, second = instruction(layer=1), instruction(layer=3, operator="ablate")
    model = tiny_model("qwen2")
    assert step(model, [ScheduledInstruction(instruction=i) for i in (first, second)]) == (15, 15)
    found = gradients(model)
    for one in (first, second):
        model.model.layers[one.layer - 1] = HandWritten(model.model.layers[one.layer - 1], one)
    model(**batch()).loss.backward()
    assert_same(gradients(model), found)


def test_rows_packed_without_padding_are_steered_like_padded_ones() -> None:
    model = tiny_model("llama")
    scheduled = [ScheduledInstruction(instruction=instruction(positions="response"))]
    padded = batch()
    real = padded["attention_mask"].bool()
    packed = {
        "input_ids": padded["input_ids"][real][None],
        "labels": padded["labels"][real][None],
        "position_ids": torch.cat([torch.arange(9), torch.arange(6)])[None],
    }
    touched = step(model, scheduled)
    one = gradients(model)
    with TrainingSteering(model, scheduled) as steering:
        steering.at_step(0)
        model(**packed, use_cache=False).loss.backward()
        assert steering.finish_step() == touched
    assert_same(one, gradients(model))


def test_a_ramp_rises_by_equal_parts_and_stays() -> None:
    one = ScheduledInstruction(instruction=instruction(coef=2.0), ramp_steps=4)
    assert [one.at(n).coef for n in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_evaluation_in_between_is_not_steered_and_not_counted() -> None:
    model = tiny_model("llama")
    plain = model.eval()(**batch()).logits
    with TrainingSteering(model, [ScheduledInstruction(instruction=instruction())]) as steering:
        steering.at_step(0)
        model.train()
        model(**batch()).loss.backward()
        model.eval()
        assert torch.equal(model(**batch()).logits, plain)
        assert steering.finish_step() == (15,)


def test_a_step_that_was_not_steered_stops_the_training() -> None:
    model = tiny_model("llama").train()
    with TrainingSteering(model, [ScheduledInstruction(instruction=instruction())]) as steering:
        steering.at_step(0)
        model(**batch()).loss.backward()
        steering.finish_step()
        with _hooks_lost(model):
            model(**batch()).loss.backward()
        with pytest.raises(SteeringError, match="touched 0 positions in this step instead of 15"):
            steering.finish_step()


def test_no_hook_is_left_behind() -> None:
    model = tiny_model("llama")
    step(model, [ScheduledInstruction(instruction=instruction())])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_vector_of_another_width_is_refused() -> None:
    wide = Instruction(vector=np.ones(HIDDEN_SIZE + 1, dtype=np.float32), layer=1)
    with pytest.raises(ModelError, match="hidden size"):
        TrainingSteering(tiny_model("llama"), [ScheduledInstruction(instruction=wide)])


# ── the proof before step 1 ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steering_that_works_is_proved_at_every_layer(
    architecture: str, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture).to(dtype)
    instructions = [instruction(layer=1), instruction(layer=3, positions="response")]
    proofs = prove_steering(model, instructions, batch())
    assert [(p.layer, p.positions) for p in proofs] == [(1, 15), (3, 10)]
    norm = 1.5 * float(np.linalg.norm(VECTOR))
    assert [p.change_norm for p in proofs] == pytest.approx([norm, norm], rel=0.05)


def test_ablation_is_proved_with_its_neighbours_on_one_layer() -> None:
    second = Instruction(vector=OTHER, layer=2, operator="ablate", positions="all")
    (proof,) = prove_steering(tiny_model("llama"), [instruction(), second], batch())
    assert proof.error < 1e-5


def test_the_proof_holds_with_dropout() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    assert prove_steering(model, [instruction()], batch())


def test_hooks_that_did_not_attach_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pvec.steering import proof

    @contextmanager
    def nothing(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(proof, "steer_training", nothing)
    with pytest.raises(
        SteeringError, match=r"does not do what was requested .* training does not start"
    ):
        prove_steering(tiny_model("llama"), [instruction()], batch())


@pytest.mark.parametrize(
    "done",
    [
        {"layer": 1},
        {"coef": -1.5},
        {"coef": 1.4},
        {"positions": "response"},
        {"operator": "ablate"},
    ],
)
def test_steering_other_than_asked_is_found(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvec.steering import proof

    real = proof.steer_training
    wrong = instruction(**done)
    monkeypatch.setattr(proof, "steer_training", lambda model, _: real(model, [wrong]))
    with pytest.raises(SteeringError, match="training does not start"):
        prove_steering(tiny_model("llama"), [instruction()], batch())


# ── packing ─────────────────────────────────────────────────────────────────────────────────────


def flatten(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": torch.tensor([[token for one in ids for token in one]]),
        "position_ids": torch.cat([torch.arange(len(one)) for one in ids])[None],
    }


def test_attention_that_keeps_packed_rows_apart_is_let_through() -> None:
    rows = [{"input_ids": row.tolist()} for row in batch()["input_ids"]]
    prove_isolation(tiny_model("llama"), rows, collate=flatten)


def test_attention_that_mixes_packed_rows_is_refused() -> None:
    rows = [{"input_ids": row.tolist()} for row in batch()["input_ids"]]

    def without_positions(some: Any) -> Any:
        whole = flatten(some)
        return {"input_ids": whole["input_ids"]}

    with pytest.raises(InputError, match="attention that keeps rows apart"):
        prove_isolation(tiny_model("llama"), rows, collate=without_positions)


@contextmanager
def _hooks_lost(model: nn.Module) -> Iterator[None]:
    """Take the blocks' hooks away, as a library that replaces modules would."""
    kept = [(block, dict(block._forward_hooks)) for block in model.model.layers]
    for block, _ in kept:
        block._forward_hooks.clear()
    yield
    for block, hooks in kept:
        block._forward_hooks.update(hooks)
