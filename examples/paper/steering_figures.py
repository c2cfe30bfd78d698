"""Figures 1 and 2: vectors from answers, and what steering with them does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.paper.experiments import LAYER
from examples.paper.numbers import Check, format_interval, mean_ci, over_seeds, overall
from examples.paper.plan import KINDS
from examples.paper.replication import Replication, Results, join_words, verdict_clause
from examples.paper.sizes import Size
from pvec.report.axes import SCORE_AXIS, XAxis
from pvec.report.dots import bars
from pvec.report.figure import Figure
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.stats import Interval
from pvec.types import VectorKind

COHERENCE = "coherence"
SMALL = 10.0
"""Points within which a score counts as unmoved."""
KIND_NAMES = dict(
    zip(KINDS, ("response average", "prompt average", "last prompt token"), strict=True)
)


def extraction(results: Results, size: Size) -> Replication:
    """Figure 1: all traits extracted; which kind of vector steers best."""
    scores = {kind: {trait: _best(results, trait, kind) for trait in size.traits} for kind in KINDS}
    by_seed = {kind: _mean_over_traits(list(scores[kind].values())) for kind in KINDS}
    signs = {sign: _answers(results, size, sign[:3]) for sign in ("positive", "negative")}
    apart = _minus(*(_mean_over_traits(list(signs[s].values())) for s in signs))
    response, *others = KINDS
    checks = (
        Check(what="trait score of answers, positive minus negative instructions", values=apart),
        *(
            Check(
                what=f"steered trait score, response average minus {KIND_NAMES[kind]}",
                values=_minus(by_seed[response], by_seed[kind]),
            )
            for kind in others
        ),
    )
    reached = join_words(
        [f"{mean_ci(by_seed[kind])} with the {KIND_NAMES[kind]}" for kind in KINDS]
    )
    return Replication(
        number=1,
        title="Extraction, and which kind of vector steers best",
        paper="vectors are extracted automatically for every trait, and those averaged over "
        "response tokens steer better than those taken from the prompt (section 2, A.3).",
        here=f"over {len(size.traits)} traits the best score at coherence 75 or more is {reached} "
        f"(unsteered {_unsteered(results, size)}); {verdict_clause(overall(checks))}.",
        checks=checks,
        figures=(
            _kinds_figure(scores, size),
            bars(
                name="1_answers",
                title="Answers that the vectors are made of",
                caption="Mean trait score under the trait's positive and negative instructions.",
                label="trait score",
                groups=size.traits,
                series={s: [over_seeds(signs[s][t]) for t in size.traits] for s in signs},
            ),
        ),
        notes=(
            f"Doses are {size.kind_doses} mean residual norms at layer {LAYER} for every kind, "
            "without system prompt. The best dose is chosen on half of the questions and read on "
            "the other half; a kind that keeps no dose coherent counts with the unsteered score.",
        ),
    )


def sweep(results: Results, size: Size) -> Replication:
    """Figure 2: layer × coefficient, with a random vector and the prompt as controls."""
    rise, beyond, random = (dict[str, tuple[float, ...]]() for _ in range(3))
    for trait in size.studied:
        picks = [_pick_scores(one[f"sweep {trait}"]) for one in results]
        steered, plain, control = (
            tuple(p.get(role, {}).get(trait, math.nan) for p in picks)
            for role in ("steered", "unsteered", "random")
        )
        rise[trait] = _minus(steered, plain)
        beyond[trait] = _minus(steered, control)
        random[trait] = _minus(control, plain)
    checks = tuple(
        check
        for trait in size.studied
        for check in (
            Check(what=f"{trait}: steered minus unsteered", values=rise[trait]),
            Check(what=f"{trait}: steered minus random vector", values=beyond[trait]),
            Check(
                what=f"{trait}: random vector minus unsteered",
                values=random[trait],
                bound=SMALL,
                side="within",
            ),
        )
    )
    said = join_words(
        [
            f"{trait} by {mean_ci(rise[trait])} points (a random vector: {mean_ci(random[trait])})"
            for trait in size.studied
        ]
    )
    layers = sorted(
        {
            pick["layer"]
            for one in results
            for t in size.studied
            for pick in one[f"sweep {t}"]["picks"]
        }
    )
    where = "layer " + join_words([str(layer) for layer in layers]) if layers else "no layer"
    return Replication(
        number=2,
        title="Layer and coefficient, with controls",
        paper="adding a persona vector raises its trait the more the larger the coefficient, most "
        "in the middle layers, at some cost to coherence; other directions do not (Fig. 3, 13).",
        here=f"at the picked points (coherence 75 or more, {where}) steering raises {said}; "
        f"{verdict_clause(overall(checks))}.",
        checks=checks,
        figures=tuple(
            figure
            for trait in size.studied
            for figure in (_curves(results, trait), _map(results, trait))
        ),
        notes=(
            "Layer and coefficient are picked on half of the questions; the checks are read on "
            "the other half. Every condition answers the same questions with the same seeds.",
        ),
    )


def _kinds_figure(scores: dict[VectorKind, dict[str, tuple[float, ...]]], size: Size) -> Figure:
    return bars(
        name="1_kinds",
        title="Which kind of vector steers best",
        caption=f"Best trait score at coherence 75 or more, steering at layer {LAYER}.",
        label="trait score",
        groups=size.traits,
        series={
            KIND_NAMES[kind]: [over_seeds(scores[kind][trait]) for trait in size.traits]
            for kind in KINDS
        },
    )


def _curves(results: Results, trait: str) -> Figure:
    points = [one[f"sweep {trait}"]["points"] for one in results]
    layers = sorted({p["layers"][0] for p in points[0] if p["role"] == "steered"})
    panels = []
    for metric, label in ((trait, f"{trait} score"), (COHERENCE, COHERENCE)):
        lines = [
            _line(points, "steered", layer, metric, label=f"layer {layer}") for layer in layers
        ]
        lines.append(
            _line(
                points,
                "random",
                LAYER,
                metric,
                label=f"random, layer {LAYER}",
                control_of=f"layer {LAYER}",
            )
        )
        levels = tuple(
            Level(label=text, value=_level(points, role, metric))
            for role, text in (("prompt_pos", "prompted for"), ("prompt_neg", "prompted against"))
        )
        panels.append(Panel(label=label, lines=lines, levels=levels, limits=SCORE_AXIS))
    return line_chart(
        name=f"2_{trait}_curves",
        title=f"{trait}: dose and effect",
        caption="Means over seeds; coefficient 0 is the unsteered model.",
        x=XAxis(label="coefficient"),
        ordered=True,
        panels=panels,
    )


def _map(results: Results, trait: str) -> Figure:
    points = [one[f"sweep {trait}"]["points"] for one in results]
    steered = [p for p in points[0] if p["role"] == "steered"]
    layers = sorted({p["layers"][0] for p in steered})
    coefs = sorted({p["coef"] for p in steered})
    return heat_map(
        Grid(
            columns=("coefficient", coefs),
            rows=("layer", [str(layer) for layer in layers]),
            values=[
                [_at(points, "steered", layer, coef, trait).mean for coef in coefs]
                for layer in layers
            ],
            value_label=f"{trait} score",
        ),
        name=f"2_{trait}_map",
        title=f"{trait}: layer × coefficient",
        caption="Mean trait score over seeds.",
    )


def _line(
    points: Sequence[Any],
    role: str,
    layer: int,
    metric: str,
    *,
    label: str,
    control_of: str | None = None,
) -> Line:
    coefs = sorted({p["coef"] for p in points[0] if p["role"] == role and p["layers"] == [layer]})
    by_coef = {coef: _at(points, role, layer, coef, metric) for coef in coefs}
    by_coef[0.0] = _level(points, "baseline", metric)
    x = tuple(sorted(by_coef))
    return Line(label=label, x=x, points=tuple(by_coef[coef] for coef in x), control_of=control_of)


def _at(points: Sequence[Any], role: str, layer: int, coef: float, metric: str) -> Interval:
    return over_seeds(
        [
            point["scores"][metric]
            for one in points
            for point in one
            if (point["role"], point["layers"], point["coef"]) == (role, [layer], coef)
        ]
    )


def _level(points: Sequence[Any], role: str, metric: str) -> Interval:
    return over_seeds(
        [point["scores"][metric] for one in points for point in one if point["role"] == role]
    )


def _best(results: Results, trait: str, kind: str) -> tuple[float, ...]:
    found = []
    for one in results:
        made = one[f"kind {trait} {kind}"]
        scores = _pick_scores(made).get("steered")
        found.append(scores[trait] if scores else _baseline(made, trait))
    return tuple(found)


def _baseline(made: Any, trait: str) -> float:
    (point,) = (p for p in made["points"] if p["role"] == "baseline")
    return float(point["scores"][trait])


def _unsteered(results: Results, size: Size) -> str:
    plain = [
        [_baseline(one[f"kind {trait} {KINDS[0]}"], trait) for one in results]
        for trait in size.traits
    ]
    return format_interval(over_seeds(np.mean(plain, axis=0).tolist()))


def _pick_scores(made: Any) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = made["picks"][0]["scores"] if made["picks"] else {}
    return found


def _answers(results: Results, size: Size, sign: str) -> dict[str, tuple[float, ...]]:
    return {
        trait: tuple(one[f"vector {trait}"]["scores"][f"{sign} {trait}"] for one in results)
        for trait in size.traits
    }


def _mean_over_traits(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.mean(values, axis=0))


def _minus(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(one, other, strict=True))
