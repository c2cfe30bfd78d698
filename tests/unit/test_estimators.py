"""Estimators of a vector, against scikit-learn, scipy and plain loops."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from pvec.errors import InputError
from pvec.types import METHODS, Method, Sign
from pvec.vectors.estimators import (
    ClassActivations,
    cosine_of,
    estimate,
    require_methods,
    split_quality,
)
from pvec.vectors.quality import random_halves


def answers(*, pairs: int = 30, width: int = 12, seed: int = 0) -> ClassActivations:
    """Correlated noise with a shift between the classes; one answer has no opposite number."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(4, 0.2, width)
    shift = rng.normal(size=width)
    signs: list[Sign] = [*["pos"] * pairs, *["neg"] * pairs]
    values = rng.normal(size=(2 * pairs, width)) @ mixing.T
    values[:pairs] += shift
    names = [f"p{n}" for n in range(pairs)]
    return ClassActivations.of_answers(
        values,
        signs=signs,
        questions=[f"q{n % 6}" for n in range(pairs)] * 2,
        pairs=[*names[:-1], "alone", *names],
    )


def classes(data: ClassActivations) -> tuple[np.ndarray, np.ndarray]:
    return data.values[data.positive], data.values[~data.positive]


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_the_mean_difference_is_that_of_two_loops() -> None:
    data = answers()
    pos, neg = classes(data)
    expected = sum(pos) / len(pos) - sum(neg) / len(neg)
    np.testing.assert_allclose(estimate(data, "mean_diff"), expected)


def test_caa_averages_the_differences_of_whole_pairs() -> None:
    data = answers()
    pos, neg = classes(data)
    by_hand = np.mean([pos[n] - neg[n] for n in range(29)], axis=0)  # the last has no opposite
    assert cosine(estimate(data, "caa"), by_hand) == pytest.approx(1)


@pytest.mark.parametrize(("pairs", "width"), [(30, 12), (8, 40)])
def test_pca_is_the_first_component_of_the_pairs_about_their_middle(pairs: int, width: int) -> None:
    data = answers(pairs=pairs, width=width)
    pos, neg = classes(data)
    half = (pos[: pairs - 1] - neg[: pairs - 1]) / 2
    component = PCA(n_components=1).fit(np.concatenate([half, -half])).components_[0]
    found = estimate(data, "pca")
    assert abs(cosine(found, component)) == pytest.approx(1)
    assert found @ estimate(data, "mean_diff") > 0


@pytest.mark.parametrize(("pairs", "width"), [(30, 12), (8, 40)])
def test_lda_solves_for_the_shrunk_covariance(pairs: int, width: int) -> None:
    data = answers(pairs=pairs, width=width)
    pos, neg = classes(data)
    centred = np.concatenate([pos - pos.mean(axis=0), neg - neg.mean(axis=0)])
    scale = centred.std(axis=0)
    covariance = LedoitWolf(assume_centered=True).fit(centred / scale).covariance_
    solved = np.linalg.solve(covariance, (pos.mean(axis=0) - neg.mean(axis=0)) / scale) / scale
    assert cosine(estimate(data, "lda"), solved) == pytest.approx(1)


def test_lda_finds_the_direction_that_noise_hides_from_the_mean_difference() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4000, 2)) @ np.array([[3.0, 2.9], [0.0, 0.3]])
    values = noise + np.outer(np.arange(4000) < 2000, [0.5, 0.0])
    signs: list[Sign] = ["pos"] * 2000 + ["neg"] * 2000
    data = ClassActivations.of_answers(
        values, signs=signs, questions=["q"] * 4000, pairs=[""] * 4000
    )
    covariance = np.array([[3.0, 2.9], [0.0, 0.3]]).T @ np.array([[3.0, 2.9], [0.0, 0.3]])
    best = np.linalg.solve(covariance, [0.5, 0.0])
    assert cosine(estimate(data, "lda"), best) > 0.99
    assert cosine(estimate(data, "mean_diff"), best) < 0.9


