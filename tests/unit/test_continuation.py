"""Continuation log-probabilities against a plain forward pass per continuation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig, PreTrainedModel

from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.forward import CausalModel
from pvec.errors import ModelError
from pvec.types import Request, Sampling

COMMON = tuple(random.Random(3).randrange(5, 400) for _ in range(20))


def random_prompts(count: int, *, start: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    rng = random.Random(1)
    return [
        start + tuple(rng.randrange(5, 400) for _ in range(rng.randrange(1, 20)))
        for _ in range(count)
    ]


def number_continuations() -> list[tuple[int, ...]]:
    """The digits of 0 … 40 and 100, each with an end of turn: the shape of a judge's tree."""
    digits = [tuple(9 + int(d) for d in str(n)) for n in (*range(41), 100)]
    return [(*number, 2) for number in digits]


def plain_logprobs(
    model: torch.nn.Module, prompt: tuple[int, ...], continuations: Sequence[tuple[int, ...]]
) -> list[float]:
    found = []
    with torch.no_grad():
        for continuation in continuations:
            logits = model(torch.tensor([prompt + continuation])).logits[0].double()
            logprobs = logits.log_softmax(dim=-1)
            start = len(prompt) - 1
            found.append(sum(float(logprobs[start + k, t]) for k, t in enumerate(continuation)))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("start", [(), COMMON], ids=["apart", "shared-beginning"])
def test_the_tree_equals_one_pass_per_continuation(
    architecture: str, start: tuple[int, ...]
) -> None:
    model = tiny_model(architecture)
    prompts = random_prompts(5, start=start)
    continuations = [(9,), (9, 10), (9, 10, 11), (12, 9), (10, 2), (9, 10, 11), (300, 5, 7, 9)]
    backend = HFBackend.wrap(model, tiny_tokenizer(), batch_size=3)
    scores = dict(backend.continuation_logprobs(prompts, continuations))
    assert sorted(scores) == list(range(5))
    for index, prompt in enumerate(prompts):
        expected = plain_logprobs(model, prompt, continuations)
        np.testing.assert_allclose(scores[index], expected, rtol=1e-5, atol=2e-5)
        assert scores[index].dtype == np.float32


def test_a_judges_digit_tree_is_exact_and_its_numbers_are_probabilities() -> None:
    model = tiny_model("qwen2")
    prompts, continuations = random_prompts(3, start=COMMON), number_continuations()
    scores = dict(
        HFBackend.wrap(model, tiny_tokenizer()).continuation_logprobs(prompts, continuations)
    )
    for index, prompt in enumerate(prompts):
        expected = plain_logprobs(model, prompt, continuations)
        np.testing.assert_allclose(scores[index], expected, rtol=1e-5, atol=2e-5)
        assert 0 < np.exp(scores[index]).sum() < 1


def test_all_single_tokens_sum_to_one() -> None:
    backend = HFBackend.wrap(tiny_model("llama"), tiny_tokenizer())
    [(_, scores)] = backend.continuation_logprobs([(5, 6, 7)], [(t,) for t in range(400)])
    assert np.exp(scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_the_common_beginning_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forward = CausalModel.forward

    def spy(self: CausalModel, token_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        widths.append(token_ids.numel())
        return forward(self, token_ids, **rest)

    monkeypatch.setattr(CausalModel, "forward", spy)
    backend = HFBackend.wrap(tiny_model("qwen2"), tiny_tokenizer(), batch_size=2)
    list(backend.continuation_logprobs([(*COMMON, k, 7) for k in range(5, 11)], [(9, 2)]))
    assert widths == [20, 2, 4, 2, 4, 2, 4]  # beginning, then last body token and nodes


def test_out_of_memory_halves_the_prompts_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []
    backend = HFBackend.wrap(tiny_model("qwen2"), tiny_tokenizer(), batch_size=8)
    backend.on_note = notes.append
    prompts, continuations = random_prompts(9, start=COMMON), number_continuations()
    reference = dict(backend.continuation_logprobs(prompts, continuations))
    forward = CausalModel.forward

    def scarce(self: CausalModel, token_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        if token_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, token_ids, **rest)

    monkeypatch.setattr(CausalModel, "forward", scarce)
    scores = dict(backend.continuation_logprobs(prompts, continuations))
    assert sorted(scores) == list(range(9))
    for index, expected in reference.items():
        np.testing.assert_allclose(scores[index], expected, rtol=1e-5, atol=2e-5)
    assert [note.split(":")[0] for note in notes] == [
        "out of memory with 8 prompts",
        "out of memory with 4 prompts",
    ]


def test_a_prompt_that_does_not_fit_is_refused_by_its_number() -> None:
    backend = HFBackend.wrap(tiny_model("qwen2"), tiny_tokenizer())
    with pytest.raises(ModelError, match="Prompt 1 has 256 tokens"):
        list(backend.continuation_logprobs([(5,), (5,) * 256], [(9, 2)]))


def _state_space_model(kind: str) -> PreTrainedModel:
    """A tiny model whose layers keep more than keys and values: convolutions, or states only."""
    common = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
    config: Any
    if kind == "mamba":
        config = MambaConfig(**common, state_size=4)
    else:
        config = Lfm2Config(
            **common,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"],
        )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_models_with_a_recurrent_state_score_continuations_as_one_pass_each(kind: str) -> None:
    model = _state_space_model(kind)
    prompts = random_prompts(3, start=COMMON)
    continuations = [(9,), (9, 10), (9, 10, 11), (12, 9), (300, 5, 7, 9)]
    backend = HFBackend.wrap(model, tiny_tokenizer(), batch_size=2)
    scores = dict(backend.continuation_logprobs(prompts, continuations))
    for index, prompt in enumerate(prompts):
        expected = plain_logprobs(model, prompt, continuations)
        np.testing.assert_allclose(scores[index], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_models_with_a_recurrent_state_answer_as_the_model_without_a_cache(kind: str) -> None:
    """Prompts of two lengths, more of them than fit: rows leave transformers' own cache."""
    model = _state_space_model(kind)
    backend = HFBackend.wrap(model, tiny_tokenizer(), batch_size=2)
    prompts = [
        p[:length]
        for p, length in zip(random_prompts(5, start=COMMON), (9, 14, 9, 14, 9), strict=True)
    ]
    requests = [
        Request(
            id=str(number),
            prompt_ids=prompt,
            sampling=Sampling(temperature=0.0, max_tokens=3 + 2 * number),
        )
        for number, prompt in enumerate(prompts)
    ]
    answers = {answer.id: answer for answer in backend.generate(requests)}
    for request in requests:
        ids = list(request.prompt_ids)
        for token in answers[request.id].token_ids:
            with torch.no_grad():
                best = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            assert token == best
            ids.append(token)
        assert len(ids) > len(request.prompt_ids)
