"""Steering evaluations: dose and response, layer by coefficient, answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pvec.evaluation.summary import (
    COHERENCE,
    Pick,
    Point,
    ScoredAnswer,
    SweepNumbers,
    read_sweep,
    summarise,
)
from pvec.report.figures import Cell, Figure, Table
from pvec.report.page import Answer, Chapter, Section
from pvec.report.plots import Panel, Reference, Series, curves, heat_map
from pvec.report.sections.common import RunData, with_interval
from pvec.stats import Interval

_CURVES = 6
"""More lines than this in one figure cannot be told apart; the heat map has them all."""


def build(runs: Sequence[RunData]) -> Chapter:
    """Return a section per run, and for several runs a first one that compares them."""
    sections: list[Section] = []
    read: list[tuple[RunData, SweepNumbers]] = []
    for run in runs:
        answers = read_sweep(run.run, judge=run.judge)
        floor = run.settings.get("steer", {}).get("min_coherence", 75.0)
        numbers = summarise(answers, trait=run.trait, min_coherence=floor)
        read.append((run, numbers))
        sections.append(_section(run, numbers, answers))
    if len(runs) == 1:
        return Chapter(finding=sections[0].finding, sections=tuple(sections))
    overview = _overview(read)
    return Chapter(finding=overview.finding, sections=(overview, *sections))


def _section(run: RunData, numbers: SweepNumbers, answers: Sequence[ScoredAnswer]) -> Section:
    compare = None
    if numbers.picks:
        compare = ("unsteered", numbers.picks[0].point.name)
    return Section(
        id=run.id,
        title=f"{run.trait} in {run.model}: steering",
        finding=_finding(run, numbers),
        notes=tuple(_notes(run, numbers)),
        figures=tuple(_figures(run, numbers)),
        tables=(("All conditions, all questions", _points_table(numbers)),),
        answers=tuple(_browsable(answers)),
        compare=compare,
        provenance=run.provenance(),
    )


def _finding(run: RunData, numbers: SweepNumbers) -> str:
    if not numbers.metrics:
        return f"The {len(numbers.points)} conditions of {run.trait} are not judged yet."
    if not numbers.picks:
        baseline = next((p for p in numbers.points if p.role == "baseline"), numbers.points[0])
        return f"Unsteered, {run.model} scores {_trait_and_coherence(baseline, run.trait)}." + (
            f" Nothing was picked for {numbers.unpicked[0]}." if numbers.unpicked else ""
        )
    return " ".join(_picked(pick, run.trait) for pick in numbers.picks)


def _picked(pick: Pick, trait: str) -> str:
    where = "held-out" if pick.held_out else "the same"
    base = f"from {with_interval(pick.baseline.scores[trait])} " if pick.baseline else ""
    text = (
        f"Steering with {pick.vector} at {_layers(pick.point.layers)} ({_dose(pick.point)}) moves "
        f"{trait} {base}to {_trait_and_coherence(pick.point, trait)} "
        f"on {pick.questions_for_reading} {where} questions"
    )
    if pick.control:
        text += f"; a random vector of the same norm gives {_mean(pick.control, trait):.1f}"
    if pick.prompt:
        text += f", asking for it in the system prompt {_mean(pick.prompt, trait):.1f}"
    return f"{text}."


def _dose(point: Point) -> str:
    return point.name.rpartition(" · ")[2].replace("coef", "coefficient")


def _trait_and_coherence(point: Point, trait: str) -> str:
    text = with_interval(point.scores[trait]) if trait in point.scores else "no score"
    coherence = point.scores.get(COHERENCE)
    return text if coherence is None else f"{text} at coherence {coherence.mean:.1f}"


def _mean(point: Point, trait: str) -> float:
    return point.scores[trait].mean


def _notes(run: RunData, numbers: SweepNumbers) -> Iterator[str]:
    for pick in numbers.picks:
        if pick.held_out:
            yield (
                f"{pick.point.name} is the {pick.reason}; the numbers above come from the other "
                f"{pick.questions_for_reading}, which it was not chosen on."
            )
        else:
            yield f"There is one question only, so {pick.point.name} was read where it was chosen."
    for vector in numbers.unpicked:
        yield f"No point was picked for {vector}."
    missing = sum(one.missing for point in numbers.points for one in point.scores.values())
    if missing:
        yield f"{missing} scores are missing (refused, unparsable or failed) and in no mean."
    if run.run.manifest.get("model", {}).get("bundled"):
        yield (
            "The bundled model is a teaching aid: these numbers are about it, not about real "
            "assistants."
        )


def _figures(run: RunData, numbers: SweepNumbers) -> Iterator[Figure]:
    if not numbers.metrics:
        return
    vectors = dict.fromkeys(point.vector for point in numbers.points if point.role == "steered")
    for number, vector in enumerate(vectors):
        mine = [p for p in numbers.points if p.role == "steered" and p.vector == vector]
        name = run.id if len(vectors) == 1 else f"{run.id}_{number + 1}"
        pick = next((one for one in numbers.picks if one.vector == vector), None)
        yield _dose_response(name, vector, mine, numbers, pick)
        if len({p.layers for p in mine}) > 1 and len({p.coef for p in mine}) > 1:
            for metric in numbers.metrics[:2]:
                yield _layer_by_coefficient(name, metric, mine, numbers, pick)


def _dose_response(
    name: str, vector: str, mine: Sequence[Point], numbers: SweepNumbers, pick: Pick | None
) -> Figure:
    layers = _shown_layers(mine, pick)
    control_at = pick.point.layers if pick else layers[len(layers) // 2]
    baseline = next((p for p in numbers.points if p.role == "baseline"), None)
    controls = [
        p
        for p in numbers.points
        if p.role == "random" and p.vector.endswith(vector) and p.layers == control_at
    ]
    prompts = [p for p in numbers.points if p.role in {"prompt_pos", "prompt_neg"}]
    panels = []
    for metric in numbers.metrics:
        series = [
            _series(_layers(choice), [p for p in mine if p.layers == choice], baseline, metric)
            for choice in layers
        ]
        if controls:
            label = f"random, {_layers(control_at)}"
            series.append(_series(label, controls, baseline, metric, control=True))
        references = [Reference(label=p.name, level=p.scores[metric]) for p in prompts]
        panels.append(Panel(metric=metric, series=tuple(series), references=tuple(references)))
    left_out = len({p.layers for p in mine}) - len(layers)
    more = f" {left_out} further layers are in the heat map." if left_out else ""
    return curves(
        name=f"{name}_dose_response",
        title=f"{vector}: dose and response",
        caption=(
            "Mean scores by coefficient; bands are 95 % intervals over questions. Dashed and grey: "
            f"a random vector of the same norm.{more}"
        ),
        x_label="coefficient",
        panels=panels,
    )


def _shown_layers(mine: Sequence[Point], pick: Pick | None) -> list[tuple[int, ...]]:
    """Return at most ``_CURVES`` choices of layers, evenly spread and with the picked one."""
    choices = sorted({point.layers for point in mine})
    if len(choices) <= _CURVES:
        return choices
    step = (len(choices) - 1) / (_CURVES - 1)
    shown = {choices[round(i * step)] for i in range(_CURVES)}
    if pick is not None and pick.point.layers not in shown:
        shown.remove(min(shown - {choices[0], choices[-1]}))
        shown.add(pick.point.layers)
    return sorted(shown)


def _series(
    label: str,
    points: Sequence[Point],
    baseline: Point | None,
    metric: str,
    *,
    control: bool = False,
) -> Series:
    """Return one line; the unsteered baseline is its point at coefficient 0."""
    by_coef = {point.coef: point.scores[metric] for point in points}
    if baseline is not None and not _is_cap_or_ablation(points):
        by_coef.setdefault(0.0, baseline.scores[metric])
    coefs = tuple(sorted(by_coef))
    return Series(label=label, x=coefs, points=tuple(by_coef[c] for c in coefs), control=control)


def _is_cap_or_ablation(points: Sequence[Point]) -> bool:
    return any(" cap " in f" {p.name} " or p.name.endswith("ablate") for p in points)


def _layer_by_coefficient(
    name: str, metric: str, mine: Sequence[Point], numbers: SweepNumbers, pick: Pick | None
) -> Figure:
    choices = sorted({point.layers for point in mine})
    baseline = next((p for p in numbers.points if p.role == "baseline"), None)
    zero = {0.0} if baseline is not None and not _is_cap_or_ablation(mine) else set()
    coefs = sorted({point.coef for point in mine} | zero)
    means = {(point.layers, point.coef): point.scores[metric].mean for point in mine}
    if baseline is not None and zero:
        means.update({(choice, 0.0): baseline.scores[metric].mean for choice in choices})
    marked = (choices.index(pick.point.layers), coefs.index(pick.point.coef)) if pick else None
    return heat_map(
        name=f"{name}_{metric}_by_layer",
        title=f"{metric} by layer and coefficient",
        caption="Mean over all questions." + (" The frame is the picked point." if pick else ""),
        columns=("coefficient", coefs),
        rows=("layer", ["+".join(map(str, choice)) for choice in choices]),
        values=[[means.get((choice, coef), math.nan) for coef in coefs] for choice in choices],
        value_label=metric,
        marked=marked,
    )


def _layers(choice: tuple[int, ...]) -> str:
    if len(choice) > 2:
        return f"layers {choice[0]}-{choice[-1]}"
    return f"layer {choice[0]}" if len(choice) == 1 else f"layers {choice[0]}+{choice[1]}"


def _points_table(numbers: SweepNumbers) -> Table:
    columns: list[str] = ["condition"]
    for metric in numbers.metrics:
        columns += [metric, "95 % low", "95 % high", "n", "missing", "vs unsteered"]
    rows = []
    for point in numbers.points:
        cells: list[Cell] = [point.name]
        for metric in numbers.metrics:
            score = point.scores[metric]
            difference = point.differences.get(metric)
            cells += [score.mean, score.low, score.high, score.n, score.missing]
            cells.append(_signed(difference) if difference else None)
        rows.append(tuple(cells))
    return Table(columns=tuple(columns), rows=tuple(rows))


def _signed(difference: Interval) -> str | None:
    if math.isnan(difference.mean):
        return None
    return f"{difference.mean:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})"


def _browsable(answers: Sequence[ScoredAnswer]) -> Iterator[Answer]:
    for one in answers:
        yield Answer(
            condition=str(one.condition["name"]),
            question=one.question,
            rollout=int(one.condition["rollout"]),
            text=one.text,
            scores=one.scores,
        )


def _overview(read: Sequence[tuple[RunData, SweepNumbers]]) -> Section:
    """Return the section that compares several runs: one row and one line each."""
    picks = [(run, numbers, pick) for run, numbers in read for pick in numbers.picks]
    risen = [
        run
        for run, _, pick in picks
        if pick.point.differences.get(run.trait) and pick.point.differences[run.trait].low > 0
    ]
    rows = tuple(_overview_row(run, pick) for run, _, pick in picks)
    figures = (_overview_figure(picks),) if picks else ()
    total = len(read)
    return Section(
        id="steering",
        title="Steering, run by run",
        finding=(
            f"In {len(risen)} of {total} evaluations the picked steering raises the trait on "
            f"held-out questions by more than chance (95 %)."
        ),
        figures=figures,
        tables=(
            (
                "Picked points, read on held-out questions",
                Table(
                    columns=(
                        "run", "picked", "unsteered", "steered", "coherence", "random", "prompt",
                    ),
                    rows=rows,
                ),
            ),
        ),
    )  # fmt: skip


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


def _overview_figure(picks: Sequence[tuple[RunData, SweepNumbers, Pick]]) -> Figure:
    """Draw each run's own trait over the coefficient, at the layer picked for it."""
    panels = []
    for label, metric_of in (("trait", None), (COHERENCE, COHERENCE)):
        series = []
        for run, numbers, pick in picks:
            metric = metric_of or run.trait
            if metric not in numbers.metrics:
                continue
            baseline = next((p for p in numbers.points if p.role == "baseline"), None)
            for role, control in (("steered", False), ("random", True)):
                mine = [
                    p
                    for p in numbers.points
                    if p.role == role
                    and p.vector.endswith(pick.vector)
                    and p.layers == pick.point.layers
                ]
                if mine and not (control and metric_of):
                    name = f"{pick.vector}, {_layers(pick.point.layers)}"
                    shown = "random controls" if control else name
                    series.append(_series(shown, mine, baseline, metric, control=control))
        panels.append(Panel(metric=label, series=tuple(series)))
    return curves(
        name="steering_overview",
        title="Every trait at its picked layer",
        caption="Mean score of each run's own trait; dashed and grey: random vectors.",
        x_label="coefficient",
        panels=panels,
    )
