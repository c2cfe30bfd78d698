"""How good a vector is, layer by layer: norms, separation, stability, and where to steer with it.

Separation (AUC) and stability (split-half cosine) come from random halves of the questions while
the vector is made, and are stored in its file; the table and the suggestions read them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pvec import stats
from pvec.stats import Interval
from pvec.types import SIGNS, Sign, VectorKind
from pvec.vectors.projection import project
from pvec.vectors.vector import DEFAULT_KIND, PersonaVector

SUGGESTED_DEPTHS = (0.3, 0.8)
PREFERRED_DEPTH = 0.55
"""Where steering works best in the paper's models, as a share of all layers."""

_TIE = 0.01
"""Scores within one percent of the best are equal."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quality figure with its central 95 % over random halves of the questions; NaN unknown."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of a vector.

    ``norm`` is its length, ``relative_norm`` the same in mean residual norms of that layer. ``auc``
    is how well projections tell held-out positive from negative responses (0.5: not at all),
    ``stability`` the cosine between vectors from two halves of the questions.
    """

    layer: int
    norm: float
    relative_norm: float
    auc: Spread
    stability: Spread


@dataclass(frozen=True, kw_only=True)
class VectorSummary:
    """What a person wants to know of a vector before steering with it."""

    layers: tuple[LayerRow, ...]
    suggested_layer: int | None
    reason: str
    counts: Mapping[Sign, int]


def summarize(vector: PersonaVector, *, kind: VectorKind = DEFAULT_KIND) -> VectorSummary:
    """Return what a vector file says of one of its kinds, layer by layer.

    The quality figures are of ``response_avg``. What the file does not hold is NaN; without mean
    residual norms no layer is suggested.
    """
    norms, relative = vector.norms(kind), vector.relative_norms(kind)
    rows = tuple(
        LayerRow(
            layer=layer,
            norm=float(norm),
            relative_norm=float(relative[layer]),
            auc=_spread(vector, "auc", layer),
            stability=_spread(vector, "stability", layer),
        )
        for layer, norm in enumerate(norms)
    )
    layer, reason = suggest_layer(vector, kind=kind)
    counts = {sign: _count(vector.metadata.get(f"kept_{sign}", "")) for sign in SIGNS}
    return VectorSummary(layers=rows, suggested_layer=layer, reason=reason, counts=counts)


def suggest_layer(
    vector: PersonaVector, *, kind: VectorKind = DEFAULT_KIND
) -> tuple[int | None, str]:
    """Return where to steer, and why in words: the best of the middle layers.

    Among layers from 30 % to 80 % of the depth, the score is (2 AUC − 1) · |v_l| / residual norm:
    a direction that tells kept responses apart on questions it was not made from, and that moves
    the residual stream far for its coefficient. Of layers within 1 % of the best the one nearest
    55 % depth is taken. Without separation (one question) the norm decides alone; without residual
    norms there is no suggestion (None).
    """
    if vector.mean_norm is None:
        return None, "the file holds no residual norms"
    norms = np.nan_to_num(vector.relative_norms(kind))
    areas = vector.stats.get("auc", np.full(len(norms), np.nan))
    known = not np.isnan(areas[1:]).all()
    weights = np.clip(2 * np.nan_to_num(areas, nan=0.5) - 1, 0, None) if known else 1.0
    middle, layer = _best_middle_layer(norms * weights)
    apart = f"separates held-out answers with AUC {areas[layer]:.2f} and " if known else ""
    return layer, (
        f"of the middle layers {middle[0]} to {middle[-1]} it {apart}has a vector of "
        f"{norms[layer]:.2f} residual norms"
    )


def best_layer(vector: PersonaVector, *, kind: VectorKind = DEFAULT_KIND) -> int:
    """Return the suggested layer, or the one at 55 % depth of a file without residual norms."""
    return suggest_layer(vector, kind=kind)[0] or middle_layer(vector)


def middle_layer(vector: PersonaVector) -> int:
    """Return the layer at 55 % of the depth, where steering works best as a rule."""
    return max(1, round(PREFERRED_DEPTH * vector.num_layers))


