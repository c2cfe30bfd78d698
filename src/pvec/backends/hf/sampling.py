"""Sampling whose randomness belongs to the request, not to the batch.

Every draw is one uniform number that is a pure function of (seed, step). The token is found by
inverting the cumulative distribution at that number, so the same request gives the same text in
any batch, in any order and after any restart; only a draw that falls on the edge between two tokens
at rounding level can differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pvec.types import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 18
"""Logits that are drawn from at once: 2 MiB in float64."""

_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def counter_uniforms(seeds: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """Return float64 ``[R]`` in [0, 1): the draw number ``steps[r]`` of stream ``seeds[r]``.

    Splitmix64 over a counter: the seed is mixed first so that neighbouring seeds are unrelated.
    """
    start = _mix(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))
    with np.errstate(over="ignore"):
        state = start + _GOLDEN * (np.asarray(steps, dtype=np.uint64) + np.uint64(1))
    uniforms: np.ndarray = (_mix(state) >> np.uint64(11)).astype(np.float64) / 2**53
    return uniforms


def _mix(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> _SHIFTS[0])) * _MIX_1
        state = (state ^ (state >> _SHIFTS[1])) * _MIX_2
    mixed: np.ndarray = state ^ (state >> _SHIFTS[2])
    return mixed


def sample_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], steps: Sequence[int]
) -> list[int]:
    """Return one token id per row of ``logits`` ``[R, V]``, each by its own sampling and step."""
    warm = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    chosen = [samplings[row] for row in warm]
    uniforms = counter_uniforms([s.seed for s in chosen], [steps[row] for row in warm])
    if len(warm) == len(samplings):
        tokens = _draw(logits, chosen, uniforms)  # [R]
    else:
        tokens = logits.argmax(dim=-1)
        if warm:
            tokens[warm] = _draw(logits[warm], chosen, uniforms)
    ids: list[int] = tokens.tolist()
    return ids


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: np.ndarray
) -> torch.Tensor:
    """Return a token per row, on a CPU a few rows at a time, so that they stay in its cache."""
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    count, vocabulary = logits.shape
    size = max(_BLOCK // vocabulary, 1) if logits.device.type == "cpu" else count
    return torch.cat(
        [
            _draw_block(logits[rows], samplings[rows], uniforms[rows])
            for rows in (slice(start, start + size) for start in range(0, max(count, 1), size))
        ]
    )


def _draw_block(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: np.ndarray
) -> torch.Tensor:
    device = logits.device
    scaled = logits.double()
    if any(s.temperature != 1 for s in samplings):
        temperature = torch.tensor([s.temperature for s in samplings], dtype=torch.float64)
        scaled = scaled / temperature.to(device)[:, None]
    weights = torch.softmax(scaled, dim=-1)  # [R, V]
    nuclear = [row for row, s in enumerate(samplings) if s.top_p < 1]
    if nuclear:
        top_p = torch.tensor([samplings[row].top_p for row in nuclear], dtype=torch.float64)
        weights[nuclear] = _nucleus(weights[nuclear], top_p.to(device))
    return _invert(weights, torch.from_numpy(uniforms).to(device))


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return ``probs`` ``[R, V]`` with zeros outside the smallest set of mass >= ``top_p``."""
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    # A token stays while the mass before it is less than top_p; the first one always does.
    outside = ordered.cumsum(dim=-1) - ordered >= top_p[:, None]
    outside[:, 0] = False
    return torch.zeros_like(probs).scatter_(1, tokens, ordered.masked_fill_(outside, 0.0))


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return the first index per row whose cumulative weight exceeds ``draws`` times the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, whatever the rounding: the index then always has weight.
    target = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
