"""Vectors by other methods than the mean difference, and the methods side by side.

Both work on the activations that ``--keep-activations`` wrote; no model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec.activations.answers import KeptActivations
from pvec.backends.session import ignore
from pvec.errors import InputError
from pvec.models.decoder import check_layer
from pvec.notebook import HtmlResult
from pvec.stats import Interval
from pvec.types import MEAN_DIFF, METHODS, SIGNS, Method, Progress, Sign, VectorKind
from pvec.vectors.accumulate import SPAN_OF_KIND
from pvec.vectors.estimators import (
    PAIRED,
    ClassActivations,
    cosine_of,
    estimate,
    require_methods,
    split_quality,
)
from pvec.vectors.projection import project, quantiles_of
from pvec.vectors.quality import over_splits, stat_arrays
from pvec.vectors.vector import DEFAULT_KIND, KINDS, PersonaVector

LAYER_SPLITS = 10
"""Random halves per layer of a vector file: each fits the method twice."""

COMPARED_SPLITS = 20
"""Random halves at the one layer of a comparison."""

COMPARED_DEPTH = 0.55


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method: held-out AUC and split-half cosine over random halves of the questions, and the
    cosine of its vector (from all answers) to the mean difference.
    """

    method: Method
    auc: Interval
    stability: Interval
    cosine: float


@dataclass(frozen=True, kw_only=True)
class MethodComparison(HtmlResult):
    """The methods on one run's activations, at one layer."""

    trait: str
    model: str
    layer: int
    kind: VectorKind
    answers: Mapping[Sign, int]
    pairs: int
    questions: int
    rows: tuple[MethodRow, ...]


def estimated_vector(
    kept: KeptActivations, method: Method, *, on_progress: Callable[[Progress], None] = ignore
) -> PersonaVector:
    """Return the vector of kept answers by ``method``: all three kinds, with its own quality.

    Raises ``InputError`` for a method of pairs without pairs, or whose package is missing.
    """
    require_methods([method])
    kinds = {kind: np.zeros((kept.num_layers + 1, kept.hidden_size), np.float32) for kind in KINDS}
    areas, cosines = [], []
    places: dict[str, list[np.ndarray]] = {}
    for layer in range(kept.num_layers + 1):
        at_layer = {kind: class_activations(kept, layer, kind) for kind in KINDS}
        _require_pairs(at_layer[DEFAULT_KIND], [method])
        for kind, answers in at_layer.items():
            kinds[kind][layer] = estimate(answers, method)
        quality = split_quality(at_layer[DEFAULT_KIND], method, splits=LAYER_SPLITS)
        areas.append(quality[0])
        cosines.append(quality[1])
        for name, values in _projections(at_layer, kinds[DEFAULT_KIND][layer]).items():
            places.setdefault(name, []).append(values)
        stage = f"{kept.trait}: {method}"
        done = Progress(stage=stage, done=layer + 1, total=kept.num_layers + 1, unit="layers")
        on_progress(done)
    answers = at_layer[DEFAULT_KIND]
    return PersonaVector(
        trait=kept.trait,
        kinds=kinds,
        mean_norm=kept.mean_norm,
        stats={
            **stat_arrays({
                "auc": _over_splits(areas, answers), "stability": _over_splits(cosines, answers),
            }),
            **_class_stats(places),
        },
        metadata={**kept.metadata, "method": method},
    )  # fmt: skip


def compare_methods(
    folder: Path,
    *,
    methods: Sequence[Method] = METHODS,
    layer: int | None = None,
    kind: VectorKind = DEFAULT_KIND,
    on_progress: Callable[[Progress], None] = ignore,
) -> MethodComparison:
    """Compare methods on the activations of a run (or of a folder of them) at one layer.

    ``layer`` defaults to 55 % of the depth. Every method gets the same halves of the questions.
    Raises ``StoreError`` where no activations were kept, ``ModelError`` for a layer that the model
    does not have, ``InputError`` for methods that cannot be used.
    """
    require_methods(methods)
    kept = KeptActivations.read(folder)
    if layer is None:
        layer = max(1, round(COMPARED_DEPTH * kept.num_layers))
    if layer != 0:
        check_layer(layer, kept.num_layers)
    answers = class_activations(kept, layer, kind)
    _require_pairs(answers, methods)
    mean_difference = estimate(answers, MEAN_DIFF)
    rows = []
    for done, method in enumerate(methods, start=1):
        areas, cosines = split_quality(answers, method, splits=COMPARED_SPLITS)
        rows.append(
            MethodRow(
                method=method,
                auc=_over_splits([areas], answers)[0],
                stability=_over_splits([cosines], answers)[0],
                cosine=cosine_of(estimate(answers, method), mean_difference),
            )
        )
        on_progress(Progress(stage=method, done=done, total=len(methods), unit="methods"))
    return MethodComparison(
        trait=kept.trait,
        model=kept.metadata.get("model_id", ""),
        layer=layer,
        kind=kind,
        answers={"pos": int(answers.positive.sum()), "neg": int((~answers.positive).sum())},
        pairs=len(answers.pair_differences()),
        questions=answers.questions,
        rows=tuple(rows),
    )


def class_activations(kept: KeptActivations, layer: int, kind: VectorKind) -> ClassActivations:
    """Return the kept answers at one layer by class."""
    return ClassActivations.of_answers(
        kept.layer(layer, SPAN_OF_KIND[kind]),
        signs=[answer.sign for answer in kept.answers],
        questions=[answer.question for answer in kept.answers],
        pairs=[answer.pair for answer in kept.answers],
    )


def _require_pairs(answers: ClassActivations, methods: Sequence[Method]) -> None:
    paired = [method for method in methods if method in PAIRED]
    if paired and not len(answers.pair_differences()):
        raise InputError(
            f"The method {paired[0]!r} needs pairs, and no answer that counts has an opposite "
            f"number that counts too: use mean_diff, lda or logistic, or loosen --threshold or "
            f"--min-coherence."
        )


def _over_splits(samples: Sequence[np.ndarray], answers: ClassActivations) -> list[Interval]:
    """Return, per layer, mean and central 95 % of the figures of its random halves."""
    by_layer = np.stack(samples, axis=1)  # [splits, L + 1]
    return over_splits(by_layer, n=len(answers.values), groups=answers.questions)


def _projections(
    at_layer: Mapping[VectorKind, ClassActivations], vector: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the projections of answers and prompts' last tokens by class, NaN on a zero vector."""
    found = {}
    for name, kind in (("response", "response_avg"), ("prompt", "prompt_last")):
        answers = at_layer[kind]  # type: ignore[index]
        along = project(answers.values, vector) if vector.any() else np.nan * answers.positive
        for sign in SIGNS:
            found[f"{name}_{sign}"] = along[answers.positive == (sign == "pos")]
    return found


def _class_stats(places: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Return means and quantiles of the classes' projections, per layer ``[L + 1]``."""
    found: dict[str, np.ndarray] = {}
    for name, by_layer in places.items():
        means = [float(values.mean()) for values in by_layer]
        found[f"proj_{name}"] = np.array(means, dtype=np.float32)
    for sign in SIGNS:
        found.update(quantiles_of(sign, np.stack(places[f"response_{sign}"], axis=1)))
    return found
