"""Figures 3 and 7: monitoring prompts, and screening training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from examples.paper.experiments import LAST, LAYERS
from examples.paper.figures import HEAD, cells, dots
from examples.paper.monitoring import MODES
from examples.paper.numbers import Check, mean_ci, over_seeds, overall
from examples.paper.replication import Replication, Results, join_words, verdict_clause
from examples.paper.sizes import Size
from examples.paper.steps import Result
from pvec.report.axes import SCORE_AXIS, XAxis, YAxis, exact
from pvec.report.dots import Dot, bars, scatter
from pvec.report.figure import Figure, Table
from pvec.report.figures import histogram
from pvec.stats import auc, correlation

STUDIES = ("system prompts", "shots")
MODE_NAMES = dict(
    zip(MODES, ("last prompt token", "answers to a tenth", "answers to all"), strict=True)
)
SEPARATES = 0.9


def monitoring(results: Results, size: Size) -> Replication:
    """Figure 3: projection at the last prompt token against the score of the answer."""
    found = {
        (study, part): {
            trait: tuple(one[f"monitor {trait}"][study][part][LAST - 1] for one in results)
            for trait in size.studied
        }
        for study in STUDIES
        for part in ("overall", "within")
    }
    by_seed = {
        key: np.mean(list(values.values()), axis=0).tolist() for key, values in found.items()
    }
    checks = tuple(
        Check(
            what=f"{study}: r {'overall' if part == 'overall' else 'within condition'}",
            values=tuple(values),
            r=True,
        )
        for (study, part), values in by_seed.items()
    )
    said = {key: mean_ci(values, r=True) for key, values in by_seed.items()}
    groups = [f"{trait}, {study}" for trait in size.studied for study in STUDIES]
    series = {
        part: [over_seeds(found[study, part][t], r=True) for t in size.studied for study in STUDIES]
        for part in ("overall", "within")
    }
    return Replication(
        number=3,
        title="Monitoring before the answer",
        paper="the projection of the last prompt token foretells the trait of the answer "
        "(r 0.75 to 0.83), mostly by telling conditions apart and less within one (Fig. 4, "
        "Table 2).",
        here=f"r is {said['system prompts', 'overall']} over graded system prompts "
        f"({said['system prompts', 'within']} within one) and {said['shots', 'overall']} over "
        f"numbers of shots ({said['shots', 'within']} within one), the mean of "
        f"{len(size.studied)} traits; {verdict_clause(overall(checks))}.",
        checks=checks,
        figures=(
            bars(
                name="3_correlations",
                title="Correlations, overall and within condition",
                caption="Projection of the last prompt token with the mean score of the answers "
                f"to that prompt, layer {LAST}.",
                label="Pearson's r",
                groups=groups,
                series={"overall": series["overall"], "within condition": series["within"]},
            ),
            _by_layer(results, size),
            *(_cloud(results, trait, study) for trait in size.studied for study in STUDIES),
        ),
    )


def screening(results: Results, size: Size) -> Replication:
    """Figure 7: projection difference before training against the shift it causes."""
    trend, separation = _trend(results, size), _separation(results, size)
    checks = (
        Check(what="r of projection difference and shift, mean over vectors", values=trend, r=True),
        Check(
            what="separation (AUC) of single samples, II from normal",
            values=separation,
            bound=SEPARATES,
        ),
    )
    modes = [[one["screen"]["modes"][mode] for one in results] for mode in MODES]
    cheap = join_words(
        [
            f"{MODE_NAMES[mode]} agrees with it at r "
            f"{mean_ci([one['agreement'] for one in found], r=True)}"
            for mode, found in zip(MODES[:-1], modes[:-1], strict=True)
        ]
    )
    return Replication(
        number=7,
        title="Screening data before training",
        paper="the projection difference of a training set predicts the shift and the trait that "
        "training on it causes, and single samples of trait-eliciting sets are largely separable "
        "from ordinary ones (Fig. 8, 9).",
        here=f"over the sets the difference goes with the later shift at r "
        f"{mean_ci(trend, r=True)} and tells single strong samples from normal ones with AUC "
        f"{mean_ci(separation, r=True)}; of the cheap modes, {cheap}; "
        f"{verdict_clause(overall(checks))}.",
        checks=checks,
        figures=(
            _prediction(results, size),
            *(_samples(results, trait, size.levels) for trait in size.studied),
            _modes(modes),
        ),
    )


def _by_layer(results: Results, size: Size) -> Figure:
    points = [
        Dot(
            group=f"{study}, {part}",
            label=str(layer),
            x=exact(layer),
            y=over_seeds(
                [
                    float(
                        np.mean([one[f"monitor {t}"][study][part][layer - 1] for t in size.studied])
                    )
                    for one in results
                ],
                r=True,
            ),
        )
        for study in STUDIES
        for part in ("overall", "within")
        for layer in LAYERS
    ]
    return dots(
        name="3_layers",
        title="Correlations by layer",
        caption="Mean over traits. What the prompt asks for reaches its last token layer by layer.",
        x_label="layer",
        y_label="Pearson's r",
        points=points,
        joined=True,
    )


def _cloud(results: Results, trait: str, study: str) -> Figure:
    dots = [
        Dot(group=condition, x=exact(projection), y=exact(score))
        for one in results
        for condition, projection, score in one[f"monitor {trait}"][study]["points"]
    ]
    return scatter(
        name=f"3_{trait}_{study.split(maxsplit=1)[0]}",
        title=f"{trait}, {study}",
        caption="One point per prompt and seed.",
        x=XAxis(label=f"projection of the last prompt token, layer {LAST}"),
        y=YAxis(label=f"{trait} score", limits=SCORE_AXIS),
        dots=dots,
    )


def _pairs(one: Mapping[str, Result], trait: str) -> list[tuple[str, float, float]]:
    """Return per training set its mean difference along a vector, and the shift it caused."""
    sets = one["screen"]["differences"][trait]
    return [(name, float(np.nanmean(d)), one["shift"][name][trait]) for name, d in sets.items()]


def _trend(results: Results, size: Size) -> tuple[float, ...]:
    return tuple(
        float(
            np.mean(
                [
                    correlation(*np.array([p[1:] for p in _pairs(one, trait)]).T).r
                    for trait in size.studied
                ]
            )
        )
        for one in results
    )


def _separation(results: Results, size: Size) -> tuple[float, ...]:
    found = []
    for one in results:
        sets = one["screen"]["differences"]
        each = [auc(sets[t][f"{t} II"], sets[t][f"{t} normal"]) for t in size.studied]
        found.append(float(np.mean(each)))
    return tuple(found)


def _prediction(results: Results, size: Size) -> Figure:
    points = []
    for trait in size.studied:
        per_seed = [_pairs(one, trait) for one in results]
        for same in zip(*per_seed, strict=True):
            x, y = (over_seeds([point[axis] for point in same]) for axis in (1, 2))
            points.append(Dot(group=f"along {trait}", label=same[0][0], x=x, y=y))
    return dots(
        name="7_prediction",
        title="Projection difference before, shift after",
        caption="One point per training set and vector, means over seeds.",
        x_label=f"mean projection difference, layer {LAST}",
        y_label=f"finetuning shift, layer {LAST}",
        points=points,
    )


def _samples(results: Results, trait: str, levels: Sequence[str]) -> Figure:
    pooled = [
        (
            level,
            [d for one in results for d in one["screen"]["differences"][trait][f"{trait} {level}"]],
        )
        for level in levels
    ]
    return histogram(
        name=f"7_{trait}_samples",
        title=f"Single samples along {trait}",
        caption="Projection difference of each sample from the model's own answer, all seeds.",
        x=XAxis(label=f"projection difference, layer {LAST}"),
        y_label="samples",
        groups=[(level, [v for v in values if v == v]) for level, values in pooled],  # noqa: PLR0124
    )


def _modes(modes: Sequence[Sequence[dict[str, float]]]) -> Figure:
    parts = {"agreement": "agreement (r)", "auc": "separation (AUC)"}
    rows = tuple(
        (MODE_NAMES[mode], part, *cells(over_seeds([one[part] for one in found], r=part in parts)))
        for mode, found in zip(MODES, modes, strict=True)
        for part in (*parts, "answers", "cpu")
    )
    return bars(
        name="7_modes",
        title="What the cheap modes cost",
        caption="Natural answers to all prompts, to a tenth (the rest predicted from the last "
        "prompt token), or that token's projection instead. The CSV has the answers generated "
        "and the CPU seconds.",
        label="r or AUC",
        groups=[MODE_NAMES[mode] for mode in MODES],
        series={
            text: [over_seeds([one[part] for one in found], r=True) for found in modes]
            for part, text in parts.items()
        },
        table=Table(columns=("mode", "what", *HEAD), rows=rows),
    )
