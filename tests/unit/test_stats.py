"""Statistics against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pvec import stats
from pvec.errors import InputError

RNG = np.random.default_rng(5)


def test_the_interval_of_one_value_per_group_is_scipys_bootstrap() -> None:
    values = RNG.normal(50, 10, size=40)
    ours = stats.bootstrap_mean(values, groups=range(40), resamples=20_000)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.1)
    assert ours.high == pytest.approx(theirs.high, abs=0.1)
    assert (ours.n, ours.groups, ours.missing) == (40, 40, 0)


def test_rollouts_of_one_question_do_not_narrow_the_interval() -> None:
    per_question = RNG.normal(50, 10, size=30)
    once = stats.bootstrap_mean(per_question, groups=range(30))
    ten = stats.bootstrap_mean(
        np.repeat(per_question, 10), groups=np.repeat(np.arange(30), 10).tolist()
    )
    assert (ten.low, ten.high) == pytest.approx((once.low, once.high))
    assert ten.n == 300
    assert ten.groups == 30


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        groups = np.repeat(np.arange(25), 4)
        values = rng.normal(size=25)[groups] * 5 + rng.normal(size=100)
        interval = stats.bootstrap_mean(values, groups=groups.tolist(), resamples=400)
        hits += interval.low <= 0.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_missing_scores_are_left_out_and_counted() -> None:
    result = stats.bootstrap_mean([1.0, None, 3.0, float("nan")], groups=["a", "a", "b", "c"])
    assert result.mean == 2.0
    assert (result.n, result.groups, result.missing) == (2, 2, 2)
    nothing = stats.bootstrap_mean([None, None], groups=["a", "b"])
    assert np.isnan(nothing.mean)
    assert np.isnan(nothing.low)
    assert (nothing.n, nothing.missing) == (0, 2)


def test_one_question_has_a_mean_but_no_interval() -> None:
    result = stats.bootstrap_mean([1.0, 2.0], groups=["a", "a"])
    assert result.mean == 1.5
    assert np.isnan(result.low)
    assert np.isnan(result.high)


def test_the_same_seed_gives_the_same_interval() -> None:
    values, groups = RNG.normal(size=20), list(range(20))
    one, two, three = (stats.bootstrap_mean(values, groups=groups, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one != three


def test_a_constant_shift_is_a_difference_without_spread() -> None:
    values = RNG.normal(50, 20, size=60)
    groups = np.repeat(np.arange(12), 5).tolist()
    result = stats.paired_difference(
        values + 7.0, groups=groups, baseline=values, baseline_groups=groups
    )
    assert (result.mean, result.low, result.high) == pytest.approx((7.0, 7.0, 7.0))


def test_only_questions_of_both_sides_are_compared_and_the_rest_is_counted() -> None:
    result = stats.paired_difference(
        [10.0, 20.0, 90.0, None],
        groups=["a", "b", "c", "a"],
        baseline=[1.0, 3.0, 5.0],
        baseline_groups=["b", "a", "d"],
    )
    assert result.mean == pytest.approx(15.0 - 2.0)
    assert (result.n, result.groups, result.missing) == (2, 2, 3)
    apart = stats.paired_difference([1.0], groups=["a"], baseline=[1.0], baseline_groups=["b"])
    assert np.isnan(apart.mean)
    assert apart.groups == 0


def test_the_area_under_the_curve_is_mann_whitneys_u() -> None:
    one, two = RNG.integers(0, 6, size=30), RNG.integers(1, 7, size=20)
    u = scipy_stats.mannwhitneyu(one, two).statistic
    assert stats.auc(one, two) == pytest.approx(u / 600)
    assert stats.auc([1, 2], [3, 4]) == 0.0
    assert stats.auc([1, 1], [1, 1]) == 0.5
    assert np.isnan(stats.auc([], [1.0]))


def test_pearson_and_its_interval_are_scipys() -> None:
    x = RNG.normal(size=50)
    y = x + RNG.normal(size=50)
    ours = stats.correlation(x, y)
    theirs = scipy_stats.pearsonr(x, y)
    interval = theirs.confidence_interval(0.95)
    assert (ours.r, ours.low, ours.high) == pytest.approx(
        (theirs.statistic, interval.low, interval.high)
    )


def test_spearman_is_scipys_with_bonett_and_wrights_interval() -> None:
    x = RNG.integers(0, 10, size=40)
    y = x + RNG.integers(0, 10, size=40)
    ours = stats.correlation(x, y, method="spearman")
    r = scipy_stats.spearmanr(x, y).statistic
    half = 1.959963984540054 * np.sqrt((1 + r**2 / 2) / 37)
    assert ours.r == pytest.approx(r)
    assert ours.low == pytest.approx(np.tanh(np.arctanh(r) - half))
    assert ours.high == pytest.approx(np.tanh(np.arctanh(r) + half))


def test_correlations_that_cannot_be_known_are_missing() -> None:
    assert np.isnan(stats.correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).r)
    assert np.isnan(stats.correlation([1.0], [2.0]).r)
    short = stats.correlation([1.0, 2.0, 3.0, None], [1.0, 3.0, 2.0, 4.0])
    assert short.r == pytest.approx(0.5)
    assert np.isnan(short.low)
    assert (short.n, short.missing) == (3, 1)
    with pytest.raises(InputError, match="2 and 1"):
        stats.correlation([1.0, 2.0], [1.0])


def test_within_group_correlation_ignores_what_the_groups_differ_in() -> None:
    groups = np.repeat(np.arange(10), 20)
    noise_x, noise_y = RNG.normal(size=(2, 200))
    apart = groups * 100.0
    between = stats.within_group_correlation(apart + noise_x, apart + noise_y, groups.tolist())
    assert abs(between.r) < 0.2
    assert stats.correlation(apart + noise_x, apart + noise_y).r > 0.99
    design = np.column_stack([noise_x, np.eye(10)[groups]])
    y = 2 * noise_x + noise_y + apart
    within = stats.within_group_correlation(noise_x, y, groups.tolist())
    slope = np.linalg.lstsq(design, y, rcond=None)[0][0]  # Frisch-Waugh: the same correlation
    x_part = noise_x - np.array([noise_x[groups == g].mean() for g in groups])
    y_part = y - np.array([y[groups == g].mean() for g in groups])
    assert within.r == pytest.approx(slope * x_part.std() / y_part.std())
    constant = stats.within_group_correlation(apart, y, groups.tolist())
    assert np.isnan(constant.r)


def test_values_and_questions_must_be_as_many() -> None:
    with pytest.raises(InputError, match="2 values for 1 questions"):
        stats.bootstrap_mean([1.0, 2.0], groups=["a"])
