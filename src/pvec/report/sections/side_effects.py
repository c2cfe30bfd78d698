"""Side effects of a steering: trait gained against damage, and what was measured in a table."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pvec.evaluation.effect_numbers import MEASURES, SideEffects
from pvec.evaluation.summary import Point, SweepSummary
from pvec.report.dots import Dot
from pvec.report.figure import Cell, Figure, Table
from pvec.report.trade_off import trade_off

_RANDOM, _PROMPTED = "random vector", "system prompt"


def pareto_figure(name: str, sweep: SweepSummary, effects: SideEffects) -> Iterator[Figure]:
    """Yield the trait's change against the KL divergence on benign text, where both are known."""
    dots = {point.name: dot for point in sweep.points if (dot := _dot(point, sweep, effects))}
    if not any(point.name in dots for point in sweep.having("steered")):
        return
    picked = [dots[p.point.name] for p in sweep.picks if p.point.name in dots]
    yield trade_off(
        name=f"{name}_pareto",
        title=f"{sweep.trait} gained against damage",
        caption=(
            f"Change of {sweep.trait} from the unsteered model over KL divergence from it on "
            f"{effects.texts} benign texts. No steering beats one on the dashed line in both."
            + (" The ring is the picked point." if picked else "")
        ),
        labels=("KL divergence on benign text (nats per token)", f"change of {sweep.trait}"),
        dots=list(dots.values()),
        controls=(_RANDOM, _PROMPTED),
        picked=picked,
    )


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
