"""What pages of projections share: numbers with their intervals as they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

from pvec.report.axes import exact
from pvec.report.dots import Dot
from pvec.report.style import number
from pvec.stats import FEW_PAIRS, Interval

Summary = Mapping[str, Any]
"""What a command left in ``summary.json``, of a checked shape."""

NUMBER = (float, NoneType)
MEAN = {"mean": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
R = {"r": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
PLACE = {"vector": str, "layer": int}
"""Shapes of what summaries hold."""


def dot(group: str, x: float, y: float) -> Dot:
    """Return a point without uncertainty."""
    return Dot(group=group, x=exact(x), y=exact(y))


def interval_of(value: Summary) -> Interval:
    """Return a stored mean with its interval; what is not known is NaN."""
    mean, low, high = (
        math.nan if value[part] is None else float(value[part]) for part in ("mean", "low", "high")
    )
    return Interval(mean=mean, low=low, high=high, n=value["n"], groups=value["n"])


def correlation_text(value: Summary) -> str:
    """Return ``0.71 (0.60 to 0.79, n = 40)``; of fewer than ``FEW_PAIRS`` only their n."""
    count = f"n = {value['n']:,}"
    r, low = (math.nan if value[part] is None else value[part] for part in ("r", "low"))
    if math.isnan(r) or value["n"] < FEW_PAIRS:
        return f"not given ({count})"
    ends = "" if math.isnan(low) else f"{number(low, 2)} to {number(value['high'], 2)}, "
    return f"{'> 0.99' if 0.995 <= r < 1 else number(r, 2)} ({ends}{count})"
