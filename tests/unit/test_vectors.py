"""Vectors from streams, their quality figures, the suggested layer, and arithmetic."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from pvec.errors import InputError, ModelError
from pvec.steering.instructions import raw_coefficient
from pvec.types import SpanMeans
from pvec.vectors import accumulate as module
from pvec.vectors.accumulate import VectorAccumulator
from pvec.vectors.edit import linear_combination, orthogonalise
from pvec.vectors.quality import suggest_layer
from pvec.vectors.show import cosine_matrix
from pvec.vectors.vector import PersonaVector

LAYERS, WIDTH = 5, 16
Row = tuple[SpanMeans, Literal["pos", "neg"], str]


def responses(
    *, questions: int = 10, each: int = 6, signal: float = 1.0, seed: int = 0
) -> list[Row]:
    """Positive and negative responses that differ along one direction from layer 2 on."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=WIDTH)
    rows: list[Row] = []
    for q, r, sign in itertools.product(range(questions), range(each), ("pos", "neg")):
        means = rng.normal(size=(3, LAYERS + 1, WIDTH))
        means[:, 2:] += (signal if sign == "pos" else -signal) * direction
        means = means.astype(np.float32)
        spans = dict(zip(("prompt", "prompt_last", "response"), means, strict=True))
        norms = {name: np.linalg.norm(m, axis=-1) for name, m in spans.items()}
        row = SpanMeans(
            id=f"{q}-{r}-{sign}", layers=tuple(range(LAYERS + 1)), means=spans, norms=norms
        )
        rows.append((row, sign, f"question {q}"))
    return rows


def accumulated(rows: list[Row]) -> VectorAccumulator:
    accumulator = VectorAccumulator()
    for row, sign, question in rows:
        accumulator.add(row, sign=sign, question=question)
    return accumulator


def test_a_vector_is_the_difference_of_class_means_of_response_means() -> None:
    rows = responses()[:-7]  # classes and questions of different sizes
    result = accumulated(rows).result()
    for kind, span in (
        ("response_avg", "response"),
        ("prompt_avg", "prompt"),
        ("prompt_last", "prompt_last"),
    ):
        pos, neg = (
            np.mean([r.means[span].astype(np.float64) for r, s, _ in rows if s == sign], axis=0)
            for sign in ("pos", "neg")
        )
        np.testing.assert_allclose(result.vectors[kind], pos - neg, rtol=1e-6, atol=1e-7)
        assert result.vectors[kind].dtype == np.float32
    np.testing.assert_allclose(
        result.mean_norm, np.mean([r.norms["response"] for r, *_ in rows], axis=0), rtol=1e-6
    )
    assert result.counts["response_avg"] == {"pos": 57, "neg": 56}


def test_an_empty_answer_is_counted_as_missing_and_changes_nothing_else() -> None:
    rows = responses()
    empty = SpanMeans(
        id="empty",
        layers=rows[0][0].layers,
        means=rows[0][0].means | {"response": np.full((LAYERS + 1, WIDTH), np.nan)},
        norms=rows[0][0].norms | {"response": np.full(LAYERS + 1, np.nan)},
    )
    before = accumulated(rows).result()
    after = accumulated([*rows, (empty, "pos", "question 0")]).result()
    assert np.array_equal(before.vectors["response_avg"], after.vectors["response_avg"])
    assert np.array_equal(before.mean_norm, after.mean_norm)
    assert after.missing["response_avg"] == {"pos": 1, "neg": 0}
    assert after.counts["prompt_avg"]["pos"] == 61


def test_infinite_activations_are_refused_with_their_layer() -> None:
    row, sign, question = responses()[0]
    row.means["response"][3, 1] = np.inf
    with pytest.raises(ModelError, match="layer 3"):
        VectorAccumulator().add(row, sign=sign, question=question)


def test_a_class_without_responses_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="No negative response was kept"):
        accumulated([row for row in responses() if row[1] == "pos"]).result()


def test_the_places_of_the_classes_along_the_vector_are_means_of_projections() -> None:
    rows = responses()[:-7]
    accumulator = accumulated(rows)
    found = accumulator.class_projections()
    vector = accumulator.result().vectors["response_avg"].astype(np.float64)
    for name, span in (("response", "response"), ("prompt", "prompt_last")):
        for sign in ("pos", "neg"):
            for layer in range(1, LAYERS + 1):
                unit = vector[layer] / np.sqrt((vector[layer] ** 2).sum())
                expected = np.mean([r.means[span][layer] @ unit for r, s, _ in rows if s == sign])
                assert found[f"proj_{name}_{sign}"][layer] == pytest.approx(expected, rel=1e-4)


def test_quantiles_of_the_classes_are_those_of_their_projections() -> None:
    rows = responses(each=5)  # as many as are sampled
    accumulator = accumulated(rows)
    found = accumulator.class_quantiles()
    vector = accumulator.result().vectors["response_avg"].astype(np.float64)
    unit = vector[2] / np.sqrt((vector[2] ** 2).sum())
    for sign in ("pos", "neg"):
        along = [r.means["response"][2] @ unit for r, s, _ in rows if s == sign]
        for share in (0.0, 0.25, 0.5, 1.0):
            expected = np.percentile(along, 100 * share)
            key = f"proj_response_{sign}_q{round(100 * share):02}"
            assert found[key][2] == pytest.approx(expected, rel=1e-4)


