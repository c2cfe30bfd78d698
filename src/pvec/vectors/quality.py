"""How far a vector can be trusted, from random halves of the questions.

``totals[sign]`` are sums over responses by question, ``[Q, L + 1, H]``; ``counts[sign]`` ``[Q]``
the responses in them. Every result is one number per split and layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from pvec import stats
from pvec.stats import Interval
from pvec.vectors.projection import project

Sign = Literal["pos", "neg"]

SIGNS: tuple[Sign, ...] = ("pos", "neg")


def half_cosines(
    totals: Mapping[Sign, np.ndarray],
    counts: Mapping[Sign, np.ndarray],
    *,
    splits: int,
    seed: int,
) -> np.ndarray:
    """Return the cosine of the vectors from a half and from the other half, ``[splits, L + 1]``."""
    halves = list(_halves(len(counts["pos"]), splits=splits, seed=seed))
    cosines = np.full((len(halves), totals["pos"].shape[1]), np.nan)
    for n, half in enumerate(halves):
        one, two = (_half_vector(totals, counts, chosen) for chosen in (half, ~half))
        cosines[n] = _cosine_rows(one, two)
    return cosines


def held_out_areas(
    totals: Mapping[Sign, np.ndarray],
    counts: Mapping[Sign, np.ndarray],
    *,
    samples: Mapping[Sign, tuple[np.ndarray, np.ndarray]],
    splits: int,
    seed: int,
) -> np.ndarray:
    """Return the AUC on one half of the vector from the other half, ``[2 splits, L + 1]``.

    ``samples[sign]`` are question numbers ``[N]`` and activations ``[N, L + 1, H]`` of responses.
    """
    chosen = _halves(len(counts["pos"]), splits=splits, seed=seed)
    halves = [side for half in chosen for side in (half, ~half)]
    areas = np.full((len(halves), totals["pos"].shape[1]), np.nan)
    for n, half in enumerate(halves):
        vectors = _half_vector(totals, counts, half)
        held = {sign: samples[sign][1][~half[samples[sign][0]]] for sign in SIGNS}
        for layer, vector in enumerate(vectors):
            if vector.any():
                along = {sign: project(held[sign][:, layer], vector) for sign in SIGNS}
                areas[n, layer] = stats.auc(along["pos"], along["neg"])
    return areas


def over_splits(samples: np.ndarray, *, n: int, groups: int) -> list[Interval]:
    """Return, per layer, mean and central 95 % over the splits ``[splits, L + 1]``."""
    return [
        _over_splits(samples[:, layer], n=n, groups=groups) for layer in range(samples.shape[1])
    ]


def _halves(questions: int, *, splits: int, seed: int) -> Iterator[np.ndarray]:
    """Yield random halves of the questions, bool ``[Q]``; none when there is only one question."""
    if questions < 2:
        return
    rng = np.random.default_rng(seed)
    for _ in range(splits):
        half = np.zeros(questions, dtype=bool)
        half[rng.permutation(questions)[: questions // 2]] = True
        yield half


def _half_vector(
    totals: Mapping[Sign, np.ndarray], counts: Mapping[Sign, np.ndarray], chosen: np.ndarray
) -> np.ndarray:
    """Return the vector ``[L + 1, H]`` of the chosen questions' responses."""
    pos, neg = (
        np.tensordot(chosen.astype(np.float64), totals[sign], axes=1) / counts[sign][chosen].sum()
        for sign in SIGNS
    )
    difference: np.ndarray = pos - neg
    return difference


def _cosine_rows(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    dots = np.einsum("lh,lh->l", one, two)
    cosines: np.ndarray = np.full_like(dots, np.nan)
    np.divide(dots, lengths, out=cosines, where=lengths > 0)
    return cosines


def _over_splits(samples: np.ndarray, *, n: int, groups: int) -> Interval:
    """Return mean and central 95 % over random splits."""
    known = samples[~np.isnan(samples)]
    low, high = stats.percentile_interval(known)
    mean = float(known.mean()) if len(known) else float("nan")
    return Interval(mean=mean, low=low, high=high, n=n, groups=groups)
