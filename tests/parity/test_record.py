"""Recorded activations are transformers' own hidden states, whatever stands in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pvec
from pvec.errors import InputError, ModelError
from tests.helpers.models import ARCHITECTURES, NUM_LAYERS, tiny_model, tiny_tokenizer

TEXTS = ("How do I make friends in a new town?", "Hello.", "One two three four five six seven.")
CHAT = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, you."}]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_is_what_transformers_says(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    for text, recorded in zip(TEXTS, pvec.record_activations(model, tokenizer, TEXTS), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        assert recorded.token_ids == tuple(ids[0].tolist())
        assert recorded.layers == tuple(range(NUM_LAYERS + 1))
        for layer in range(NUM_LAYERS):  # transformers puts the last one through the final norm
            np.testing.assert_allclose(recorded.at(layer), states[layer][0], atol=1e-5)


def test_the_last_layer_is_taken_before_the_final_norm() -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    (recorded,) = pvec.record_activations(model, tokenizer, TEXTS[:1])
    ids = torch.tensor([recorded.token_ids])
    with torch.no_grad():
        normed = model.model.norm(torch.from_numpy(recorded.at(NUM_LAYERS)))
        last = model(ids, output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(normed, last, atol=1e-5)


def test_batches_of_any_size_give_the_same_values() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    together = pvec.record_activations(model, tokenizer, TEXTS, layers=[2])
    alone = pvec.record_activations(model, tokenizer, TEXTS, layers=[2], token_budget=1)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-5)


def test_a_chat_goes_through_the_template_and_nothing_is_added() -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    answered, open_end = pvec.record_activations(
        model, tokenizer, [CHAT, CHAT[:1]], layers=[NUM_LAYERS]
    )
    for recorded, chat, prompt in ((answered, CHAT, False), (open_end, CHAT[:1], True)):
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)
        assert recorded.token_ids == tuple(rendered["input_ids"])


def test_no_hook_stays_behind() -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    pvec.record_activations(model, tokenizer, TEXTS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_the_model_does_not_have_is_refused() -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    with pytest.raises(ModelError, match="Layer 99"):
        pvec.record_activations(model, tokenizer, TEXTS, layers=[99])
    with pytest.raises(InputError, match="has 0 tokens"):
        pvec.record_activations(model, tokenizer, [""])
    (recorded,) = pvec.record_activations(model, tokenizer, TEXTS[:1], layers=[1])
    with pytest.raises(InputError, match="Layer 2 was not recorded"):
        recorded.at(2)


def test_dropout_is_off_while_it_records_and_on_again_afterwards() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    calm = pvec.record_activations(model, tokenizer, TEXTS)
    model.train()
    recorded = pvec.record_activations(model, tokenizer, TEXTS)
    assert model.training
    assert all(module.training for module in model.modules())
    for one, other in zip(calm, recorded, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
