"""Steered text equals, token for token, that of a hook written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pvec.models.decoder import find_decoder
from pvec.steering.hooks import steer
from pvec.types import Instruction, Positions
from tests.helpers.models import ARCHITECTURES, HIDDEN_SIZE, tiny_model

NEW_TOKENS = 12
PADS = 3

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@contextmanager
def hand_written_hook(
    model: PreTrainedModel,
    architecture: str,
    *,
    block: int,
    addition: torch.Tensor,
    positions: Positions,
) -> Iterator[None]:
    """The usual ten lines: prefill has many tokens (real ones behind the padding), decoding one."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        prefill = hidden.shape[1] > 1
        if positions == "all" or (positions == "prompt" and prefill):
            hidden += addition
        elif positions == "response":
            hidden[:, -1] += addition
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = model.get_submodule(BLOCKS.get(architecture, "model.layers"))
    handle = blocks[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 300, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    return ids, mask


def greedy(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    ids, mask = prompts()
    text: torch.Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return text


def vector(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN_SIZE).astype(np.float32) * scale


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_equals_a_hand_written_hook(architecture: str, positions: Positions) -> None:
    model = tiny_model(architecture)
    addition = 1.5 * torch.from_numpy(vector())
    with hand_written_hook(model, architecture, block=1, addition=addition, positions=positions):
        wanted = greedy(model)
    instruction = Instruction(vector=vector(), layer=2, coef=1.5, positions=positions)
    with steer(model, [instruction]) as handle:
        steered = greedy(model)
    assert torch.equal(steered, wanted)
    assert not torch.equal(steered, greedy(model)), "the dose is too small to show anything"
    rows, width = prompts()[0].shape
    real = rows * width - PADS
    due = {
        "prompt": real,
        "response": rows * NEW_TOKENS,  # the last prompt token, and all but the last sampled one
        "all": real + rows * (NEW_TOKENS - 1),
    }
    assert handle.touched == (due[positions],)


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_generation_without_a_cache_is_steered_at_the_same_tokens(positions: Positions) -> None:
    model = tiny_model("llama")
    instruction = Instruction(vector=vector(), layer=2, positions=positions)
    with steer(model, [instruction]):
        cached = greedy(model)
    with steer(model, [instruction]):
        uncached = greedy(model, use_cache=False)
    assert torch.equal(uncached, cached)


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_a_prompt_that_arrives_in_pieces_is_steered_as_a_whole(positions: Positions) -> None:
    model = tiny_model("qwen2")
    instruction = Instruction(vector=vector(), layer=1, positions=positions)
    lengths = prompts()[1].sum(dim=1).tolist()
    with steer(model, [instruction]) as whole:
        wanted = greedy(model)
    with steer(model, [instruction], prompt_lengths=lengths) as chunks:
        text = greedy(model, prefill_chunk_size=5)
    assert torch.equal(text, wanted)
    assert chunks.touched == whole.touched


def test_several_layers_vectors_and_operators_equal_a_plain_loop() -> None:
    """One forward against the definition: blocks run by transformers, changes applied by hand."""
    model = tiny_model("llama")
    ids, _ = prompts()
    one, two, three = (torch.from_numpy(vector(seed)).double() for seed in (1, 2, 3))
    instructions = [
        Instruction(vector=vector(1), layer=1, coef=0.5, positions="all"),
        Instruction(vector=vector(2), layer=1, operator="ablate", positions="all"),
        Instruction(vector=vector(3), layer=1, coef=-0.25, positions="response"),
        Instruction(vector=vector(3), layer=3, coef=0.1, operator="cap", positions="prompt"),
        Instruction(vector=vector(1), layer=2, coef=2.0, positions="prompt"),
    ]

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        h = hidden.double()
        if layer == 1:
            h = h + 0.5 * one
            h = h - (h @ two)[..., None] * two / two.norm() ** 2
            h[:, -1] = h[:, -1] - 0.25 * three
        if layer == 2:
            h = h + 2.0 * one
        if layer == 3:
            along = h @ (three / three.norm())
            excess = (along - 0.1).clamp(min=0)
            assert bool((excess > 0).any())
            assert bool((excess == 0).any())
            h = h - excess[..., None] * three / three.norm()
        return h.float()

    handles = [
        block.register_forward_hook(lambda _m, _a, out, layer=n: change(layer, out))
        for n, block in enumerate(model.model.layers, start=1)
    ]
    with torch.no_grad():
        wanted = model(ids).logits
        for handle in handles:
            handle.remove()
        with steer(model, instructions) as touched:
            logits = model(ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    rows, width = ids.shape
    assert touched.touched == (rows * width, rows * width, rows, rows * width, rows * width)


def test_all_layer_increments_move_every_layer_by_its_own_vector() -> None:
    """With the blocks' own work set to zero, what remains at layer l is the sum of additions."""
    from pvec.steering.instructions import instructions as steering_of
    from pvec.steering.instructions import steering_vector
    from pvec.vectors.vector import PersonaVector

    model = tiny_model("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    rows = np.random.default_rng(0).normal(size=(4, HIDDEN_SIZE)).astype(np.float32)
    seen: dict[int, torch.Tensor] = {}
    decoder = find_decoder(model)
    ids, _ = prompts()
    vector = PersonaVector(trait="evil", kinds={"response_avg": rows})
    increments = steering_vector(vector, kind="response_avg", increments=True)
    instructions = steering_of([increments], range(1, 4), coef=2.0, positions="all")
    with torch.no_grad(), steer(model, instructions):
        for layer in range(4):
            decoder.on_layer(layer, lambda h, layer=layer: seen.__setitem__(layer, h))
        model(ids)
    for layer in range(1, 4):
        moved = (seen[layer] - seen[0])[0, 0].numpy()
        np.testing.assert_allclose(moved, 2 * rows[layer], rtol=1e-4, atol=1e-4)
