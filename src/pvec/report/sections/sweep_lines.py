"""Lines of a steering sweep: scores over the coefficient at one choice of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pvec.evaluation.summary import Point, SweepSummary
from pvec.report.figures import Line


def sweep_line(
    points: Sequence[Point],
    layers: tuple[int, ...],
    sweep: SweepSummary,
    metric: str,
    *,
    label: str = "",
    control_of: str | None = None,
) -> Line:
    """Return one line; the unsteered baseline is its point at coefficient 0 of an addition."""
    own = [point for point in points if point.layers == layers]
    by_coef = {point.coef: point.scores[metric] for point in own}
    if sweep.baseline is not None and own[0].operator == "add":
        by_coef.setdefault(0.0, sweep.baseline.scores[metric])
    coefs = sorted(by_coef)
    return Line(
        label=label or own[0].where,
        x=coefs,
        points=[by_coef[coef] for coef in coefs],
        control_of=control_of,
    )


def control_line(
    points: Sequence[Point],
    layers: tuple[int, ...],
    sweep: SweepSummary,
    metric: str,
    *,
    control_of: str = "",
) -> Iterator[Line]:
    """Yield the line of the random vector at the same layers, if it was run."""
    controls = [c for p in points if (c := sweep.control_of(p)) is not None and c.layers == layers]
    if controls:
        steered = control_of or controls[0].where
        yield sweep_line(
            controls, layers, sweep, metric, label=f"random, {steered}", control_of=steered
        )
