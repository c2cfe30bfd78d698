"""Decoder blocks are found by structure, through whatever wraps the model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from pvec.errors import ModelError
from pvec.models.decoder import block_index, check_layer, describe_layer, find_decoder
from tests.helpers.models import ARCHITECTURES, HIDDEN_SIZE, NUM_LAYERS, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_body_runs_blocks_without_the_head(architecture: str) -> None:
    model = tiny_model(architecture)
    decoder = find_decoder(model)
    assert decoder.num_layers == NUM_LAYERS
    assert decoder.hidden_size == HIDDEN_SIZE
    assert decoder.body is model.base_model
    assert decoder.embed is model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert head is not None
    assert all(module is not head for module in decoder.body.modules())


def test_a_lora_adapter_is_looked_through() -> None:
    model = tiny_model("qwen2")
    blocks = find_decoder(model).blocks
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert find_decoder(adapted).blocks is blocks
    assert find_decoder(nn.DataParallel(adapted)).blocks is blocks


def test_an_adapter_with_virtual_tokens_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(tiny_model("qwen2"), config)
    with pytest.raises(ModelError, match="virtual tokens"):
        find_decoder(adapted)


def test_a_vision_tower_of_the_same_depth_is_not_mistaken_for_the_decoder() -> None:
    text = transformers.Gemma3TextConfig(
        vocab_size=300,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    decoder = find_decoder(model)
    assert decoder.blocks is model.model.language_model.layers
    assert decoder.body is model.model.language_model


def test_a_model_without_decoder_blocks_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="not a transformers model"):
        find_decoder(nn.Linear(2, 2))
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_decoder(
            transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **small))
        )
    broken = tiny_model("llama")
    broken.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 decoder blocks"):
        find_decoder(broken)


def test_layers_are_numbered_from_one() -> None:
    assert block_index(20) == 19
    assert describe_layer(20) == "layer 20 (block 19)"
    assert describe_layer(0) == "layer 0 (embedding)"
    assert check_layer(28, 28) == 28
    with pytest.raises(ModelError, match=r"embedding output.*layers 1 to 28"):
        check_layer(0, 28)
    for outside in (-1, 29):
        with pytest.raises(ModelError, match="layers 1 to 28"):
            check_layer(outside, 28)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_layer_zero_is_what_enters_the_first_block(architecture: str) -> None:
    model = tiny_model(architecture)
    seen: list[torch.Tensor] = []
    handle = find_decoder(model).on_layer(0, seen.append)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(seen[0], states[0])


def test_a_hook_on_layer_zero_can_replace_it() -> None:
    model = tiny_model("gpt2")
    handle = find_decoder(model).on_layer(0, lambda hidden: hidden + 1.0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        shifted = model(ids, output_hidden_states=True).hidden_states[0]
        handle.remove()
        plain = model(ids, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(shifted - plain, torch.ones_like(plain))


def test_learned_positions_limit_the_length_and_rotary_ones_do_not() -> None:
    assert find_decoder(tiny_model("gpt2")).max_tokens == 256
    assert find_decoder(tiny_model("llama")).max_tokens is None


def test_layer_numbers_are_checked_without_loading_torch() -> None:
    code = (
        "import sys, pvec.models.decoder as decoder; decoder.check_layer(1, 2); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
