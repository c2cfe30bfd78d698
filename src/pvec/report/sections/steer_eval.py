"""Steering evaluations: dose and response, layer by coefficient, answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pvec.evaluation.effect_numbers import read_effects
from pvec.evaluation.summary import (
    COHERENCE,
    KLLimit,
    Pick,
    Point,
    ScoredAnswer,
    SweepSummary,
    read_sweep,
    stored_summary,
)
from pvec.report.axes import SCORE_AXIS, Reference, Scale, XAxis
from pvec.report.figure import Cell, Difference, Figure, Table
from pvec.report.figures import Level, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Answer, Section
from pvec.report.sections.common import RunData, with_interval
from pvec.report.sections.side_effects import effects_table, pareto_figure
from pvec.report.sections.sweeps import Sweep, overview, sweep_lines
from pvec.report.style import number, short_number, true_minus
from pvec.types import LIMITS, Percentile

_LINES = 6
"""More lines than this in one figure cannot be told apart; the heat map has them all."""

__all__ = ["overview", "read", "section"]


def read(run: RunData) -> Sweep:
    """Return a run with the numbers of its sweep and its answers, read once."""
    answers = read_sweep(run.run, judge=run.judge)
    steer, effects = run.settings.get("steer", {}), read_effects(run.path)
    most = steer.get("max_kl")
    sweep = stored_summary(
        run.run,
        answers,
        trait=run.trait,
        min_coherence=steer.get("min_coherence", 75.0),
        kl=KLLimit(most=most, of=effects.kl if effects else {}) if most else None,
    )
    return run, sweep, answers


def section(found: Sweep) -> Section:
    """Return what a page shows of a steering evaluation."""
    run, sweep, answers = found
    baseline = sweep.baseline
    compare = (baseline.name, sweep.picks[0].point.name) if baseline and sweep.picks else None
    effects = read_effects(run.path)
    figures = list(_figures(run, sweep))
    tables = [("All conditions, all questions", _points_table(sweep))]
    if effects is not None:
        figures += pareto_figure(run.id, sweep, effects)
        tables.append(("Side effects", effects_table(effects)))
    return Section(
        title=f"Steering {run.model} with {run.trait}",
        summary=_summary(run, sweep),
        notes=tuple(_notes(run, sweep)),
        figures=tuple(figures),
        tables=tuple(tables),
        answers=tuple(_browsable(answers, sweep)),
        compare=compare,
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
        text += f"; a random vector of the same norm gives {number(_mean(pick.control, trait), 1)}"
    if pick.prompt:
        text += f", asking for it in the system prompt {_mean(pick.prompt, trait):.1f}"
    return f"{text}."


def _amount(run: RunData, point: Point) -> str:
    if point.operator == "ablate":
        return "ablate"
    if point.percentile:
        return f"{point.operator} at {point.percentile}"
    operator = f"{point.operator} at " if point.operator in LIMITS else ""
    unit = " norms" if run.settings.get("steer", {}).get("coef_unit") == "norm" else ""
    return f"{operator}coefficient {short_number(point.coef)}{unit}"


def _trait_and_coherence(point: Point, trait: str) -> str:
    text = with_interval(point.scores[trait]) if trait in point.scores else "no score"
    coherence = point.scores.get(COHERENCE)
    return text if coherence is None else f"{text} at coherence {coherence.mean:.1f}"


def _mean(point: Point, trait: str) -> float:
    return point.scores[trait].mean


def _notes(run: RunData, sweep: SweepSummary) -> Iterator[str]:
    for pick in sweep.picks:
        name = true_minus(pick.point.name)
        if pick.held_out:
            yield (
                f"{name} is the {pick.reason}; the numbers above come from the other "
                f"{pick.questions_for_reading}, which it was not chosen on."
            )
        else:
            yield f"There is one question only, so {name} was read where it was chosen."
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
    groups = list(dict.fromkeys((point.vector, point.positions) for point in steered))
    for place, group in enumerate(groups, start=1):
        points = [point for point in steered if (point.vector, point.positions) == group]
        name = run.id if len(groups) == 1 else f"{run.id}_{place}"
        picks = (p for p in sweep.picks if (p.vector, p.point.positions) == group)
        pick = next(picks, None)
        yield _dose_response(name, points, run, sweep, pick)
        layers, coefs = {p.layers for p in points}, {p.coef for p in points}
        # The points of a search are no grid.
        if len(layers) > 1 and len(coefs) > 1 and 2 * len(points) > len(layers) * len(coefs):
            for metric in sweep.metrics[:2]:
                yield _layer_by_coefficient(name, metric, points, sweep, pick)


def _dose_response(
    name: str, points: Sequence[Point], run: RunData, sweep: SweepSummary, pick: Pick | None
) -> Figure:
    layers = _shown_layers(points, pick)
    levels = sweep.having("prompt_pos", "prompt_neg")
    panels = [
        Panel(
            label=metric,
            lines=[
                line for choice in layers for line in sweep_lines(points, choice, sweep, metric)
            ],
            levels=[Level(label=p.name, value=p.scores[metric]) for p in levels],
            limits=SCORE_AXIS,
        )
        for metric in sweep.metrics
    ]
    hidden = len({p.layers for p in points}) - len(layers)
    axis = _axis(points[0])
    caption = f"Mean scores by {axis}; dashed: a random vector of the same norm."
    if hidden:
        caption += f" {hidden} further layers are in the heat map."
    if pick:
        caption += f" Picked: {pick.point.where}, {_amount(run, pick.point)}."
    return line_chart(
        name=f"{name}_dose_response",
        title=f"{points[0].vector}: dose and response"
        + (f" (positions: {points[0].positions})" if points[0].positions else ""),
        caption=caption,
        x=XAxis(
            label=axis,
            references=[Reference(x=pick.point.coef, label="picked")] if pick else [],
            top=_dose_scale(run, pick.point if pick else points[0]),
        ),
        panels=panels,
        ordered=len(layers) > 1,
    )


def _axis(point: Point) -> str:
    """Return what the coefficients of a sweep are."""
    word = {"cap": "ceiling", "floor": "floor"}.get(point.operator or "", "coefficient")
    percentile = Percentile.parse(point.percentile)
    if percentile is None:
        return word
    answers = {"pos": "positive", "neg": "negative"}.get(percentile.of, percentile.of)
    return f"{word}, percentile of {answers} answers"


def _dose_scale(run: RunData, point: Point) -> Scale | None:
    """Return the scale of the coefficients in mean residual norms, at the layer of ``point``."""
    norms = run.run.manifest.get("relative_norms", {}).get(point.vector)
    raw = run.settings.get("steer", {}).get("coef_unit", "raw") == "raw"
    if not raw or norms is None or len(point.layers) != 1 or point.operator != "add":
        return None
    return Scale(label=f"norm / residual at {point.where}", factor=norms[point.layers[0]])


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
            columns=(_axis(points[0]), coefs),
            rows=("layer", ["+".join(map(str, choice)) for choice in choices]),
            values=[[means.get((choice, coef), math.nan) for coef in coefs] for choice in choices],
            value_label=metric,
            scale="quality" if metric == COHERENCE else "trait",
        ),
        name=f"{name}_{metric}_by_layer",
        title=f"{metric} by layer and coefficient",
        caption="Mean over all questions." + (" The frame is the picked point." if pick else ""),
        marked=marked,
    )


def _points_table(sweep: SweepSummary) -> Table:
    columns: list[str] = ["condition"]
    for metric in sweep.metrics:
        columns += [f"{metric} (95 %)", "vs unsteered"]
    limits = any(point.limited is not None for point in sweep.points)
    columns += ["beyond the limit"] if limits else []
    columns += ["n", "missing"] if sweep.missing else ["n"]
    rows = []
    for point in sweep.points:
        cells: list[Cell] = [point.name]
        for metric in sweep.metrics:
            cells += [point.scores[metric], Difference.of(point.differences.get(metric))]
        scores = [point.scores[metric] for metric in sweep.metrics]
        if limits:
            cells.append("" if point.limited is None else f"{point.limited:.0%}")
        cells += [min((score.n for score in scores), default=0)]
        cells += [sum(score.missing for score in scores)] if sweep.missing else []
        rows.append(tuple(cells))
    return Table(columns=tuple(columns), rows=tuple(rows))


def _browsable(answers: Sequence[ScoredAnswer], sweep: SweepSummary) -> Iterator[Answer]:
    """Yield the answers by condition, in the order of the points: by layer, then by coefficient."""
    place = {point.name: i for i, point in enumerate(sweep.points)}
    for answer in sorted(answers, key=lambda answer: place[str(answer.condition["name"])]):
        yield Answer(
            condition=str(answer.condition["name"]),
            question=answer.question,
            rollout=int(answer.condition["rollout"]),
            text=answer.text,
            scores=answer.scores,
        )
