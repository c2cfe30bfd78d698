"""Several steering evaluations beside each other: one row and one line each, models by traits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pvec.evaluation.summary import COHERENCE, Pick, SweepSummary
from pvec.report.axes import SCORE_AXIS, XAxis
from pvec.report.figure import Cell, Figure, Table
from pvec.report.figures import Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Section
from pvec.report.sections.common import RunData, listed
from pvec.report.sections.sweep_lines import control_line, sweep_line

_CONTROLS = 3
"""Up to so many runs are drawn with their random vectors in one figure."""


def overview_section(summaries: Sequence[tuple[RunData, SweepSummary]]) -> Section:
    """Return the section that compares several runs: one row and one line each."""
    picks = [(run, sweep, pick) for run, sweep in summaries for pick in sweep.picks]
    raised = sum(
        difference.low > 0
        for run, _, pick in picks
        if (difference := pick.point.differences.get(run.trait)) is not None
    )
    picked = [bool(sweep.picks) for _, sweep in summaries if sweep.having("steered")]
    columns = ("run", "picked", "unsteered", "steered", "coherence", "random", "prompt")
    table = Table(columns=columns, rows=tuple(_overview_row(run, pick) for run, _, pick in picks))
    return Section(
        id="steering",
        title=f"Steering with {listed([run.trait for run, _ in summaries])}, run by run",
        summary=(
            f"In {raised} of {sum(picked)} evaluations the picked steering raises the trait on "
            f"held-out questions by more than chance (95 %)."
            + (f" In {picked.count(False)} more no steering was picked." * (False in picked))
            if any(picked)
            else f"None of {len(summaries)} evaluations has a picked steering."
        ),
        figures=(*_grid_figures(picks), _overview_figure(picks)) if picks else (),
        source=", ".join(dict.fromkeys(run.source for run, _ in summaries)),
        tables=(("Picked points, read on held-out questions", table),),
    )


def _grid_figures(picks: Sequence[tuple[RunData, SweepSummary, Pick]]) -> Iterator[Figure]:
    """Yield models by traits, steered at their picked points, where there are several of both."""
    scores = {(run.model, run.trait): pick.point.scores[run.trait].mean for run, _, pick in picks}
    models, traits = (list(dict.fromkeys(key[side] for key in scores)) for side in (0, 1))
    if len(models) > 1 and len(traits) > 1:
        yield heat_map(
            Grid(
                columns=("trait", traits),
                rows=("model", models),
                values=[
                    [scores.get((model, trait), math.nan) for trait in traits] for model in models
                ],
                value_label="trait score",
                first_row="top",
            ),
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
        traits.append(sweep_line(points, layers, sweep, run.trait, label=label))
        if controls:
            traits += control_line(points, layers, sweep, run.trait, control_of=label)
        if COHERENCE in sweep.metrics:
            coherence.append(sweep_line(points, layers, sweep, COHERENCE, label=label))
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
