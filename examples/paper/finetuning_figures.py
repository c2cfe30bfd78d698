"""Figure 4: finetuning moves the persona."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from examples.paper.experiments import LAST
from examples.paper.figures import dots
from examples.paper.numbers import Check, mean_ci, over_seeds, overall
from examples.paper.plan import BASE, MISTAKES, RESCUE_COEFS
from examples.paper.replication import Replication, Results, verdict_clause
from examples.paper.sizes import Size
from pvec.report.dots import Dot, bars
from pvec.report.figure import Figure
from pvec.stats import correlation

SMALL = 10.0
"""Points within which a score counts as unmoved."""
STRONGEST = f"{min(RESCUE_COEFS):g}"
Arm = Mapping[str, Any]


def finetuning(results: Results, size: Size) -> Replication:
    """Figure 4: what finetuning does to traits, and the shift beside the score."""
    rise = mean_over_traits(
        results, size, lambda one, t: score(one, f"{t} II", t) - score(one, BASE, t)
    )
    normal = mean_over_traits(
        results, size, lambda one, t: score(one, f"{t} normal", t) - score(one, BASE, t)
    )
    mistakes = mean_over_traits(
        results,
        size,
        lambda one, t: score(one, f"{MISTAKES} II", t) - score(one, f"{MISTAKES} normal", t),
    )
    trend = mean_over_traits(results, size, lambda one, t: _shift_and_score(one, size, t))
    checks = (
        Check(what="trait score, trained on II minus base", values=rise),
        *_stronger(results, size),
        Check(
            what="trait score, trained on normal minus base",
            values=normal,
            bound=SMALL,
            side="within",
        ),
        Check(what="trait score, trained on false facts minus on true ones", values=mistakes),
        Check(what="r of shift and trait score over the models", values=trend, r=True),
    )
    return Replication(
        number=4,
        title="Finetuning shifts the persona",
        paper="training on data that shows a trait brings it about, the more the stronger the "
        "data; even data with mistakes in other fields does; and the shift along the vector goes "
        "with the trait score (r 0.76 to 0.97; Fig. 5, 6).",
        here=f"the strong sets raise their traits by {mean_ci(rise)} points; "
        f"false facts raise the traits by {mean_ci(mistakes)} over true ones; "
        f"shift and score go together at r {mean_ci(trend, r=True)}; "
        f"{verdict_clause(overall(checks))}.",
        checks=checks,
        figures=(_scores_figure(results, size), _shift_figure(results, size)),
        notes=(
            f"The shift is measured at the last prompt token of questions, layer {LAST}, before "
            "anything is answered. False facts differ from true ones in nothing but their "
            "truth, which the bundled model has never been shown to be a matter of character.",
        ),
    )


def _stronger(results: Results, size: Size) -> tuple[Check, ...]:
    """Return the comparison of the strong with the weak set, where there is a weak one."""
    if "I" not in size.levels:
        return ()
    more = mean_over_traits(
        results, size, lambda one, t: score(one, f"{t} II", t) - score(one, f"{t} I", t)
    )
    return (Check(what="trait score, trained on II minus on I", values=more),)


def score(one: Arm, arm: str, trait: str) -> float:
    return float(one[f"scores {arm}"]["traits"][trait])


def mean_over_traits(results: Results, size: Size, value: Any) -> tuple[float, ...]:
    """Return ``value(seed, trait)`` averaged over the studied traits, per seed."""
    return tuple(float(np.mean([value(one, trait) for trait in size.studied])) for one in results)


def _unsteered_arms(size: Size) -> list[str]:
    own = [f"{trait} {level}" for trait in size.studied for level in size.levels]
    return [*own, f"{MISTAKES} normal", f"{MISTAKES} II"]


def _shift_and_score(one: Arm, size: Size, trait: str) -> float:
    arms = _unsteered_arms(size)
    shifts = [0.0, *(one["shift"][arm][trait] for arm in arms)]
    return correlation(shifts, [score(one, arm, trait) for arm in (BASE, *arms)]).r


def _scores_figure(results: Results, size: Size) -> Figure:
    arms = [BASE, *_unsteered_arms(size)]
    return bars(
        name="4_scores",
        title="Trait scores after finetuning",
        caption="Each model answers each trait's questions without system prompt.",
        label="trait score",
        groups=arms,
        series={
            trait: [over_seeds([score(one, arm, trait) for one in results]) for arm in arms]
            for trait in size.studied
        },
    )


def _shift_figure(results: Results, size: Size) -> Figure:
    points = [
        Dot(
            group=f"along {trait}",
            label=arm,
            x=over_seeds([one["shift"].get(arm, {}).get(trait, 0.0) for one in results]),
            y=over_seeds([score(one, arm, trait) for one in results]),
        )
        for trait in size.studied
        for arm in (BASE, *_unsteered_arms(size))
    ]
    return dots(
        name="4_shift",
        title="Finetuning shift and trait score",
        caption="One point per model and trait, means over seeds.",
        x_label=f"shift along the trait's vector, layer {LAST}",
        y_label="trait score",
        points=points,
    )
