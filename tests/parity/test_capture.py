"""Captured means equal those of transformers' own hidden states, whatever the batch looks like."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pvec.activations.capture import capture_means
from pvec.types import SpanMeans, SpanName, TokenSpans
from tests.helpers.models import (
    ARCHITECTURES,
    HIDDEN_SIZE,
    NUM_LAYERS,
    SLIDING_WINDOW,
    tiny_model,
)

TOLERANCE = 1e-5


def rollouts(*, prompts: int = 3, answers: int = 4, seed: int = 0) -> list[TokenSpans]:
    """Several answers to each of several prompts; most are longer than the sliding window."""
    rng = random.Random(seed)
    sequences = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(5, 300) for _ in range(SLIDING_WINDOW + 4 + p % 2 * 5))
        for a in range(answers):
            answer = tuple(rng.randrange(5, 300) for _ in range(rng.randrange(1, 24)))
            sequences.append(spans_of(f"{p}-{a}", prompt, answer))
    return sequences


def spans_of(name: str, prompt: Sequence[int], answer: Sequence[int]) -> TokenSpans:
    start, stop = len(prompt), len(prompt) + len(answer)
    return TokenSpans(
        id=name,
        token_ids=(*prompt, *answer),
        spans={
            "prompt": (0, start),
            "prompt_last": (start - 1, start),
            "response": (start, stop),
        },
    )


def transformers_hidden_states(
    model: PreTrainedModel, sequence: TokenSpans, *, pad_left: int = 0, pad_right: int = 0
) -> torch.Tensor:
    """Return ``[L + 1, T, H]`` from transformers; the last row is taken before the final norm."""
    before_norm: list[torch.Tensor] = []
    norm = next(
        m for name, m in model.named_modules() if name.split(".")[-1] in NORMS and "." in name
    )
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    length = len(sequence.token_ids)
    ids = torch.tensor([(7,) * pad_left + sequence.token_ids + (7,) * pad_right])
    mask = torch.tensor([[0] * pad_left + [1] * length + [0] * pad_right])
    try:
        with torch.no_grad():
            states = model(
                ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                output_hidden_states=True,
            ).hidden_states
    finally:
        handle.remove()
    real = slice(pad_left, pad_left + length)
    return torch.cat([*states[:-1], before_norm[-1]])[:, real]


NORMS = ("norm", "ln_f", "final_layer_norm")
"""What the final norm is called in the architectures tested here."""


def expected(states: torch.Tensor, sequence: TokenSpans, span: SpanName) -> np.ndarray:
    start, stop = sequence.spans[span]
    return states[:, start:stop].double().mean(dim=1).numpy()


def assert_close(row: SpanMeans, sequence: TokenSpans, states: torch.Tensor) -> None:
    assert set(row.means) == set(sequence.spans)
    for span in sequence.spans:
        wanted = expected(states, sequence, span)[list(row.layers)]
        error = np.abs(row.means[span] - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
        assert error.max() <= TOLERANCE, f"{sequence.id} {span}: {error}"
        start, stop = sequence.spans[span]
        norms = states[:, start:stop].double().norm(dim=-1).mean(dim=1).numpy()[list(row.layers)]
        np.testing.assert_allclose(row.norms[span], norms, rtol=TOLERANCE)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def states(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {s.id: transformers_hidden_states(model, s) for s in rollouts()}


@pytest.mark.parametrize(
    ("token_budget", "share_prompts"),
    [(1, False), (60, False), (4096, False), (1, True), (60, True), (4096, True)],
    ids=str,
)
def test_means_equal_transformers_hidden_states(
    model: PreTrainedModel,
    states: dict[str, torch.Tensor],
    token_budget: int,
    share_prompts: bool,
) -> None:
    sequences = {s.id: s for s in rollouts()}
    rows = list(
        capture_means(
            model, sequences.values(), token_budget=token_budget, share_prompts=share_prompts
        )
    )
    assert sorted(row.id for row in rows) == sorted(sequences)
    for row in rows:
        assert row.layers == tuple(range(NUM_LAYERS + 1))
        assert_close(row, sequences[row.id], states[row.id])


def test_padding_on_either_side_of_the_reference_makes_no_difference(
    model: PreTrainedModel,
) -> None:
    sequences = {s.id: s for s in rollouts(prompts=2, answers=2)}
    for row in capture_means(model, sequences.values()):
        sequence = sequences[row.id]
        for pads in ({"pad_left": 5}, {"pad_right": 6}):
            assert_close(row, sequence, transformers_hidden_states(model, sequence, **pads))


def test_chosen_layers_are_the_rows_of_all_layers(model: PreTrainedModel) -> None:
    sequences = rollouts()
    everything = {row.id: row for row in capture_means(model, sequences)}
    for layers in ([2], [0], [1, 0], [NUM_LAYERS]):
        for row in capture_means(model, sequences, layers=layers):
            assert row.layers == tuple(layers)
            for span, means in row.means.items():
                np.testing.assert_allclose(
                    means, everything[row.id].means[span][layers], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_projected_as_transformers_has_them(name: str) -> None:
    """Each response token at once, whatever the batch, with and without a shared prompt."""
    model = tiny_model(name)
    layers, rng = (0, 2, NUM_LAYERS), np.random.default_rng(4)
    directions = rng.normal(size=(len(layers), 2, HIDDEN_SIZE))
    sequences = {s.id: s for s in [*rollouts(), spans_of("empty", (5, 6, 7), ())]}
    for share in (True, False):
        captured = capture_means(
            model,
            sequences.values(),
            layers=layers,
            token_budget=150,
            share_prompts=share,
            directions=directions,
        )
        for row in captured:
            states = transformers_hidden_states(model, sequences[row.id])[list(layers)].numpy()
            start, stop = sequences[row.id].spans["response"]
            expected = np.einsum("lth,lvh->tlv", states[:, start:stop], directions)
            assert row.along is not None
            assert row.along.shape == expected.shape
            np.testing.assert_allclose(row.along, expected, rtol=1e-4, atol=2e-4)
            if stop > start:
                means = np.einsum("lh,lvh->lv", row.means["response"], directions)
                np.testing.assert_allclose(row.along.mean(axis=0), means, rtol=1e-4, atol=2e-5)
