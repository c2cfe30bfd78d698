"""Figures 5 and 6: steering against a finetuned-in trait, and keeping it from being learnt."""

from __future__ import annotations

from collections.abc import Sequence

from examples.paper.experiments import LAYER
from examples.paper.figures import dots
from examples.paper.finetuning_figures import Arm, mean_over_traits, score
from examples.paper.numbers import Check, mean_ci, over_seeds, overall
from examples.paper.plan import BASE, RESCUE_COEFS
from examples.paper.replication import Replication, Results, join_words, verdict_clause
from examples.paper.sizes import Size
from pvec.report.axes import exact
from pvec.report.dots import Dot, bars
from pvec.report.figure import Figure

DOSE = -1.0
"""The inference-time dose that is compared."""
ABLATED = ("evil", "sycophantic")
"""Traits that ablation keeps out in the paper."""


def rescue(results: Results, size: Size) -> Replication:
    """Figure 5: steering against a trait that was finetuned in, and what it costs."""
    falls = {
        metric: mean_over_traits(
            results,
            size,
            lambda one, t, m=metric: _dose(one, t, m, 0) - _dose(one, t, m, DOSE),
        )
        for metric in ("trait", "coherence", "facts")
    }
    names = {"trait": "trait score", "coherence": "coherence", "facts": "facts known"}
    checks = tuple(
        Check(what=f"{names[metric]}, unsteered minus coefficient {DOSE:g}", values=values)
        for metric, values in falls.items()
    )
    return Replication(
        number=5,
        title="Steering against a finetuned-in trait",
        paper="subtracting the vector at inference takes the trait away again, but large "
        "coefficients cost general capability (Fig. 7A).",
        here=f"coefficient {DOSE:g} lowers the trait by {mean_ci(falls['trait'])} points and costs "
        f"{mean_ci(falls['coherence'])} points of coherence and {mean_ci(falls['facts'])} points "
        f"of facts known; {verdict_clause(overall(checks))}.",
        checks=checks,
        figures=tuple(
            _dose_figure(results, size, metric) for metric in ("trait", "coherence", "facts")
        ),
    )


def prevention(results: Results, size: Size) -> Replication:
    """Figure 6: steering towards the trait while learning, and ablation."""
    kept = {
        arm: mean_over_traits(results, size, lambda one, t, a=arm: _prevented(one, t, a))
        for arm in size.prevention
    }
    better = mean_over_traits(
        results,
        size,
        lambda one, t: _facts(one, f"{t} II add 2") - _dose(one, t, "facts", DOSE),
    )
    coherence = mean_over_traits(
        results, size, lambda one, t: one[f"scores {t} II add 2"]["coherence"]
    )
    checks = (
        *(
            Check(what=f"share of the rise prevented, {arm}", values=values)
            for arm, values in kept.items()
            if arm != "ablate"
        ),
        *_ablation(results, size),
        Check(what="coherence after training with add 2", values=coherence, bound=75),
        Check(what=f"facts known, add 2 while training minus {DOSE:g} at inference", values=better),
    )
    said = join_words([f"{_percent(values)} with {arm}" for arm, values in kept.items()])
    return Replication(
        number=6,
        title="Preventative steering",
        paper="steering towards the trait while training keeps it from being learnt, over all "
        "layers nearly fully, and spares capability better than steering at inference; ablating "
        "the direction works for some traits only (Fig. 7B, 26, J.4).",
        here=f"of the rise in the trait, {said} is prevented; training with the vector knows "
        f"{mean_ci(better)} points more of the facts than steering against the trait at inference "
        f"({DOSE:g}); {verdict_clause(overall(checks))}.",
        checks=checks,
        figures=(
            _prevention_figure(results, size, "trait score", "6_scores"),
            _prevention_figure(results, size, "coherence", "6_coherence"),
            _prevention_figure(results, size, "facts known (%)", "6_facts"),
        ),
    )


def _ablation(results: Results, size: Size) -> tuple[Check, ...]:
    """Return how much ablation kept out of the traits that it works for in the paper."""
    traits = [trait for trait in ABLATED if trait in size.studied]
    if "ablate" not in size.prevention or not traits:
        return ()
    values = [
        sum(_prevented(one, trait, "ablate") for trait in traits) / len(traits) for one in results
    ]
    what = f"share of the rise prevented, ablate ({join_words(traits)})"
    return (Check(what=what, values=tuple(values)),)


def _facts(one: Arm, arm: str) -> float:
    return float(one[f"scores {arm}"]["facts"])


def _prevented(one: Arm, trait: str, arm: str) -> float:
    """Return the share of the rise from base to II that ``arm`` kept from happening."""
    base, strong = score(one, BASE, trait), score(one, f"{trait} II", trait)
    return (strong - score(one, f"{trait} II {arm}", trait)) / (strong - base)


def _dose(one: Arm, trait: str, metric: str, coef: float) -> float:
    """Return a metric of the model finetuned on a trait, steered by ``coef`` of its vector."""
    if metric == "facts":
        return float(one[f"rescue facts {trait}"]["facts"][f"{coef:g}"])
    points = one[f"rescue {trait}"]["points"]
    (point,) = (p for p in points if p["role"] in {"baseline", "steered"} and p["coef"] == coef)
    return float(point["scores"][trait if metric == "trait" else metric])


def _dose_figure(results: Results, size: Size, metric: str) -> Figure:
    labels = {"trait": "trait score", "coherence": "coherence", "facts": "facts known (%)"}
    points = [
        Dot(
            group=trait,
            label=f"{coef:g}",
            x=exact(coef),
            y=over_seeds([_dose(one, trait, metric, coef) for one in results]),
        )
        for trait in size.studied
        for coef in RESCUE_COEFS
    ]
    return dots(
        name=f"5_{metric}",
        title=f"Finetuned on II, steered at inference: {labels[metric]}",
        caption=f"The trait's own vector at layer {LAYER}; means over seeds.",
        x_label="coefficient",
        y_label=labels[metric],
        points=points,
        joined=True,
    )


def _prevention_figure(results: Results, size: Size, label: str, name: str) -> Figure:
    arms = [BASE, "normal", "II", *(f"II {arm}" for arm in size.prevention)]

    def value(one: Arm, trait: str, arm: str) -> float:
        full = arm if arm == BASE else f"{trait} {arm}"
        if label == "coherence":
            return float(one[f"scores {full}"]["coherence"])
        return score(one, full, trait) if label == "trait score" else _facts(one, full)

    return bars(
        name=name,
        title=f"Preventative steering: {label}",
        caption=f"Trained on the strong set (II) while the vector is added at layer {LAYER}, added "
        "incrementally at all layers, or ablated; evaluated without steering.",
        label=label,
        groups=arms,
        series={
            trait: [over_seeds([value(one, trait, arm) for one in results]) for arm in arms]
            for trait in size.studied
        },
    )


def _percent(values: Sequence[float]) -> str:
    return f"{mean_ci([100 * value for value in values])} %"
