"""Log-probabilities of answers' tokens against one plain forward pass per pair."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, tiny_model, tiny_tokenizer

from pvec.backends.base import Backend
from pvec.backends.hf.backend import HFBackend
from pvec.errors import ModelError

Pair = tuple[tuple[int, ...], tuple[int, ...]]


def random_pairs() -> list[Pair]:
    """Four prompts of different lengths, each with answers of one token and of many."""
    rng = random.Random(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 400) for _ in range(count))

    prompts = [ids(length) for length in (1, 7, 7, 23)]
    return [(prompt, ids(length)) for length in (1, 12, 5) for prompt in prompts]


def plain(model: torch.nn.Module, pair: Pair) -> list[float]:
    prompt, answer = pair
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(dim=-1)
    return [float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(answer)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [3, 64])
def test_answers_that_share_prompts_score_as_one_pass_each_does(
    architecture: str, rows: int
) -> None:
    model, pairs = tiny_model(architecture), random_pairs()
    backend = HFBackend.wrap(model, tiny_tokenizer(), batch_size=rows)
    scores = dict(backend.answer_logprobs(pairs))
    assert sorted(scores) == list(range(len(pairs)))
    for index, pair in enumerate(pairs):
        np.testing.assert_allclose(scores[index], plain(model, pair), rtol=1e-5, atol=2e-5)


def test_a_backend_without_its_own_way_gives_the_same() -> None:
    model, pairs = tiny_model(), random_pairs()
    backend = HFBackend.wrap(model, tiny_tokenizer())
    for index, scores in Backend.answer_logprobs(backend, pairs):
        np.testing.assert_allclose(scores, plain(model, pairs[index]), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("pair", [((), (7,)), ((7,), ()), ((7,) * 600, (8,) * 600)])
def test_what_cannot_be_scored_is_one_sentence(pair: Pair) -> None:
    backend = HFBackend.wrap(tiny_model(), tiny_tokenizer())
    with pytest.raises(ModelError, match=r"empty|context"):
        list(backend.answer_logprobs([pair]))
