"""Which layer to steer at, or to read prompts at, from what a vector's own extraction measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SUGGESTED_DEPTHS = (0.3, 0.8)
PREFERRED_DEPTH = 0.55
"""Where steering works best in the paper's models, as a share of all layers."""

_TIE = 0.01
"""Scores within one percent of the best are equal."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A layer to steer at, and why in one sentence."""

    layer: int
    reason: str


class Measured(Protocol):
    """A quality figure of one layer, with whatever spread; NaN when unknown."""

    @property
    def mean(self) -> float:
        """The figure itself."""


def suggest_layer(
    vectors: np.ndarray, *, mean_norm: np.ndarray, separation: Sequence[Measured] | None = None
) -> Suggestion:
    """Return where to steer: the best of the middle layers, by separation and dose.

    Among layers from 30 % to 80 % of the depth, the score is (2 AUC − 1) · |v_l| / residual norm:
    a direction that tells kept responses apart on questions it was not made from, and that moves
    the residual stream far for its coefficient. Of layers within 1 % of the best the one nearest
    55 % depth is taken. Without separation (one question) the dose decides alone.
    """
    depth = len(vectors) - 1
    doses = dose(vectors, mean_norm)
    areas = [float("nan")] * (depth + 1) if separation is None else [s.mean for s in separation]
    known = not np.isnan(areas[1:]).all()
    weights = np.clip(2 * np.nan_to_num(np.array(areas), nan=0.5) - 1, 0, None) if known else 1.0
    middle, layer = _best_middle_layer(doses * weights)
    apart = f"separates held-out answers with AUC {areas[layer]:.2f} and " if known else ""
    reason = (
        f"of the middle layers {middle[0]} to {middle[-1]} it {apart}has a vector of "
        f"{doses[layer]:.2f} residual norms"
    )
    return Suggestion(layer=layer, reason=reason)


def suggest_prompt_layer(
    vectors: np.ndarray, *, at_prompt: np.ndarray, mean_norm: np.ndarray
) -> int | None:
    """Return the layer to read a prompt at before it is answered, or None where none tells.

    ``at_prompt`` ``[L + 1, H]`` is how the last prompt token differs between prompts that ask for
    the trait and prompts that ask against it (a vector file's ``prompt_last``). Of the middle
    layers it is the one where they lie furthest apart along ``vectors`` ``[L + 1, H]``, in mean
    residual norms. Known from extraction alone: no score of a monitored prompt has a part in it.
    """
    lengths = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=1)
    along = np.einsum("lh,lh->l", np.asarray(at_prompt, np.float64), np.asarray(vectors))
    apart: np.ndarray = np.zeros_like(lengths)
    np.divide(along, lengths * mean_norm, out=apart, where=(lengths > 0) & (mean_norm > 0))
    _, layer = _best_middle_layer(apart)
    return layer if apart[layer] > 0 else None


def dose(vectors: np.ndarray, mean_norm: np.ndarray) -> np.ndarray:
    """Return ``|v_l|`` in units of the mean residual norm, per layer ``[L + 1]``."""
    lengths = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=1)
    doses: np.ndarray = np.zeros_like(lengths)
    np.divide(lengths, mean_norm, out=doses, where=mean_norm > 0)
    return doses


def _best_middle_layer(scores: np.ndarray) -> tuple[list[int], int]:
    """Return the layers from 30 % to 80 % of the depth, and that of the highest of ``scores``
    ``[L + 1]`` among them; of those within 1 % of it the one nearest 55 % depth.
    """
    depth = len(scores) - 1
    middle = _middle_layers(depth)
    best = max(scores[layer] for layer in middle)
    tied = [layer for layer in middle if scores[layer] >= best - _TIE * abs(best)]
    return middle, min(tied, key=lambda one: (abs(one - PREFERRED_DEPTH * depth), one))


def _middle_layers(depth: int) -> list[int]:
    low, high = (share * depth for share in SUGGESTED_DEPTHS)
    return [layer for layer in range(1, depth + 1) if low <= layer <= high] or [depth]
