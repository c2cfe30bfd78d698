"""KL divergence on given text against scipy on the logits of transformers under a plain hook."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer
from scipy.stats import entropy
from transformers import PreTrainedModel

from pvec.backends.base import Backend
from pvec.backends.hf.backend import HFBackend
from pvec.errors import InputError, ModelError
from pvec.models.chat import spans_from_ids
from pvec.models.decoder import find_decoder
from pvec.types import Instruction, TokenSpans

PROMPT = tuple(random.Random(1).randrange(5, 400) for _ in range(9))
LONGER = (*PROMPT, 17, 23)
ANSWER = tuple(random.Random(2).randrange(5, 400) for _ in range(12))


def instruction(positions: Any, coef: float, layer: int = 2) -> Instruction:
    vector = np.random.default_rng(0).standard_normal(HIDDEN_SIZE).astype(np.float32)
    return Instruction(vector=vector, layer=layer, coef=coef, positions=positions)


def spans(identity: str, *steering: Instruction, prompt: tuple[int, ...] = PROMPT) -> TokenSpans:
    return spans_from_ids(identity, prompt_ids=prompt, answer_ids=ANSWER, steering=steering)


def plain_probabilities(model: PreTrainedModel, row: TokenSpans) -> np.ndarray:
    """Return the distribution at every answer token, ``[T, V]``, steered by a hook of our own."""
    start = row.spans["response"][0]
    ids = torch.tensor([row.token_ids])
    handles = []
    for steered in row.steering:
        tokens = {
            "all": slice(None), "prompt": slice(0, start), "response": slice(start - 1, None)
        }[steered.positions]  # fmt: skip
        added = torch.from_numpy(steered.vector) * steered.coef

        def hook(
            _m: Any, _a: Any, output: Any, tokens: slice = tokens, added: torch.Tensor = added
        ) -> Any:
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, tokens] += added
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        block = find_decoder(model).blocks[steered.layer - 1]
        handles.append(block.register_forward_hook(hook))
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1 : -1].double()
    for handle in handles:
        handle.remove()
    return logits.softmax(dim=-1).numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_divergences_are_those_of_scipy_on_plain_forward_passes(architecture: str) -> None:
    model = tiny_model(architecture)
    backend = HFBackend.wrap(model, tiny_tokenizer(), batch_size=3)
    variants = [
        spans("unsteered"),
        *(spans(f"{p} {c}", instruction(p, c)) for p in ("all", "prompt", "response")
          for c in (-2.0, 3.0)),
        spans("two layers", instruction("response", 1.0, 1), instruction("all", -2.0, 3)),
        spans("another prompt", prompt=LONGER),
        spans("another prompt, steered", instruction("response", 2.0), prompt=LONGER),
    ]  # fmt: skip
    results = {d.id: d for d in backend.divergences(spans("reference"), variants)}
    assert set(results) == {variant.id for variant in variants}
    target = plain_probabilities(model, spans("reference"))
    for variant in variants:
        own = plain_probabilities(model, variant)
        result = results[variant.id]
        np.testing.assert_allclose(result.kl, entropy(target, own, axis=1), rtol=2e-3, atol=2e-6)
        chosen = np.log(own[np.arange(len(ANSWER)), list(ANSWER)])
        np.testing.assert_allclose(result.logprobs, chosen, rtol=1e-4, atol=1e-5)
    assert results["unsteered"].kl.max() < 1e-6
    assert results["response -2.0"].kl.mean() > 1e-3, "the steering does something"


def test_texts_that_cannot_be_compared_are_refused() -> None:
    backend = HFBackend.wrap(tiny_model("qwen2"), tiny_tokenizer())
    other = spans_from_ids("other", prompt_ids=PROMPT, answer_ids=ANSWER[:-1])
    with pytest.raises(ModelError, match="different responses"):
        list(backend.divergences(spans("reference"), [other]))
    empty = spans_from_ids("empty", prompt_ids=PROMPT, answer_ids=())
    with pytest.raises(ModelError, match="no response"):
        list(backend.divergences(empty, [empty]))
    long = spans("long", prompt=PROMPT * 1000)
    with pytest.raises(ModelError, match="context"):
        list(backend.divergences(spans("reference"), [long]))


def test_a_backend_without_distributions_says_so() -> None:
    backend = HFBackend.wrap(tiny_model("qwen2"), tiny_tokenizer())
    with pytest.raises(InputError, match="--backend hf"):
        Backend.divergences(backend, spans("reference"), [])
