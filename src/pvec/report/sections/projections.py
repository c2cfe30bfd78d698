"""What pages of projections share: numbers with their intervals as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from pvec.report.axes import exact
from pvec.report.dots import Dot

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


def interval_text(value: Summary) -> str:
    """Return ``1.2 (0.9 to 1.5)``; the mean alone where there is no interval."""
    text = f"{number_text(value['mean'])}"
    if value["low"] is not None:
        text += f" ({number_text(value['low'])} to {number_text(value['high'])})"
    return text


def number_text(value: float | None) -> str:
    """Return a number in three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def correlation_text(value: Summary) -> str:
    """Return ``0.71 (0.60 to 0.79)``, or a dash."""
    if value["r"] is None:
        return "–"
    if value["low"] is None:
        return f"{value['r']:.2f}"
    return f"{value['r']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