def test_logistic_minimises_the_penalised_balanced_loss() -> None:
    data = answers(pairs=20, width=4)
    unbalanced = data.of_questions(np.array([True] * 6))
    rows = np.r_[0:20, 20:32]
    unbalanced = ClassActivations(**{name: array[rows] for name, array in vars(data).items()})
    scaled = unbalanced.values - unbalanced.values.mean(axis=0)
    scale = scaled.std(axis=0)
    scaled, side = scaled / scale, np.where(unbalanced.positive, 1.0, -1.0)
    share = np.where(unbalanced.positive, 32 / 40, 32 / 24)

    def loss(parameters: np.ndarray) -> float:
        margins = side * (scaled @ parameters[:4] + parameters[4])
        penalty = parameters[:4] @ parameters[:4] / 2
        return float(penalty + share @ np.logaddexp(0, -margins))

    best = minimize(loss, np.zeros(5), options={"gtol": 1e-8}).x[:4] / scale
    assert cosine(estimate(unbalanced, "logistic"), best) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_vector_is_as_long_as_the_mean_difference_and_points_its_way(method: Method) -> None:
    data = answers(seed=3)
    vector, difference = estimate(data, method), estimate(data, "mean_diff")
    assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(difference))
    assert vector @ difference > 0


@pytest.mark.parametrize("method", METHODS)
def test_classes_that_do_not_differ_give_no_vector(method: Method) -> None:
    signs: list[Sign] = ["pos", "neg"] * 4
    data = ClassActivations.of_answers(
        np.ones((8, 3)), signs=signs, questions=list("aabbccdd"), pairs=list("aabbccdd")
    )
    assert not estimate(data, method).any()
    areas, cosines = split_quality(data, method, splits=2)
    assert np.isnan(areas).all()
    assert np.isnan(cosines).all()


def test_quality_is_measured_on_the_other_half_of_the_questions() -> None:
    data = answers()
    areas, cosines = split_quality(data, "mean_diff", splits=3, seed=5)
    expected_areas, expected_cosines = [], []
    for half in random_halves(6, splits=3, seed=5):
        sides = [data.of_questions(chosen) for chosen in (half, ~half)]
        vectors = [np.subtract(*(c.mean(axis=0) for c in classes(side))) for side in sides]
        expected_cosines.append(cosine(*vectors))
        expected_areas += [
            roc_auc_score(other.positive, other.values @ vector)
            for vector, other in zip(vectors, sides[::-1], strict=True)
        ]
        asked = [set(side.question.tolist()) for side in sides]
        assert asked[0].isdisjoint(asked[1])
    np.testing.assert_allclose(areas, expected_areas)
    np.testing.assert_allclose(cosines, expected_cosines)


def test_questions_and_pairs_of_one_class_alone_do_not_count() -> None:
    signs: list[Sign] = ["pos", "neg", "pos", "neg"]
    data = ClassActivations.of_answers(
        np.array([[1.0], [0.0], [5.0], [np.nan]]),
        signs=signs,
        questions=["a", "a", "b", "b"],
        pairs=["x", "x", "y", "y"],
    )
    assert data.questions == 1
    assert data.pair_differences().tolist() == [[1.0]]
    assert len(split_quality(data, "mean_diff", splits=4)[0]) == 0


def test_a_probe_without_scikit_learn_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    require_methods(["mean_diff", "caa", "pca"])
    with pytest.raises(InputError, match=r"'lda' needs scikit-learn: pip install '\.\[methods\]'"):
        require_methods(["mean_diff", "lda"])


def test_the_cosine_of_a_zero_vector_is_unknown() -> None:
    assert np.isnan(cosine_of(np.zeros(2), np.ones(2)))
    assert all(a < b for a, b in pairwise([cosine_of(np.array([1.0, 0]), np.array([0, 1.0])), 1]))
