"""What pages of steering sweeps share: their lines, and several sweeps beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pvec.evaluation.summary import COHERENCE, Pick, Point, ScoredAnswer, SweepSummary
from pvec.report.axes import SCORE_AXIS, XAxis
from pvec.report.figure import Cell, Figure, Table
from pvec.report.figures import Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Section
from pvec.report.sections.common import RunData, listed

Sweep = tuple[RunData, SweepSummary, list[ScoredAnswer]]
"""A run with its numbers and answers."""

_CONTROLS = 3
"""Up to so many runs are drawn with their random vectors in one figure."""


def sweep_lines(
    points: Sequence[Point],
    layers: tuple[int, ...],
    sweep: SweepSummary,
    metric: str,
    *,
    label: str = "",
    random: str = "",
) -> list[Line]:
    """Return the line of a metric over the coefficient at one choice of layers and, where a random
    vector was run at the same points, its line (``random`` names it). The unsteered baseline is
    their point at coefficient 0 of an addition.
    """
    own = [point for point in points if point.layers == layers]
    controls = [control for point in own if (control := sweep.control_of(point)) is not None]
    label = label or own[0].where
    of_random = (random or f"random, {label}", controls, label)
    lines = []
    for name, members, control_of in ((label, own, None), *([of_random] if controls else [])):
        by_coef = {point.coef: point.scores[metric] for point in members}
        if sweep.baseline is not None and own[0].operator == "add":
            by_coef.setdefault(0.0, sweep.baseline.scores[metric])
        coefs = sorted(by_coef)
        scores = [by_coef[coef] for coef in coefs]
        lines.append(Line(label=name, x=coefs, points=scores, control_of=control_of))
    return lines


def overview(sweeps: Sequence[Sweep]) -> Section:
    """Return the section that compares several runs: one row and one line each."""
    picks = [(run, sweep, pick) for run, sweep, _ in sweeps for pick in sweep.picks]
    raised = sum(
        difference.low > 0
        for run, _, pick in picks
        if (difference := pick.point.differences.get(run.trait)) is not None
    )
    picked = [bool(sweep.picks) for _, sweep, _ in sweeps if sweep.having("steered")]
    columns = ("run", "picked", "unsteered", "steered", "coherence", "random", "prompt")
    table = Table(columns=columns, rows=tuple(_overview_row(run, pick) for run, _, pick in picks))
    return Section(
        id="steering",
        title=f"Steering with {listed([run.trait for run, _, _ in sweeps])}, run by run",
        summary=(
            f"In {raised} of {sum(picked)} evaluations the picked steering raises the trait on "
            f"held-out questions by more than chance (95 %)."
            + (f" In {picked.count(False)} more no steering was picked." * (False in picked))
            if any(picked)
            else f"None of {len(sweeps)} evaluations has a picked steering."
        ),
        figures=(*_grid_figures(picks), _overview_figure(picks)) if picks else (),
        source=", ".join(dict.fromkeys(run.source for run, _, _ in sweeps)),
        tables=(("Picked points, read on held-out questions", table),),
    )


def _grid_figures(picks: Sequence[tuple[RunData, SweepSummary, Pick]]) -> Iterator[Figure]:
    """Yield models by traits, steered at their picked points, where there are several of both."""
    scores = {(run.model, run.trait): pick.point.scores[run.trait].mean for run, _, pick in picks}
    grid = Grid.of_pairs(scores, rows="model", columns="trait", value_label="trait score")
    if len(grid.rows[1]) > 1 and len(grid.columns[1]) > 1:
        yield heat_map(
            grid,
            name="steering_models",
            title="Every model and trait at the picked point",
            caption="Mean trait score on the questions that nothing was picked on.",
        )


def _overview_row(run: RunData, pick: Pick) -> tuple[Cell, ...]:
    coherence = pick.point.scores.get(COHERENCE)
    return (
        run.path.resolve().name,
        pick.point.name,
        pick.baseline.scores[run.trait] if pick.baseline else None,
        pick.point.scores[run.trait],
        coherence,
        pick.control.scores[run.trait] if pick.control else None,
        pick.prompt.scores[run.trait] if pick.prompt else None,
    )


def _overview_figure(picks: Sequence[tuple[RunData, SweepSummary, Pick]]) -> Figure:
    """Draw each run's own trait over the coefficient, at the layer picked for it."""
    traits: list[Line] = []
    coherence: list[Line] = []
    named = len({(pick.vector, pick.point.where) for _, _, pick in picks}) == len(picks)
    controls = len(picks) <= _CONTROLS
    for run, sweep, pick in picks:
        points = [p for p in sweep.having("steered") if p.vector == pick.vector]
        layers = pick.point.layers
        label = f"{pick.vector}, {pick.point.where}"
        label = label if named else run.path.resolve().name
        lines = sweep_lines(points, layers, sweep, run.trait, label=label)
        traits += lines if controls else lines[:1]
        if COHERENCE in sweep.metrics:
            coherence.append(sweep_lines(points, layers, sweep, COHERENCE, label=label)[0])
    panels = {"trait": traits, COHERENCE: coherence}
    return line_chart(
        name="steering_overview",
        title="Every trait at its picked layer",
        caption="Mean score of each run's own trait; "
        + (
            "dashed: random vectors of the same norm."
            if controls
            else "random vectors are in each run's own figure."
        ),
        x=XAxis(label="coefficient"),
        panels=[
            Panel(label=k, lines=lines, limits=SCORE_AXIS) for k, lines in panels.items() if lines
        ],
    )
