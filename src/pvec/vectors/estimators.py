"""Estimators of a trait's direction from the activations of single answers at one layer.

The paper's is the difference of the two classes' means. The others are here to be compared with it
on the same answers (docs/methods.md):

==========  ====================================================================================
mean_diff   mean of the positive answers minus mean of the negative ones
caa         mean of the differences of pairs, as Contrastive Activation Addition takes it: answers
            to one question whose opposite number counts too
pca         first principal component of these differences about zero (representation engineering)
lda         mean difference whitened by the covariance within the classes, shrunk after Ledoit and
            Wolf: the direction of linear discriminant analysis
logistic    weights of a logistic regression with scikit-learn's default penalty, classes balanced
==========  ====================================================================================

Each gives a direction. It is returned with the length of the mean difference and pointing its way,
so that a coefficient is the same dose whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pvec import stats
from pvec.errors import InputError, install_command
from pvec.types import MEAN_DIFF, Method, Sign
from pvec.vectors.projection import project
from pvec.vectors.quality import random_halves

PAIRED: tuple[Method, ...] = ("caa", "pca")
"""Methods that use only answers whose opposite number counts too."""

LEARNT: tuple[Method, ...] = ("lda", "logistic")
"""Methods that need scikit-learn."""

LEAST_SHRINKAGE = 1e-6
"""Keeps a covariance invertible whose shrinkage is estimated as zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassActivations:
    """Activations of ``N`` answers at one layer, float64 ``[N, H]``, with what they belong to.

    ``positive`` bool ``[N]``; ``question`` numbers ``[N]`` from 0, or -1 for an answer to a
    question that only one class answers; ``pair`` numbers ``[N]`` that an answer and its opposite
    number share, or -1.
    """

    values: np.ndarray
    positive: np.ndarray
    question: np.ndarray
    pair: np.ndarray

    @classmethod
    def of_answers(
        cls,
        values: np.ndarray,
        *,
        signs: Sequence[Sign],
        questions: Sequence[str],
        pairs: Sequence[str],
    ) -> ClassActivations:
        """Number the questions and pairs of answers; rows of NaN (empty spans) are left out."""
        positive = np.array([sign == "pos" for sign in signs], dtype=bool)
        known = np.isfinite(values).all(axis=1)
        return cls(
            values=np.asarray(values[known], dtype=np.float64),
            positive=positive[known],
            question=_shared(np.array(questions)[known], positive[known]),
            pair=_shared(np.array(pairs)[known], positive[known]),
        )

    @property
    def questions(self) -> int:
        """How many questions both classes answer."""
        return int(self.question.max(initial=-1)) + 1

    def of_questions(self, chosen: np.ndarray) -> ClassActivations:
        """Return the answers to the questions of a mask ``[Q]``."""
        known = self.question >= 0
        rows = known & chosen[np.where(known, self.question, 0)]
        parts = {name: array[rows] for name, array in vars(self).items()}
        return ClassActivations(**parts)

    def mean_difference(self) -> np.ndarray:
        """Return mean(positive) minus mean(negative), ``[H]``."""
        pos, neg = (self.values[self.positive == sign].mean(axis=0) for sign in (True, False))
        difference: np.ndarray = pos - neg
        return difference

    def pair_differences(self) -> np.ndarray:
        """Return positive minus negative of every pair that both classes have, ``[P, H]``."""
        sides = []
        for sign in (True, False):
            rows = np.flatnonzero((self.positive == sign) & (self.pair >= 0))
            sides.append(rows[np.argsort(self.pair[rows], kind="stable")])
        paired = np.intersect1d(self.pair[sides[0]], self.pair[sides[1]])
        pos, neg = (self.values[side[np.isin(self.pair[side], paired)]] for side in sides)
        differences: np.ndarray = pos - neg
        return differences

    def within_classes(self) -> np.ndarray:
        """Return every answer minus its class's mean, ``[N, H]``."""
        centred = self.values.copy()
        for sign in (True, False):
            centred[self.positive == sign] -= centred[self.positive == sign].mean(axis=0)
        return centred


def estimate(activations: ClassActivations, method: Method) -> np.ndarray:
    """Return the direction by ``method``, float64 ``[H]``, as long as the mean difference.

    Zero where the classes do not differ, and for a method of pairs where there is no pair.

    >>> import numpy as np
    >>> rows = ClassActivations.of_answers(
    ...     np.array([[3.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, -1.0]]),
    ...     signs=["pos", "pos", "neg", "neg"],
    ...     questions=["a", "b", "a", "b"],
    ...     pairs=["", "", "", ""],
    ... )
    >>> estimate(rows, "mean_diff")
    array([2., 1.])
    """
    difference = activations.mean_difference()
    length = np.linalg.norm(difference)
    if length == 0.0 or method == MEAN_DIFF:
        return difference
    direction = _ESTIMATORS[method](activations)
    norm = np.linalg.norm(direction)
    if norm == 0.0:
        return np.zeros_like(difference)
    sign = -1.0 if direction @ difference < 0 else 1.0
    scaled: np.ndarray = direction * (sign * length / norm)
    return scaled


