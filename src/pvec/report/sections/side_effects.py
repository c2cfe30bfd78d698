"""Side effects of a steering: trait gained against damage, and what was measured in a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pvec.evaluation.effect_numbers import MEASURES, SideEffects
from pvec.evaluation.summary import Point, SweepSummary
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

_RANDOM, _PROMPTED = "random vector", "system prompt"
_DAMAGE = "KL divergence on benign text (nats per token)"


def pareto_figure(name: str, sweep: SweepSummary, effects: SideEffects) -> Iterator[Figure]:
    """Yield the trait's change (y) against the KL divergence on benign text (x, above 0, on a
    logarithmic scale), where both are known.

    Layers have an order; controls are grey and not on the front, which is a dashed line of steps.
    Picked points are ringed.
    """
    by_name = {point.name: dot for point in sweep.points if (dot := _dot(point, sweep, effects))}
    if not any(point.name in by_name for point in sweep.having("steered")):
        return
    picked = [by_name[p.point.name] for p in sweep.picks if p.point.name in by_name]
    dots = list(by_name.values())
    groups = list(dict.fromkeys(dot.group for dot in dots))
    steered = [group for group in groups if group not in (_RANDOM, _PROMPTED)]
    ramp = dict(zip(steered, series_colours(len(steered), ordered=True), strict=True))
    front = pareto_front([dot for dot in dots if dot.group in ramp])
    labels = (_DAMAGE, f"change of {sweep.trait}")

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

    caption = (
        f"Change of {sweep.trait} from the unsteered model over KL divergence from it on "
        f"{effects.texts} benign texts. No steering beats one on the dashed line in both."
        + (" The ring is the picked point." if picked else "")
    )
    yield Figure(
        name=f"{name}_pareto",
        title=f"{sweep.trait} gained against damage",
        caption=f"{caption}{interval_note([end for dot in dots for end in (dot.x, dot.y)])}",
        table=_front_table(labels, dots, front),
        draw=draw,
        size=(5.0, 3.7 + legend_height(groups)),
    )


def _front_table(labels: Sequence[str], dots: Sequence[Dot], front: Sequence[Dot]) -> Table:
    ends = ("", "_low_95", "_high_95")
    columns = ("condition", *(f"{label}{end}" for label in labels for end in ends), "on the front")
    rows: list[tuple[Cell, ...]] = [
        (
            dot.label,
            *(value for i in (dot.x, dot.y) for value in (i.mean, i.low, i.high)),
            "yes" if dot in front else "no",
        )
        for dot in dots
    ]
    return Table(columns=columns, rows=tuple(rows))


def effects_table(effects: SideEffects) -> Table:
    """Return the measures of every condition, with their intervals."""
    rows: list[tuple[Cell, ...]] = [
        (point.name, *(point.measures.get(measure) for measure in effects.measures))
        for point in effects.points
    ]
    names = (MEASURES[measure] for measure in effects.measures)
    return Table(columns=("condition", *names), rows=tuple(rows))


def _dot(point: Point, sweep: SweepSummary, effects: SideEffects) -> Dot | None:
    kl, gain = effects.of(point.name).get("kl"), point.differences.get(sweep.trait)
    known = kl is not None and gain is not None and kl.mean > 0 and math.isfinite(gain.mean)
    if not known or kl is None or gain is None:
        return None
    vectors = {p.vector for p in sweep.having("steered")}
    where = point.where if len(vectors) == 1 else f"{point.vector}, {point.where}"
    group = {"steered": where, "random": _RANDOM}.get(point.role, _PROMPTED)
    return Dot(group=group, x=kl, y=gain, label=point.name)


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
