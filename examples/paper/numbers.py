"""Numbers over seeds, and when a figure agrees with the paper.

A seed repeats everything that is random, from the answers that a vector is made of to the order of
the training rows. A headline number is its mean over seeds with a 95 % interval by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from pvec.stats import LEVEL, Interval

_ALMOST = 0.999999
"""A correlation of 1 has no finite transform."""

Verdict = Literal["agrees", "disagrees", "cannot tell"]
Outcome = Literal["agrees", "disagrees", "cannot tell", "same side", "other side"]
"""A verdict; with one seed, which has no interval and so no verdict, the side on which the number
lies.
"""

RULE = (
    "A check agrees when the whole interval lies on the paper's side of its bound, disagrees when "
    "all of it lies on the other side, and cannot tell otherwise. A figure agrees when all its "
    "checks do, and disagrees when one does. A single seed has no interval and gives no verdict: "
    "then the side of its bound is given on which a number lies."
)


def over_seeds(values: Sequence[float], *, r: bool = False) -> Interval:
    """Return the mean over seeds with its interval; NaN bounds for fewer than two seeds.

    Correlations (``r``) are averaged after Fisher's transformation, which keeps them below 1.
    """
    if r:
        found = over_seeds(np.arctanh(np.clip(values, -_ALMOST, _ALMOST)).tolist())
        mean, low, high = np.tanh([found.mean, found.low, found.high]).tolist()
        return replace(found, mean=mean, low=low, high=high)
    known = [value for value in values if not math.isnan(value)]
    n = len(known)
    mean = float(np.mean(known)) if known else math.nan
    half = math.nan
    if n > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(known, ddof=1) / math.sqrt(n))
    return Interval(
        mean=mean, low=mean - half, high=mean + half, n=n, groups=n, missing=len(values) - n
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the paper: ``values`` (one per seed) should lie ``above`` the bound, or
    ``within`` it on both sides of 0.
    """

    what: str
    values: tuple[float, ...]
    bound: float = 0.0
    side: Literal["above", "within"] = "above"
    r: bool = False
    """The values are correlations."""

    @property
    def interval(self) -> Interval:
        return over_seeds(self.values, r=self.r)

    @property
    def verdict(self) -> Verdict:
        found = self.interval
        if math.isnan(found.low):
            return "cannot tell"
        if self.side == "above":
            good, bad = found.low > self.bound, found.high < self.bound
        else:
            good = -self.bound < found.low and found.high < self.bound
            bad = found.low > self.bound or found.high < -self.bound
        return "agrees" if good else "disagrees" if bad else "cannot tell"

    @property
    def outcome(self) -> Outcome:
        """The verdict, or with one seed the side of the bound on which its number lies."""
        mean = self.interval.mean
        if self.interval.n != 1:
            return self.verdict
        same = mean > self.bound if self.side == "above" else abs(mean) < self.bound
        return "same side" if same else "other side"

    @property
    def expected(self) -> str:
        return f"> {self.bound:g}" if self.side == "above" else f"within ±{self.bound:g}"


def overall(checks: Sequence[Check]) -> Outcome:
    """Return a figure's outcome from those of its checks that have a number."""
    outcomes = {check.outcome for check in checks if check.interval.n}
    for bad in ("disagrees", "other side"):
        if bad in outcomes:
            return bad
    return next(iter(outcomes)) if len(outcomes) == 1 else "cannot tell"


def format_interval(interval: Interval, *, digits: int = 0) -> str:
    """Return ``71 [65, 77]``, without brackets where there is no interval."""
    if math.isnan(interval.mean):
        return "unknown"
    mean, low, high = (
        f"{value:.{digits}f}" for value in (interval.mean, interval.low, interval.high)
    )
    mean = mean.removeprefix("-") if float(mean) == 0 else mean
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def mean_ci(values: Sequence[float], *, r: bool = False) -> str:
    """Return one value per seed as a mean with its interval, in words."""
    return format_interval(over_seeds(values, r=r), digits=2 if r else 0)
