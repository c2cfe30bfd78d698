from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pvec.backends.hf import sampling
from pvec.backends.hf.sampling import counter_uniforms, sample_tokens
from pvec.types import Sampling

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.5, 0.0, -3.0, 1.0, 0.2])


def draw(like: Sampling, *, count: int) -> np.ndarray:
    """Sample ``count`` tokens from LOGITS, each as step 0 of a seed of its own."""
    samplings = [
        Sampling(temperature=like.temperature, top_p=like.top_p, seed=seed) for seed in range(count)
    ]
    return np.array(sample_tokens(LOGITS.expand(count, -1), samplings, [0] * count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax_of_the_tempered_logits(temperature: float) -> None:
    count = 20_000
    observed = np.bincount(draw(Sampling(temperature=temperature), count=count), minlength=8)
    expected = torch.softmax(LOGITS.double() / temperature, dim=0).numpy() * count
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_the_uniforms_are_uniform_over_seeds_and_over_steps_and_uncorrelated() -> None:
    over_seeds = counter_uniforms(range(20_000), [3] * 20_000)
    over_steps = counter_uniforms([7] * 20_000, range(20_000))
    for uniforms in (over_seeds, over_steps):
        assert stats.kstest(uniforms, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(uniforms[:-1], uniforms[1:])[0, 1]) < 0.03
    # The stream of seed s at step t + 1 must not be that of seed s + 1 at step t.
    first, second = (counter_uniforms([seed] * 50, range(50)) for seed in (1, 2))
    assert not np.isin(first, second).any()


def test_a_draw_depends_on_seed_and_step_only() -> None:
    together = counter_uniforms([5, 9, 5], [0, 4, 2])
    alone = [counter_uniforms([seed], [step])[0] for seed, step in ((5, 0), (9, 4), (5, 2))]
    assert together.tolist() == alone
    assert len(set(alone)) == 3


def test_seeds_of_any_size_and_sign_are_accepted() -> None:
    uniforms = counter_uniforms([0, -1, 2**63, 2**70 + 3], [0] * 4)
    assert len(set(uniforms.tolist())) == 4
    assert ((uniforms >= 0) & (uniforms < 1)).all()


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_top_p_keeps_the_smallest_set_with_that_mass_and_its_proportions(top_p: float) -> None:
    probs = torch.softmax(LOGITS.double(), dim=0).numpy()
    order = np.argsort(-probs)
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    kept = order[:size]
    count = 20_000
    observed = np.bincount(draw(Sampling(top_p=top_p), count=count), minlength=8)
    assert set(np.flatnonzero(observed)) == set(kept)
    if size > 1:
        expected = probs[kept] / probs[kept].sum() * count
        assert stats.chisquare(observed[kept], expected).pvalue > 1e-3


def test_temperature_zero_is_the_argmax_even_beside_warm_rows() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(temperature=0.0 if row % 2 else 1.0, seed=row) for row in range(6)]
    tokens = sample_tokens(logits, samplings, [0] * 6)
    for row in (1, 3, 5):
        assert tokens[row] == int(logits[row].argmax())


@pytest.mark.parametrize("block", [1, 100, 1 << 18])
def test_a_row_is_sampled_the_same_beside_any_other_rows(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", block)
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    samplings = [
        Sampling(temperature=0.7, top_p=0.8, seed=1),
        Sampling(temperature=0.0),
        Sampling(temperature=1.3, seed=2),
        Sampling(temperature=1.0, top_p=0.5, seed=3),
        Sampling(temperature=1.0, seed=4),
    ]
    steps = [0, 3, 1, 7, 2]
    together = sample_tokens(logits, samplings, steps)
    alone = [
        sample_tokens(logits[row : row + 1], [samplings[row]], [steps[row]])[0] for row in range(5)
    ]
    assert together == alone


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.full((200, 6), -torch.inf)
    logits[:, 2] = 0.0
    tokens = sample_tokens(logits, [Sampling(seed=s) for s in range(200)], [0] * 200)
    assert set(tokens) == {2}
