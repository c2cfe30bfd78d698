"""What the axes of all figures share: reference lines, second scales, limits, keys, intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pvec.report.figure import interval_text
from pvec.report.style import INK, PAPER, name_marks, printable, short_number
from pvec.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SCORE_AXIS = (0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A vertical line: a value of x with a meaning (the suggested layer, a threshold, a mean)."""

    x: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A second scale of an axis: its value is ``factor`` times the first one's."""

    label: str
    factor: float


@dataclass(frozen=True, kw_only=True)
class XAxis:
    """What x means: its label, values of it with a meaning, and its second scale, on top."""

    label: str
    references: Sequence[Reference] = ()
    top: Scale | None = None


@dataclass(frozen=True, kw_only=True)
class YAxis:
    """What y means: its label, and what it covers at least (``SCORE_AXIS`` is covered exactly)."""

    label: str
    limits: tuple[float, float] | None = None


def exact(value: float) -> Interval:
    """Return a number without uncertainty."""
    return Interval(mean=value, low=math.nan, high=math.nan, n=1, groups=1)


def interval_note(points: Iterable[Interval], *, shape: str = "Bars") -> str:
    """Return what a caption says of points with intervals: that they have them, and their n."""
    known = [point for point in points if not math.isnan(point.low)]
    if not known:
        return ""
    least, most = min(point.n for point in known), max(point.n for point in known)
    count = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f" {shape}: 95 % intervals" + (f"; n = {count} per point." if most > 1 else ".")


def spans(values: Sequence[Interval]) -> list[list[float]] | None:
    """Return how far intervals reach down and up (0 where one is not known), None without any."""
    if all(math.isnan(value.low) for value in values):
        return None
    ends = [(value.mean - value.low, value.high - value.mean) for value in values]
    return [
        [0.0 if math.isnan(end) else max(0.0, end) for end in side]
        for side in zip(*ends, strict=True)
    ]


def draw_x(axes: Sequence[Axes], x: XAxis) -> None:
    """Label the x axis that ``axes`` share, from top to bottom, and draw what is known of it."""
    inside = x.top is not None
    named = axes[-1] if inside else axes[0]
    for axis in axes:
        low = inside and len(axes) > 1  # where doses that work leave room
        draw_references(axis, x.references, named=axis is named, inside=inside, low=low)
    axes[-1].set_xlabel(printable(x.label))
    if x.top is not None:
        second_scale(axes[0], x.top)


def draw_references(
    axis: Axes, references: Sequence[Reference], *, named: bool, inside: bool, low: bool
) -> None:
    """Draw vertical lines of values with a meaning, named at their upper end, or at their lower
    one; names stand upright ``inside`` the axes where a second scale is above them.
    """
    last = max((reference.x for reference in references), default=0.0)
    for reference in references:
        line = axis.axvline(reference.x, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5)
        name_marks(line, [f"{reference.label}: {short_number(reference.x)}"])
        if named:
            side = "center" if len(references) == 1 else "left" if reference.x == last else "right"
            axis.annotate(
                printable(reference.label), (reference.x, 0 if low else 1),
                xycoords=("data", "axes fraction"),
                xytext=(-2, 4 if low else -3) if inside else (0, 2), textcoords="offset points",
                rotation=90 if inside else 0, ha="right" if inside else side,
                va="top" if inside and not low else "bottom", size=10, color=INK,
                annotation_clip=False,
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1},
                zorder=1.6,  # under the data
            )  # fmt: skip


def draw_legend(canvas: Canvas, axes: Sequence[Axes], labels: Sequence[str]) -> None:
    """Name every series of the axes once, below them; each name is the key of its series."""
    from matplotlib.lines import Line2D

    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    legend = canvas.legend(
        list(handles.values()), list(handles), loc="outside lower center",
        ncols=1 if _are_long(labels) else 2,
    )  # fmt: skip
    numbers = {legible(label): i for i, label in enumerate(labels)}
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        if isinstance(handle, Line2D):
            handle.set_markersize(5)  # in the axes the marks are drawn apart from the line
        for part in (handle, text):
            name_marks(part, series=numbers[text.get_text()], key=True)


def legend_height(labels: Sequence[str]) -> float:
    """Return the height of a legend in inches."""
    rows = len(labels) if _are_long(labels) else math.ceil(len(labels) / 2)
    return 0.22 * rows if len(labels) > 1 else 0.0


def _are_long(labels: Sequence[str]) -> bool:
    """Whether two names do not fit side by side."""
    return any(len(label) > 22 for label in labels)


def legible(label: str, *, limit: int = 40) -> str:
    """Return a name for a legend: short, and shown although it begins with an underscore."""
    text = printable(label)
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return f"\u200b{text}" if text.startswith("_") else text


def says(label: str, quantity: str, value: Interval) -> str:
    """Return the title of a mark: its series, and the value with its interval and n."""
    count = f", n = {value.n:,}" if value.n > 1 else ""
    return f"{label}: {quantity} {interval_text(value)}{count}"


def cover(axis: Axes, limits: tuple[float, float]) -> None:
    """Let the y axis cover at least ``limits``; an axis of scores covers just them."""
    low, high = axis.get_ylim()
    low, high = min(low, limits[0]), max(high, limits[1])
    if limits == SCORE_AXIS:
        low, high = limits
        axis.set_yticks([0, 25, 50, 75, 100])
    margin = 0.04 * (high - low)
    axis.set_ylim(low - margin, high + margin)


def mark_x(axis: Axes, values: Sequence[float]) -> None:
    """Put the ticks of x at its values while they are few, at whole numbers where all are."""
    from matplotlib.ticker import MaxNLocator

    if len(values) <= 9 and len({round(b - a, 9) for a, b in pairwise(values)}) <= 2:
        axis.set_xticks(values, [short_number(x) for x in values])
    elif all(float(x).is_integer() for x in values):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def second_scale(axis: Axes, scale: Scale, *, side: Literal["top", "right"] = "top") -> None:
    """Draw the second scale of x over the axes, or that of y at their right."""

    def forth(x: Any) -> Any:
        return x * scale.factor

    def back(x: Any) -> Any:
        return x / scale.factor

    if side == "right":
        second = axis.secondary_yaxis("right", functions=(forth, back))
        second.set_ylabel(printable(scale.label), size=10)
    else:
        second = axis.secondary_xaxis("top", functions=(forth, back))
        second.set_xlabel(printable(scale.label), size=10)
    second.tick_params(labelsize=10)
