"""Steering touches what was asked for, nothing else, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pvec.errors import InputError, ModelError, SteeringError
from pvec.models.decoder import find_decoder
from pvec.steering.hooks import steer, steer_training
from pvec.steering.positions import (
    GENERATED,
    LAST,
    PAD,
    PROMPT,
    expected_touched,
    roles_by_length,
    roles_from_labels,
)
from pvec.steering.steerer import Steerer
from pvec.types import Instruction
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, tiny_model

IDS = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(1))


def vector(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN_SIZE).astype(np.float32)


def add(layer: int = 2, **changes: Any) -> Instruction:
    return Instruction(**{"vector": vector(), "layer": layer, "positions": "all", **changes})


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def stream(model: nn.Module, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    """Return every layer's output ``[L, B, T, H]`` of one forward."""
    seen: list[torch.Tensor] = []
    decoder = find_decoder(model)
    handles = [
        decoder.on_layer(layer, lambda h: seen.append(h.detach().clone()))
        for layer in range(1, decoder.num_layers + 1)
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_the_residual_stream_changes_by_exactly_coef_times_v_and_nowhere_before() -> None:
    model = tiny_model("qwen2")
    plain = stream(model)
    with steer(model, [add(coef=-1.5, positions="response")]):
        steered = stream(model)
    assert torch.equal(steered[0], plain[0])
    wanted = plain[1].clone()
    wanted[:, -1] += -1.5 * torch.from_numpy(vector())
    assert torch.equal(steered[1], wanted)
    assert not torch.equal(steered[2][:, -1], plain[2][:, -1])
    assert torch.equal(steered[2][:, :-1], plain[2][:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficient_zero_is_the_identity_and_still_counts(dtype: torch.dtype) -> None:
    model = tiny_model("gemma3").to(dtype)
    plain = model(IDS).logits
    with steer(model, [add(coef=0.0)]) as handle:
        steered = model(IDS).logits
    assert torch.equal(steered, plain)
    assert handle.touched == (IDS.numel(),)


def test_an_ablated_direction_is_gone_and_a_cap_is_a_ceiling() -> None:
    model = tiny_model("llama")
    unit = torch.from_numpy(vector() / np.linalg.norm(vector()))
    plain = stream(model)[1] @ unit
    with steer(model, [add(operator="ablate")]):
        assert (stream(model)[1] @ unit).abs().max() < 1e-5
    ceiling = float(plain.median())
    with steer(model, [add(operator="cap", coef=ceiling)]):
        capped = stream(model)[1] @ unit
    torch.testing.assert_close(capped, plain.clamp(max=ceiling), rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_are_steered_each_by_its_own_plan() -> None:
    model = tiny_model("qwen2")
    plans = [
        (),
        (add(1), add(2, positions="prompt", vector=vector(1))),
        (add(2, operator="ablate"), add(2, positions="response", coef=3.0)),
    ]
    decoder = find_decoder(model)
    lengths = torch.tensor([4, 5, 6])
    steerer = Steerer(decoder, plans)
    roles = roles_by_length(torch.ones_like(IDS).bool(), lengths)
    steerer.set_roles(roles)
    with steerer.attached():
        together = stream(model)
    steerer.check_complete()
    assert torch.equal(together[:, 0], stream(model)[:, 0]), "a row without a plan changed"
    assert steerer.touched() == [(), (9, 5), (9, 4)]
    for row, plan in enumerate(plans[1:], start=1):
        alone = Steerer(decoder, [plan])
        alone.set_roles(roles[row : row + 1])
        with alone.attached():
            single = stream(model, IDS[row : row + 1])
        torch.testing.assert_close(together[:, row : row + 1], single, rtol=1e-5, atol=1e-5)


def test_rows_that_leave_join_or_multiply_keep_their_plans_and_counts() -> None:
    model = tiny_model("llama")
    decoder = find_decoder(model)
    one, two = (add(1, coef=2.0),), (add(3, positions="response"),)
    steerer = Steerer(decoder, [one, (), two])
    steerer.set_roles(torch.full((3, 4), PROMPT))
    with steerer.attached():
        stream(model, IDS[:, :4])
    steerer.select([2, 0, 0])
    assert steerer.touched() == [(0,), (4,), (4,)]
    other = Steerer(decoder, [two])
    other.set_roles(torch.tensor([[PAD, PAD, PROMPT, LAST]]))
    with other.attached():
        stream(model, IDS[:1, :4])
    steerer.join(other)
    steerer.set_generated()
    ids = IDS[[0, 1, 2, 0], :1]
    with steerer.attached():
        steered = stream(model, ids)
    assert steerer.touched() == [(1,), (5,), (5,), (2,)]
    plain = stream(model, ids)
    wanted = plain[0] + torch.tensor([0.0, 2.0, 2.0, 0.0])[:, None, None] * torch.from_numpy(
        vector()
    )
    assert torch.equal(steered[0], wanted)
    steerer.select([1])
    assert steerer.check_touched(0, prompt_tokens=4, generated_tokens=1) == (5,)
    with pytest.raises(SteeringError, match="touched 5 positions instead of 6"):
        steerer.check_touched(0, prompt_tokens=5, generated_tokens=1)


def test_rows_with_plans_of_the_batch_join_its_tables_and_others_make_new_ones() -> None:
    model = tiny_model("llama")
    decoder = find_decoder(model)
    one, two, three = (add(1, coef=2.0),), (add(1, coef=-1.0),), (add(1, coef=5.0),)
    steerer = Steerer(decoder, [one, two])
    tables = steerer._layers[1]
    steerer.join(Steerer(decoder, [two, one, two]))
    assert steerer._layers[1] is tables
    steerer.select([1, 2, 4])  # nobody has the first plan now
    steerer.join(Steerer(decoder, [two, three]))
    assert steerer._plans == [two, three]
    steerer.set_generated()
    ids = IDS[[0, 1, 2, 0, 1], :1]
    with steerer.attached():
        steered = stream(model, ids)
    coefs = torch.tensor([-1.0, -1.0, -1.0, -1.0, 5.0])[:, None, None]
    assert torch.equal(steered[0], stream(model, ids)[0] + coefs * torch.from_numpy(vector()))
    assert steerer.touched() == [(1,)] * 5


def test_a_lora_adapter_is_steered_like_the_model_it_wraps() -> None:
    plain = stream(tiny_model("qwen2"))
    model = get_peft_model(
        tiny_model("qwen2"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with steer(model, [add()]) as handle:
        steered = stream(model)
    torch.testing.assert_close(steered[1], plain[1] + torch.from_numpy(vector()))
    assert handle.touched == (IDS.numel(),)


@pytest.mark.parametrize(
    ("instruction", "complaint"),
    [
        (add(0), "layer 0 is the embedding output"),
        (add(4), "layers 1 to 3"),
        (add(vector=np.ones(7, dtype=np.float32)), "hidden size is 32"),
        (add(vector=np.full(HIDDEN_SIZE, np.nan, dtype=np.float32)), "NaN"),
        (add(coef=float("inf")), "infinite"),
        (add(vector=np.zeros(HIDDEN_SIZE, dtype=np.float32), operator="ablate"), "no direction"),
    ],
)
def test_a_bad_instruction_is_refused_before_any_hook(
    instruction: Instruction, complaint: str
) -> None:
    model = tiny_model("llama")
    before = hooks_of(model)
    with pytest.raises(ModelError, match=complaint), steer(model, [add(1), instruction]):
        pytest.fail("the context was entered")
    assert hooks_of(model) == before


def test_hooks_are_gone_after_an_exception_and_the_exception_is_the_callers() -> None:
    model = tiny_model("llama")
    before = hooks_of(model)
    plain = stream(model)
    with pytest.raises(KeyError), steer(model, [add()]):
        raise KeyError
    assert hooks_of(model) == before
    assert torch.equal(stream(model), plain)


def test_steering_that_touches_nothing_is_an_error() -> None:
    model = tiny_model("llama")
    with pytest.raises(SteeringError, match="touched no token"), steer(model, [add()]):
        pass
    other = tiny_model("llama", seed=1)
    with pytest.raises(SteeringError, match="touched no token"), steer(model, [add(coef=0.0)]):
        other(IDS)
    with steer(model, []) as handle:
        pass
    assert handle.touched == ()


def test_nested_contexts_add_up() -> None:
    model = tiny_model("llama")
    with steer(model, [add(1)]), steer(model, [add(1, vector=vector(1))]):
        nested = stream(model)
    with steer(model, [add(1), add(1, vector=vector(1))]):
        torch.testing.assert_close(stream(model), nested, rtol=1e-5, atol=1e-5)


def test_tokens_that_cannot_be_told_apart_are_refused_unless_it_does_not_matter() -> None:
    model = tiny_model("llama")
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    with (
        pytest.raises(SteeringError, match="prompt_lengths"),
        steer(model, [add(positions="response")]),
    ):
        model(IDS[:, 4:], past_key_values=cache)
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    with steer(model, [add(positions="response")], prompt_lengths=[6, 6, 6]) as handle:
        model(IDS[:, 4:], past_key_values=cache)
    assert handle.touched == (3 * 4,)
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    with steer(model, [add()]) as handle:
        model(IDS[:, 4:], past_key_values=cache)
    assert handle.touched == (3 * 5,)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_touched(side: str) -> None:
    model = tiny_model("qwen2")
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    with steer(model, [add(), add(positions="response")]) as handle:
        steered = stream(model, attention_mask=mask)
    assert handle.touched == (IDS.numel() - 3, 3)
    changed = (steered[1] != stream(model, attention_mask=mask)[1]).any(-1)
    assert torch.equal(changed, mask.bool())


def test_roles_follow_padding_and_prompt_length() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    roles = roles_by_length(real, torch.tensor([2, 3]))
    assert roles.tolist() == [
        [PAD, PAD, PROMPT, LAST, GENERATED],
        [PROMPT, PROMPT, LAST, GENERATED, PAD],
    ]
    later = roles_by_length(real, torch.tensor([2, 5]), earlier=torch.tensor([1, 3]))
    assert later.tolist() == [
        [PAD, PAD, LAST, GENERATED, GENERATED],
        [PROMPT, LAST, GENERATED, GENERATED, PAD],
    ]


def test_roles_from_labels_find_every_turn_of_a_conversation() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100, 7, -100]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    assert roles_from_labels(labels, real).tolist() == [
        [PROMPT, LAST, GENERATED, GENERATED, PROMPT, LAST, GENERATED, PAD]
    ]


def test_expected_counts_are_those_of_the_design() -> None:
    due = {p: expected_touched(p, prompt_tokens=7, generated_tokens=4) for p in POSITIONS}
    assert due == {"all": 11, "prompt": 7, "response": 5}


POSITIONS = ("all", "prompt", "response")


def test_training_steers_labelled_tokens_and_gradients_flow_through() -> None:
    model = tiny_model("llama")
    labels = IDS.clone()
    labels[:, :5] = -100
    inputs = {"input_ids": IDS, "labels": labels}
    instruction = add(layer=2, coef=2.0, positions="response")

    def gradients(steered: Iterable[Instruction]) -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        with steer_training(model, list(steered)) as handle:
            model(**inputs).loss.backward()
            model.eval()
            assert torch.equal(model(**inputs).logits, plain), "evaluation was steered"
        assert handle.touched == (() if not steered else (3 * 5,))
        return [p.grad.clone() for p in model.parameters()]

    model.eval()
    plain = model(**inputs).logits
    model.train()
    addition = torch.zeros(*IDS.shape, HIDDEN_SIZE)
    addition[:, 4:] = 2.0 * torch.from_numpy(vector())
    by_hand = find_decoder(model).on_layer(2, lambda hidden: hidden + addition)
    model.zero_grad()
    model(**inputs).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    by_hand.remove()
    for ours, theirs in zip(gradients([instruction]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any(
        not torch.allclose(ours, theirs) for ours, theirs in zip(gradients([]), wanted, strict=True)
    )


def test_gradient_checkpointing_steers_the_recomputation_and_counts_once() -> None:
    labels = IDS.clone()
    labels[:, :5] = -100
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("qwen2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with steer_training(model, [add(positions="all", coef=2.0)]) as handle:
            for _ in range(2):
                model(input_ids=IDS, labels=labels, use_cache=False).loss.backward()
        assert handle.touched == (2 * IDS.numel(),)
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_a_training_step_without_labels_is_refused() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(SteeringError, match="labels"), steer_training(model, [add()]):
        model(input_ids=IDS)


def test_one_vector_under_two_names_is_one_plan_and_two_coefficients_are_two() -> None:
    steerer = Steerer(
        find_decoder(tiny_model("llama")),
        [(add(),), (replace(add(), name="other"),), (add(coef=2.0),)],
    )
    assert len(steerer._plans) == 2
    assert [plan[0].coef for plan in steerer.plans] == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": "multiply"}, "no operator 'multiply': use add, ablate, cap or floor"),
        ({"positions": "reply"}, "'reply': use all, prompt, response, think or answer"),
        ({"vector": torch.zeros(4, HIDDEN_SIZE)}, "single row"),
        ({"vector": "evil"}, "array of numbers, not str"),
        ({"vector": None}, "single row|array of numbers"),
        ({"layer": 2.5}, "not a whole number"),
    ],
)
def test_an_instruction_that_means_nothing_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Instruction(**({"vector": np.ones(HIDDEN_SIZE, dtype=np.float32), "layer": 2} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_of_a_torch_file_steers_as_its_numbers_do(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(NUM_LAYERS + 1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))
    torch.save(rows.to(dtype).requires_grad_(), tmp_path / "evil.pt")
    row = torch.load(tmp_path / "evil.pt")[2]
    instruction = Instruction(vector=row, layer=2, positions="all")
    assert instruction.vector.dtype == np.float32
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    seen: list[torch.Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda _block, args: seen.append(args[0]))
    model(input_ids=ids)
    with steer(model, [instruction]):
        model(input_ids=ids)
    due = row.detach().float().expand_as(seen[0])
    torch.testing.assert_close(seen[1] - seen[0], due, atol=1e-5, rtol=1e-4)
