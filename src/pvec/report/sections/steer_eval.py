"""Steering evaluations: dose and response, layer by coefficient, answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pvec.evaluation.summary import (
    COHERENCE,
    Pick,
    Point,
    ScoredAnswer,
    SweepSummary,
    read_sweep,
    stored_summary,
)
from pvec.report.figure import Cell, Figure, Table
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Answer, Chapter, Section
from pvec.report.sections.common import RunData, signed, with_interval

_LINES = 6
"""More lines than this in one figure cannot be told apart; the heat map has them all."""


def build(runs: Sequence[RunData]) -> Chapter:
    """Return a section per run, and for several runs a first one that compares them."""
    sections: list[Section] = []
    summaries: list[tuple[RunData, SweepSummary]] = []
    for run in runs:
        answers = read_sweep(run.run, judge=run.judge)
        floor = run.settings.get("steer", {}).get("min_coherence", 75.0)
        sweep = stored_summary(run.run, answers, trait=run.trait, min_coherence=floor)
        summaries.append((run, sweep))
        sections.append(_section(run, sweep, answers))
    if len(runs) == 1:
        return Chapter(summary=sections[0].summary, sections=tuple(sections))
    overview = _overview(summaries)
    return Chapter(summary=overview.summary, sections=(overview, *sections))


def _section(run: RunData, sweep: SweepSummary, answers: Sequence[ScoredAnswer]) -> Section:
    baseline = sweep.baseline
    compare = (baseline.name, sweep.picks[0].point.name) if baseline and sweep.picks else None
    return Section(
        id=run.id,
        title=f"{run.trait} in {run.model}: steering",
        summary=_summary(run, sweep),
        notes=tuple(_notes(run, sweep)),
        figures=tuple(_figures(run, sweep)),
        tables=(("All conditions, all questions", _points_table(sweep)),),
        answers=tuple(_browsable(answers)),
        compare=compare,
        provenance=run.provenance(),
    )


def _summary(run: RunData, sweep: SweepSummary) -> str:
    if not sweep.metrics:
        return f"The {len(sweep.points)} conditions of {run.trait} are not judged yet."
    if not sweep.picks:
        baseline = sweep.baseline or sweep.points[0]
        return f"Unsteered, {run.model} scores {_trait_and_coherence(baseline, run.trait)}." + (
            f" Nothing was picked for {sweep.unpicked[0]}." if sweep.unpicked else ""
        )
    return " ".join(_picked(run, pick) for pick in sweep.picks)


def _picked(run: RunData, pick: Pick) -> str:
    trait = run.trait
    where = "held-out" if pick.held_out else "the same"
    base = f"from {with_interval(pick.baseline.scores[trait])} " if pick.baseline else ""
    text = (
        f"Steering with {pick.vector} at {pick.point.where} ({_amount(run, pick.point)}) moves "
        f"{trait} {base}to {_trait_and_coherence(pick.point, trait)} "
        f"on {pick.questions_for_reading} {where} questions"
    )
    if pick.control:
        text += f"; a random vector of the same norm gives {_mean(pick.control, trait):.1f}"
    if pick.prompt:
        text += f", asking for it in the system prompt {_mean(pick.prompt, trait):.1f}"
    return f"{text}."


def _amount(run: RunData, point: Point) -> str:
    if point.operator == "ablate":
        return "ablate"
    operator = "cap at " if point.operator == "cap" else ""
    unit = " norms" if run.settings.get("steer", {}).get("coef_unit") == "norm" else ""
    return f"{operator}coefficient {point.coef:g}{unit}"


def _trait_and_coherence(point: Point, trait: str) -> str:
    text = with_interval(point.scores[trait]) if trait in point.scores else "no score"
    coherence = point.scores.get(COHERENCE)
    return text if coherence is None else f"{text} at coherence {coherence.mean:.1f}"


def _mean(point: Point, trait: str) -> float:
    return point.scores[trait].mean


def _notes(run: RunData, sweep: SweepSummary) -> Iterator[str]:
    for pick in sweep.picks:
        if pick.held_out:
            yield (
                f"{pick.point.name} is the {pick.reason}; the numbers above come from the other "
                f"{pick.questions_for_reading}, which it was not chosen on."
            )
        else:
            yield f"There is one question only, so {pick.point.name} was read where it was chosen."
    for vector in sweep.unpicked:
        yield f"No point was picked for {vector}."
    if sweep.missing:
        yield f"{sweep.missing} scores are missing (refused, unparsable or failed) and in no mean."
    if run.run.manifest.get("model", {}).get("bundled"):
        yield (
            "The bundled model is a teaching aid: these numbers are about it, not about real "
            "assistants."
        )


def _figures(run: RunData, sweep: SweepSummary) -> Iterator[Figure]:
    if not sweep.metrics:
        return
    steered = sweep.having("steered")
    vectors = list(dict.fromkeys(point.vector for point in steered))
    for number, vector in enumerate(vectors, start=1):
        points = [point for point in steered if point.vector == vector]
        name = run.id if len(vectors) == 1 else f"{run.id}_{number}"
        pick = next((item for item in sweep.picks if item.vector == vector), None)
        yield _dose_response(name, points, sweep, pick)
        if len({p.layers for p in points}) > 1 and len({p.coef for p in points}) > 1:
            for metric in sweep.metrics[:2]:
                yield _layer_by_coefficient(name, metric, points, sweep, pick)


def _dose_response(
    name: str, points: Sequence[Point], sweep: SweepSummary, pick: Pick | None
) -> Figure:
    layers = _shown_layers(points, pick)
    control_at = pick.point.layers if pick else layers[len(layers) // 2]
    levels = sweep.having("prompt_pos", "prompt_neg")
    panels = [
        Panel(
            label=metric,
            lines=[
                *(_line(points, choice, sweep, metric) for choice in layers),
                *_control_line(points, control_at, sweep, metric),
            ],
            levels=[Level(label=p.name, value=p.scores[metric]) for p in levels],
            scores=True,
        )
        for metric in sweep.metrics
    ]
    hidden = len({p.layers for p in points}) - len(layers)
    more = f" {hidden} further layers are in the heat map." if hidden else ""
    return line_chart(
        name=f"{name}_dose_response",
        title=f"{points[0].vector}: dose and response",
        caption=(
            "Mean scores by coefficient; bands are 95 % intervals over questions. Dashed and grey: "
            f"a random vector of the same norm.{more}"
        ),
        x_label="coefficient",
        panels=panels,
    )


def _shown_layers(points: Sequence[Point], pick: Pick | None) -> list[tuple[int, ...]]:
    """Return at most ``_LINES`` choices of layers, evenly spread and with the picked one."""
    choices = sorted({point.layers for point in points})
    if len(choices) <= _LINES:
        return choices
    step = (len(choices) - 1) / (_LINES - 1)
    shown = {choices[round(i * step)] for i in range(_LINES)}
    if pick is not None and pick.point.layers not in shown:
        shown.remove(min(shown - {choices[0], choices[-1]}))
        shown.add(pick.point.layers)
    return sorted(shown)


def _line(
    points: Sequence[Point],
    layers: tuple[int, ...],
    sweep: SweepSummary,
    metric: str,
    *,
    label: str = "",
    control: bool = False,
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
        control=control,
    )


def _control_line(
    points: Sequence[Point], layers: tuple[int, ...], sweep: SweepSummary, metric: str
) -> Iterator[Line]:
    """Yield the line of the random vector at the same layers, if it was run."""
    controls = [c for p in points if (c := sweep.control_of(p)) is not None and c.layers == layers]
    if controls:
        label = f"random, {controls[0].where}"
        yield _line(controls, layers, sweep, metric, label=label, control=True)


def _layer_by_coefficient(
    name: str, metric: str, points: Sequence[Point], sweep: SweepSummary, pick: Pick | None
) -> Figure:
    choices = sorted({point.layers for point in points})
    means = {(point.layers, point.coef): point.scores[metric].mean for point in points}
    if sweep.baseline is not None and points[0].operator == "add":
        means |= {(choice, 0.0): sweep.baseline.scores[metric].mean for choice in choices}
    coefs = sorted({coef for _, coef in means})
    marked = (choices.index(pick.point.layers), coefs.index(pick.point.coef)) if pick else None
    return heat_map(
        Grid(
            columns=("coefficient", coefs),
            rows=("layer", ["+".join(map(str, choice)) for choice in choices]),
            values=[[means.get((choice, coef), math.nan) for coef in coefs] for choice in choices],
            value_label=metric,
        ),
        name=f"{name}_{metric}_by_layer",
        title=f"{metric} by layer and coefficient",
        caption="Mean over all questions." + (" The frame is the picked point." if pick else ""),
        marked=marked,
    )


def _points_table(sweep: SweepSummary) -> Table:
    columns: list[str] = ["condition"]
    for metric in sweep.metrics:
        columns += [metric, "95 % low", "95 % high", "n", "missing", "vs unsteered"]
    rows = []
    for point in sweep.points:
        cells: list[Cell] = [point.name]
        for metric in sweep.metrics:
            score = point.scores[metric]
            difference = point.differences.get(metric)
            cells += [score.mean, score.low, score.high, score.n, score.missing]
            cells.append(signed(difference) if difference else None)
        rows.append(tuple(cells))
    return Table(columns=tuple(columns), rows=tuple(rows))


def _browsable(answers: Sequence[ScoredAnswer]) -> Iterator[Answer]:
    for answer in answers:
        yield Answer(
            condition=str(answer.condition["name"]),
            question=answer.question,
            rollout=int(answer.condition["rollout"]),
            text=answer.text,
            scores=answer.scores,
        )


def _overview(summaries: Sequence[tuple[RunData, SweepSummary]]) -> Section:
    """Return the section that compares several runs: one row and one line each."""
    picks = [(run, sweep, pick) for run, sweep in summaries for pick in sweep.picks]
    raised = sum(
        difference.low > 0
        for run, _, pick in picks
        if (difference := pick.point.differences.get(run.trait)) is not None
    )
    columns = ("run", "picked", "unsteered", "steered", "coherence", "random", "prompt")
    table = Table(columns=columns, rows=tuple(_overview_row(run, pick) for run, _, pick in picks))
    return Section(
        id="steering",
        title="Steering, run by run",
        summary=(
            f"In {raised} of {len(summaries)} evaluations the picked steering raises the trait on "
            f"held-out questions by more than chance (95 %)."
        ),
        figures=(_overview_figure(picks),) if picks else (),
        tables=(("Picked points, read on held-out questions", table),),
    )


def _overview_row(run: RunData, pick: Pick) -> tuple[Cell, ...]:
    coherence = pick.point.scores.get(COHERENCE)
    return (
        run.path.name,
        pick.point.name,
        with_interval(pick.baseline.scores[run.trait]) if pick.baseline else None,
        with_interval(pick.point.scores[run.trait]),
        coherence.mean if coherence else None,
        _mean(pick.control, run.trait) if pick.control else None,
        _mean(pick.prompt, run.trait) if pick.prompt else None,
    )


def _overview_figure(picks: Sequence[tuple[RunData, SweepSummary, Pick]]) -> Figure:
    """Draw each run's own trait over the coefficient, at the layer picked for it."""
    traits: list[Line] = []
    coherence: list[Line] = []
    for run, sweep, pick in picks:
        points = [p for p in sweep.having("steered") if p.vector == pick.vector]
        layers = pick.point.layers
        label = f"{pick.vector}, {pick.point.where}"
        traits.append(_line(points, layers, sweep, run.trait, label=label))
        traits += _control_line(points, layers, sweep, run.trait)
        if COHERENCE in sweep.metrics:
            coherence.append(_line(points, layers, sweep, COHERENCE, label=label))
    panels = {"trait": traits, COHERENCE: coherence}
    return line_chart(
        name="steering_overview",
        title="Every trait at its picked layer",
        caption="Mean score of each run's own trait; dashed and grey: random vectors.",
        x_label="coefficient",
        panels=[Panel(label=k, lines=lines, scores=True) for k, lines in panels.items() if lines],
    )