def test_the_order_of_arrival_changes_no_quality_figure() -> None:
    rows = responses(each=12)
    shuffled = random.Random(0).sample(rows, len(rows))
    one, two = accumulated(rows), accumulated(shuffled)
    for a, b in zip(one.separation(), two.separation(), strict=True):
        assert a.mean == pytest.approx(b.mean, nan_ok=True)
    for a, b in zip(one.stability(), two.stability(), strict=True):
        assert a.mean == pytest.approx(b.mean)


def test_stability_and_separation_see_signal_where_it_is_and_only_there() -> None:
    accumulator = accumulated(responses())
    stability, separation = accumulator.stability(), accumulator.separation()
    assert len(stability) == len(separation) == LAYERS + 1
    for layer in range(2):
        assert abs(stability[layer].mean) < 0.4
        assert 0.35 < separation[layer].mean < 0.65
    for layer in range(2, LAYERS + 1):
        assert stability[layer].mean > 0.9
        assert stability[layer].low <= stability[layer].mean <= stability[layer].high
        assert separation[layer].mean > 0.95
    assert stability[2].n == 120
    assert stability[2].groups == 10
    assert separation[2].n == 2 * 10 * module._SAMPLE_PER_QUESTION


def test_pure_noise_is_not_flattered() -> None:
    """Without held-out questions the area under the curve of noise would be near 1."""
    separation = accumulated(responses(questions=6, each=2, signal=0.0)).separation()
    assert all(0.25 < one.mean < 0.75 for one in separation)


def test_one_question_has_no_halves() -> None:
    accumulator = accumulated(responses(questions=1))
    assert np.isnan(accumulator.stability()[2].mean)
    assert np.isnan(accumulator.separation()[2].mean)


def test_memory_does_not_grow_with_responses_or_questions() -> None:
    accumulator = accumulated(responses(questions=200, each=2))
    cells = [c for cells in accumulator._cells.values() for c in cells.values()]
    assert len(cells) == 6 * module._MAX_QUESTIONS
    assert all(len(cell.sample) <= module._SAMPLE_PER_QUESTION for cell in cells)
    assert sum(accumulator.result().counts["response_avg"].values()) == 800


def vector_with(
    rows: np.ndarray, norms: np.ndarray, areas: Sequence[float] | None = None
) -> PersonaVector:
    stats = {} if areas is None else {"auc": np.array(areas)}
    return PersonaVector(trait="evil", kinds={"response_avg": rows}, mean_norm=norms, stats=stats)


def test_the_suggested_layer_separates_and_is_long_in_the_middle() -> None:
    norms = np.ones(11)
    lengths = np.array([9, 9, 9, 1, 1, 1, 1, 1, 2, 9, 9], dtype=float)
    rows = np.eye(11) * lengths[:, None]
    layer, _ = suggest_layer(vector_with(rows, norms))
    assert layer == 8, "the longest of layers 3 to 8"
    areas = [0.5] * 11
    areas[4], areas[8] = 0.99, 0.6
    layer, reason = suggest_layer(vector_with(rows, norms, areas))
    assert layer == 4
    assert "AUC 0.99" in reason
    layer, _ = suggest_layer(vector_with(np.eye(11), norms, [1.0] * 11))
    assert layer == 5, "of equals the one nearest 55 % depth"
    assert suggest_layer(vector_with(np.eye(2), np.ones(2)))[0] == 1


def test_a_relative_norm_is_the_length_in_residual_norms() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 2.0]])
    norms = np.array([10.0, 4.0])
    np.testing.assert_allclose(vector_with(rows, norms).relative_norms(), [0.5, 0.5])
    coef = raw_coefficient(0.25, vector=rows[0], mean_norm=10.0)
    assert np.linalg.norm(coef * rows[0]) == pytest.approx(2.5)
    with pytest.raises(InputError, match="zero vector"):
        raw_coefficient(1.0, vector=np.zeros(2), mean_norm=1.0)


def test_increments_add_up_to_the_vector_of_every_layer() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    steps = vector_with(rows, np.ones(6)).increments()
    np.testing.assert_allclose(np.cumsum(steps[1:], axis=0), rows[1:])
    assert np.array_equal(steps[0], rows[0])


def test_combination_is_linear_and_needs_one_shape() -> None:
    one, two = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        linear_combination([(0.7, one), (-0.3, two)]), 0.7 * one - 0.3 * two, rtol=1e-6
    )
    with pytest.raises(InputError, match="one shape"):
        linear_combination([(1.0, one), (1.0, two[:2])])


def test_an_orthogonalised_vector_has_nothing_along_the_others() -> None:
    rng = np.random.default_rng(0)
    vector, *others = rng.normal(size=(3, 4, 8)).astype(np.float32)
    others[0][2] = 0.0
    others.append(2 * others[1])  # dependent ones do no harm
    result = orthogonalise(vector, against=others)
    for other in others:
        np.testing.assert_allclose((result * other).sum(1), 0.0, atol=1e-5)
    direct = orthogonalise(vector, against=others[:1])
    unit = others[0][1] / np.linalg.norm(others[0][1])
    np.testing.assert_allclose(
        direct[1], vector[1] - (vector[1] @ unit) * unit, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(direct[2], vector[2])


def test_the_cosine_matrix_is_numpys_correlation_without_centring() -> None:
    vectors = list(np.random.default_rng(0).normal(size=(3, 8)))
    matrix = cosine_matrix(vectors)
    for i, j in itertools.product(range(3), repeat=2):
        wanted = vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
        assert matrix[i, j] == pytest.approx(wanted)
