"""Screening training data by projection difference (paper, section 5 and appendix on its cost).

The difference of a sample is the projection of its response minus that of the model's own response
to the same prompt. Everything here is numbers: rows are samples, columns are vectors by layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pvec.stats import Interval, auc, bootstrap_mean

Natural = Literal["generate", "subset", "prompt"]
"""Where a sample's natural projection comes from: generated; generated for a share of the prompts
and predicted for the others from the last prompt token; or that token's projection itself."""


@dataclass(frozen=True, kw_only=True)
class DatasetScore:
    """A data set on one vector at one layer.

    ``mean`` is its mean difference with a 95 % interval over prompts, ``reference`` that of the
    clean set. ``auc`` says how well differences tell the two apart. Samples above ``threshold``
    (the percentile of the clean set) are ``above``. What needs a clean set is None without one.
    """

    mean: Interval
    reference: Interval | None = None
    auc: float | None = None
    threshold: float | None = None
    above: int = 0


def score_dataset(
    differences: np.ndarray,
    *,
    prompts: Sequence[Hashable],
    clean: np.ndarray | None,
    clean_prompts: Sequence[Hashable] = (),
    percentile: float = 95.0,
) -> DatasetScore:
    """Score the differences ``[n]`` of a data set, beside those of a clean one. NaN is missing."""
    mean = bootstrap_mean(differences, groups=prompts)
    if clean is None:
        return DatasetScore(mean=mean)
    threshold = float(np.nanpercentile(clean, percentile))
    return DatasetScore(
        mean=mean,
        reference=bootstrap_mean(clean, groups=clean_prompts),
        auc=auc(differences, clean),
        threshold=threshold,
        above=int((differences > threshold).sum()),
    )


def predict_natural(
    known: np.ndarray, at_prompt: np.ndarray, *, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict natural projections from those of the last prompt token, by a line per column.

    ``known`` ``[n, C]`` holds generated ones in ``rows`` (bool ``[n]``) and is not read elsewhere;
    ``at_prompt`` is ``[n, C]``. Returns the predictions for every row, and for ``rows`` those of a
    line fitted without the row's own half, which tells what the prediction is worth.
    """
    places = np.flatnonzero(rows)
    half = np.arange(len(places)) % 2 == 0
    every, crossed = np.empty_like(at_prompt), np.empty((len(places), at_prompt.shape[1]))
    for column in range(at_prompt.shape[1]):
        x, y = at_prompt[places, column], known[places, column]
        every[:, column] = _line(x, y, at_prompt[:, column])
        for side in (half, ~half):
            crossed[side, column] = _line(x[~side], y[~side], x[side])
    return every, crossed


def _line(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the least-squares line through finite points, read at ``at``."""
    good = np.isfinite(x) & np.isfinite(y)
    if good.sum() < 3 or np.ptp(x[good]) == 0:
        value = y[good].mean() if good.any() else np.nan
        return np.full(len(at), value)
    slope, offset = np.polyfit(x[good], y[good], 1)
    line: np.ndarray = slope * at + offset
    return line