def split_quality(
    activations: ClassActivations, method: Method, *, splits: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return held-out AUCs ``[2 splits]`` and split-half cosines ``[splits]`` of a method.

    The vector of one half of the questions is measured on the answers to the other; the same seed
    gives every method the same halves. NaN where a half gives no vector; empty for one question.
    """
    areas, cosines = [], []
    for half in random_halves(activations.questions, splits=splits, seed=seed):
        sides = [activations.of_questions(chosen) for chosen in (half, ~half)]
        vectors = [estimate(side, method) for side in sides]
        cosines.append(cosine_of(*vectors))
        areas += [held_out_area(v, side) for v, side in zip(vectors, sides[::-1], strict=True)]
    return np.array(areas), np.array(cosines)


def held_out_area(vector: np.ndarray, activations: ClassActivations) -> float:
    """Return the AUC of the answers' projections on ``vector``, NaN for a zero vector."""
    if not vector.any():
        return float("nan")
    along = project(activations.values, vector)
    return stats.auc(along[activations.positive], along[~activations.positive])


def cosine_of(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine of two vectors, NaN if one of them is zero."""
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / lengths) if lengths else float("nan")


def require_methods(methods: Sequence[Method]) -> None:
    """Raise ``InputError`` with the install command where a method's package is missing."""
    learnt = [method for method in methods if method in LEARNT]
    if not learnt:
        return
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError(
            f"The method {learnt[0]!r} needs scikit-learn: {install_command('methods')}."
        ) from None


def _caa(activations: ClassActivations) -> np.ndarray:
    differences = activations.pair_differences()
    if not len(differences):
        return np.zeros(activations.values.shape[1])
    mean: np.ndarray = differences.mean(axis=0)
    return mean


def _pca(activations: ClassActivations) -> np.ndarray:
    """The top eigenvector of D'D, by way of DD' where there are fewer pairs than dimensions."""
    from scipy.linalg import eigh

    differences = activations.pair_differences()
    pairs, width = differences.shape
    if not pairs:
        return np.zeros(width)
    wide = pairs < width
    gram = differences @ differences.T if wide else differences.T @ differences
    top = eigh(gram, subset_by_index=[len(gram) - 1] * 2)[1][:, 0]
    direction: np.ndarray = differences.T @ top if wide else top
    return direction


def _lda(activations: ClassActivations) -> np.ndarray:
    """Solve S w = d for the shrunk covariance S of standardised features, in the smaller space."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    centred = activations.within_classes()
    scale = _scale(centred)
    rows: np.ndarray = centred / scale
    difference: np.ndarray = activations.mean_difference() / scale
    count, width = rows.shape
    variance = (rows**2).mean()
    if variance == 0.0:
        return difference
    shrinkage = max(float(ledoit_wolf_shrinkage(rows, assume_centered=True)), LEAST_SHRINKAGE)
    ridge, weight = shrinkage * variance, (1.0 - shrinkage) / count
    if count > width:
        covariance = weight * rows.T @ rows + ridge * np.eye(width)
        solved = np.linalg.solve(covariance, difference)
    else:  # (ridge I + weight R'R)^-1 by Woodbury's identity
        inner = ridge * np.eye(count) + weight * rows @ rows.T
        solved = difference - weight * rows.T @ np.linalg.solve(inner, rows @ difference)
    weights: np.ndarray = solved / scale
    return weights


def _logistic(activations: ClassActivations) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    values = activations.values - activations.values.mean(axis=0)
    scale = _scale(values)
    model = LogisticRegression(class_weight="balanced", max_iter=10_000)
    model.fit(values / scale, activations.positive)
    weights: np.ndarray = model.coef_[0] / scale
    return weights


_ESTIMATORS: dict[Method, Callable[[ClassActivations], np.ndarray]] = {
    "caa": _caa, "pca": _pca, "lda": _lda, "logistic": _logistic,
}  # fmt: skip


def _scale(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation of every feature; 1 for one that does not vary."""
    deviation = values.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _shared(names: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Number the names that both classes have; -1 for others and for empty names."""
    both = np.intersect1d(names[positive], names[~positive])
    both = both[both != ""]
    places = np.searchsorted(both, names) if len(both) else np.zeros(len(names), dtype=np.int64)
    found = both[np.minimum(places, len(both) - 1)] == names if len(both) else False
    return np.where(found, places, -1)
