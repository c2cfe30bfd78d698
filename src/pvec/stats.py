"""Numbers with their uncertainty: means, differences, separation and correlation.

Answers to one question are not independent, so intervals resample questions, not answers. Missing
values (None or NaN) are left out and counted. Everything is deterministic under its seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats as scipy_stats

from pvec.errors import InputError

LEVEL = 0.95
"""Coverage of every interval that is shown."""

Values = Sequence[float | None] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval (NaN when it cannot be known) and what it rests on.

    ``n`` values were used, from ``groups`` questions; ``missing`` were left out.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int
    missing: int = 0


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A correlation of ``n`` pairs with its 95 % interval; ``missing`` pairs were left out."""

    r: float
    low: float
    high: float
    n: int
    missing: int


def bootstrap_mean(
    values: Values, *, groups: Sequence[Hashable], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean over values with a percentile interval by bootstrap over groups.

    The interval is NaN for fewer than two groups: one question says nothing about others.
    """
    sums, counts, missing = _group_sums(values, groups)
    draws = _resample(len(sums), resamples=resamples, seed=seed)
    low, high = percentile_interval(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    n = int(counts.sum())
    mean = float(sums.sum() / n) if n else float("nan")
    return Interval(mean=mean, low=low, high=high, n=n, groups=len(sums), missing=missing)


def paired_difference(
    values: Values,
    *,
    groups: Sequence[Hashable],
    baseline: Values,
    baseline_groups: Sequence[Hashable],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return mean(values) − mean(baseline) over the questions that both have.

    Questions are resampled together on both sides, which is what makes the difference paired.
    ``n`` counts the values of the first side; ``missing`` counts what was left out of either side,
    values of questions that only one side has included.
    """
    both = _common(values, groups, baseline, baseline_groups)
    one, one_counts, one_missing = _group_sums(values, groups, only=both)
    two, two_counts, two_missing = _group_sums(baseline, baseline_groups, only=both)
    draws = _resample(len(both), resamples=resamples, seed=seed)
    low, high = percentile_interval(
        one[draws].sum(axis=1) / one_counts[draws].sum(axis=1)
        - two[draws].sum(axis=1) / two_counts[draws].sum(axis=1)
    )
    mean = one.sum() / one_counts.sum() - two.sum() / two_counts.sum() if both else float("nan")
    return Interval(
        mean=float(mean),
        low=low,
        high=high,
        n=int(one_counts.sum()),
        groups=len(both),
        missing=one_missing + two_missing,
    )


def auc(positive: Values, negative: Values) -> float:
    """Return P(positive > negative), ties counting half; NaN when a side is empty."""
    one, two = _present(positive), _present(negative)
    if not len(one) or not len(two):
        return float("nan")
    ranks = scipy_stats.rankdata(np.concatenate([one, two]))
    wins = ranks[: len(one)].sum() - len(one) * (len(one) + 1) / 2
    return float(wins / (len(one) * len(two)))


def correlation(
    x: Values, y: Values, *, method: Literal["pearson", "spearman"] = "pearson"
) -> Correlation:
    """Return the correlation of pairs with an interval by Fisher's z.

    For ranks the standard error of z is that of Bonett and Wright, sqrt((1 + r^2 / 2) / (n - 3)).
    NaN when fewer than two pairs remain or a side is constant.
    """
    one, two, missing = _pairs(x, y)
    if method == "spearman" and len(one):
        one, two = scipy_stats.rankdata(one), scipy_stats.rankdata(two)
    r = _pearson(one, two)
    spread = 1.0 + r * r / 2 if method == "spearman" else 1.0
    low, high = _fisher(r, freedom=len(one) - 3, spread=spread)
    return Correlation(r=r, low=low, high=high, n=len(one), missing=missing)


def within_group_correlation(x: Values, y: Values, groups: Sequence[Hashable]) -> Correlation:
    """Return the Pearson correlation after subtracting each group's means from both sides.

    What the groups differ in (a question that is evil by itself) cannot produce it. The interval
    is Fisher's with one degree of freedom less for each group after the first.
    """
    keep = ~(np.isnan(_array(x)) | np.isnan(_array(y)))
    one, two, missing = _pairs(x, y)
    codes = _codes([g for g, k in zip(groups, keep, strict=True) if k])
    number = int(codes.max()) + 1 if len(codes) else 0
    r = _pearson(_centred(one, codes), _centred(two, codes))
    low, high = _fisher(r, freedom=len(one) - (number - 1) - 3, spread=1.0)
    return Correlation(r=r, low=low, high=high, n=len(one), missing=missing)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the central 95 % of samples; NaN for none."""
    if not len(samples):
        return float("nan"), float("nan")
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def _array(values: Values) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _present(values: Values) -> np.ndarray:
    array = _array(values)
    present: np.ndarray = array[~np.isnan(array)]
    return present


def _pairs(x: Values, y: Values) -> tuple[np.ndarray, np.ndarray, int]:
    one, two = _array(x), _array(y)
    if len(one) != len(two):
        raise InputError(f"Correlation needs pairs but got {len(one)} and {len(two)} values.")
    keep = ~(np.isnan(one) | np.isnan(two))
    return one[keep], two[keep], int((~keep).sum())


def _codes(groups: Sequence[Hashable]) -> np.ndarray:
    """Number groups in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.int64)


def _common(
    values: Values,
    groups: Sequence[Hashable],
    baseline: Values,
    baseline_groups: Sequence[Hashable],
) -> list[Hashable]:
    """Return the groups with a value on both sides, in the first side's order."""
    have = {g for g, v in zip(baseline_groups, _array(baseline), strict=True) if not np.isnan(v)}
    return list(
        dict.fromkeys(
            g for g, v in zip(groups, _array(values), strict=True) if not np.isnan(v) and g in have
        )
    )


def _group_sums(
    values: Values, groups: Sequence[Hashable], *, only: Sequence[Hashable] | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return per-group sums, per-group counts and how many values were left out."""
    array = _array(values)
    if len(array) != len(groups):
        raise InputError(f"Got {len(array)} values for {len(groups)} questions: give one for each.")
    chosen = None if only is None else set(only)
    keep = ~np.isnan(array)
    if chosen is not None:
        keep &= np.array([g in chosen for g in groups], dtype=bool)
    kept = [g for g, k in zip(groups, keep, strict=True) if k]
    codes = _codes(kept) if only is None else _codes([*only, *kept])[len(only) :]
    number = int(codes.max()) + 1 if len(codes) else 0
    sums = np.bincount(codes, weights=array[keep], minlength=number)
    counts = np.bincount(codes, minlength=number)
    return sums, counts, int((~keep).sum())


def _resample(groups: int, *, resamples: int, seed: int) -> np.ndarray:
    """Return group numbers drawn with replacement, ``[resamples, groups]``."""
    if groups < 2:
        return np.zeros((0, groups), dtype=np.int64)  # one question says nothing about others
    return np.random.default_rng(seed).integers(groups, size=(resamples, groups))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _fisher(r: float, *, freedom: int, spread: float) -> tuple[float, float]:
    if np.isnan(r) or freedom < 1:
        return float("nan"), float("nan")
    if abs(r) >= 1.0:
        return r, r
    half = scipy_stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(spread / freedom)
    z = np.arctanh(r)
    return float(np.tanh(z - half)), float(np.tanh(z + half))


def _centred(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    if not len(values):
        return values
    means = np.bincount(codes, weights=values) / np.bincount(codes)
    centred = values - means[codes]
    return np.where(np.abs(centred) < 1e-12 * (np.abs(values).max() or 1.0), 0.0, centred)