def suggest_prompt_layer(vector: PersonaVector, *, kind: VectorKind = DEFAULT_KIND) -> int | None:
    """Return the layer to read a prompt at before it is answered, or None where none tells.

    The kind ``prompt_last`` is how the last prompt token differs between prompts that ask for the
    trait and prompts that ask against it. Of the middle layers it is the one where they lie
    furthest apart along ``kind``, in mean residual norms. Known from extraction alone: no score of
    a monitored prompt has a part in it.
    """
    if vector.mean_norm is None or "prompt_last" not in vector.kinds:
        return None
    rows = np.asarray(vector.kind(kind), dtype=np.float64)
    along = np.einsum("lh,lh->l", np.asarray(vector.kind("prompt_last"), np.float64), rows)
    scale = np.linalg.norm(rows, axis=1) * vector.mean_norm
    apart: np.ndarray = np.zeros_like(along)
    np.divide(along, scale, out=apart, where=scale > 0)
    _, layer = _best_middle_layer(apart)
    return layer if apart[layer] > 0 else None


def half_cosines(
    totals: Mapping[Sign, np.ndarray],
    counts: Mapping[Sign, np.ndarray],
    *,
    splits: int,
    seed: int,
) -> np.ndarray:
    """Return the cosine of the vectors from a half and from the other half, ``[splits, L + 1]``.

    ``totals[sign]`` are sums over responses by question, ``[Q, L + 1, H]``; ``counts[sign]``
    ``[Q]`` the responses in them.
    """
    halves = list(random_halves(len(counts["pos"]), splits=splits, seed=seed))
    cosines = np.full((len(halves), totals["pos"].shape[1]), np.nan)
    for n, half in enumerate(halves):
        first, second = (_half_vector(totals, counts, chosen) for chosen in (half, ~half))
        cosines[n] = _cosine_rows(first, second)
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

    ``totals`` and ``counts`` as above; ``samples[sign]`` are question numbers ``[N]`` and
    activations ``[N, L + 1, H]`` of responses.
    """
    chosen = random_halves(len(counts["pos"]), splits=splits, seed=seed)
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


def stat_arrays(per_layer: Mapping[str, Sequence[Interval]]) -> dict[str, np.ndarray]:
    """Return figures with their intervals as vector files hold them: NAME, NAME_low, NAME_high."""
    return {
        f"{name}{suffix}": np.array([getattr(i, part) for i in intervals], dtype=np.float32)
        for name, intervals in per_layer.items()
        for part, suffix in (("mean", ""), ("low", "_low"), ("high", "_high"))
    }


def random_halves(questions: int, *, splits: int, seed: int) -> Iterator[np.ndarray]:
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


def _cosine_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    dots = np.einsum("lh,lh->l", first, second)
    cosines: np.ndarray = np.full_like(dots, np.nan)
    np.divide(dots, lengths, out=cosines, where=lengths > 0)
    return cosines


def _over_splits(samples: np.ndarray, *, n: int, groups: int) -> Interval:
    """Return mean and central 95 % over random splits."""
    known = samples[~np.isnan(samples)]
    low, high = stats.percentile_interval(known)
    mean = float(known.mean()) if len(known) else float("nan")
    return Interval(mean=mean, low=low, high=high, n=n, groups=groups)


def _best_middle_layer(scores: np.ndarray) -> tuple[list[int], int]:
    """Return the layers from 30 % to 80 % of the depth, and that of the highest of ``scores``
    ``[L + 1]`` among them; of those within 1 % of it the one nearest 55 % depth.
    """
    depth = len(scores) - 1
    middle = _middle_layers(depth)
    best = max(scores[layer] for layer in middle)
    tied = [layer for layer in middle if scores[layer] >= best - _TIE * abs(best)]
    return middle, min(tied, key=lambda layer: (abs(layer - PREFERRED_DEPTH * depth), layer))


def _middle_layers(depth: int) -> list[int]:
    low, high = (share * depth for share in SUGGESTED_DEPTHS)
    return [layer for layer in range(1, depth + 1) if low <= layer <= high] or [depth]


def _count(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _spread(vector: PersonaVector, name: str, layer: int) -> Spread:
    mean, low, high = (
        float(vector.stats[key][layer]) if key in vector.stats else float("nan")
        for key in (name, f"{name}_low", f"{name}_high")
    )
    return Spread(mean=mean, low=low, high=high)
