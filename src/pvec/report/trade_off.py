"""Gain against damage: points, the front that none of them beats, and the picked one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pvec.report.axes import draw_legend, interval_note, legend_height
from pvec.report.dots import Dot, draw_group
from pvec.report.figure import Cell, Figure, Table
from pvec.report.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    name_marks,
    printable,
    series_colours,
    short_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


def trade_off(
    *,
    name: str,
    title: str,
    caption: str,
    labels: tuple[str, str],
    dots: Sequence[Dot],
    controls: Sequence[str] = (),
    picked: Sequence[Dot] = (),
) -> Figure:
    """Draw gain (y) over damage (x, above 0, on a logarithmic scale); ``labels`` are x's and y's.

    Groups have an order (layers); those named in ``controls`` are grey and not on the front, which
    is a dashed line of steps. ``picked`` points are ringed.
    """
    groups = list(dict.fromkeys(dot.group for dot in dots))
    own = [group for group in groups if group not in controls]
    ramp = dict(zip(own, series_colours(len(own), ordered=True), strict=True))
    front = pareto_front([dot for dot in dots if dot.group not in controls])

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for number, group in enumerate(groups):
            members = [dot for dot in dots if dot.group == group]
            draw_group(
                axis, members, labels, number, ramp.get(group, MUTED), joined=False, small=False
            )
        _draw_front(axis, front)
        for dot in picked:
            _draw_ring(axis, dot)
        axis.set_xlabel(printable(labels[0]))
        axis.set_ylabel(printable(labels[1]))
        if len(groups) > 1:
            draw_legend(canvas, [axis], groups)

    on_front = {dot.label for dot in front}
    ends = ("", "_low_95", "_high_95")
    columns = ("condition", *(f"{label}{end}" for label in labels for end in ends), "on the front")
    rows: list[tuple[Cell, ...]] = [
        (
            dot.label,
            *(value for i in (dot.x, dot.y) for value in (i.mean, i.low, i.high)),
            "yes" if dot.label in on_front else "no",
        )
        for dot in dots
    ]
    return Figure(
        name=name,
        title=title,
        caption=f"{caption}{interval_note([end for dot in dots for end in (dot.x, dot.y)])}",
        table=Table(columns=columns, rows=tuple(rows)),
        draw=draw,
        size=(5.0, 3.7 + legend_height(groups)),
    )


def pareto_front(dots: Sequence[Dot]) -> list[Dot]:
    """Return those that no other beats in both more gain and less damage, by damage.

    Gain is what most is moved: a rise, or a fall where falls are larger.
    """
    gains = [dot.y.mean for dot in dots]
    sign = 1 if max(gains) >= -min(gains) else -1
    front: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x.mean, -sign * dot.y.mean)):
        if sign * dot.y.mean > (sign * front[-1].y.mean if front else 0.0):
            front.append(dot)
    return front


def _draw_front(axis: Axes, front: Sequence[Dot]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.axhline(0, color=GRID, linewidth=1.4, zorder=0.5)
    x, y = [dot.x.mean for dot in front], [dot.y.mean for dot in front]
    axis.step(x, y, where="post", color=INK, linewidth=1, linestyle="--", zorder=2)


def _draw_ring(axis: Axes, dot: Dot) -> None:
    ring = axis.scatter(
        [dot.x.mean], [dot.y.mean], s=150, facecolors="none", edgecolors=INK, linewidths=1.6,
        zorder=4,
    )  # fmt: skip
    name_marks(ring, [f"picked: {dot.label}"])
    axis.annotate(
        "picked", (dot.x.mean, dot.y.mean), xytext=(-8, 7), textcoords="offset points",
        ha="right", size=10, color=INK, zorder=5,
        bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )  # fmt: skip
