"""Statistics against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pvec import stats
from pvec.errors import InputError

RNG = np.random.default_rng(5)


def test_the_interval_of_values_without_skewness_is_students() -> None:
    values = np.concatenate([50 + np.arange(1, 11), 50 - np.arange(1, 11)]).astype(float)
    ours = stats.grouped_mean(values, groups=range(20))
    low, high = scipy_stats.t.interval(0.95, 19, loc=50, scale=scipy_stats.sem(values))
    assert ours.mean == pytest.approx(50)
    assert (ours.low, ours.high) == pytest.approx((low, high))
    assert (ours.n, ours.groups, ours.missing) == (20, 20, 0)


def test_rollouts_of_one_question_do_not_narrow_the_interval() -> None:
    per_question = RNG.normal(50, 10, size=30)
    for limits in (None, stats.SCORES):
        once = stats.grouped_mean(per_question, groups=range(30), limits=limits)
        ten = stats.grouped_mean(
            np.repeat(per_question, 10),
            groups=np.repeat(np.arange(30), 10).tolist(),
            limits=limits,
        )
        assert (ten.low, ten.high) == pytest.approx((once.low, once.high))
        assert ten.n == 300
        assert ten.groups == 30


def clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 100)


SAMPLERS = {
    "normal": lambda rng, shape: clipped(rng.normal(55, 15, shape)),
    "narrow": lambda rng, shape: clipped(rng.normal(50, 5, shape)),
    "skewed": lambda rng, shape: 100 * rng.beta(0.6, 2.4, shape),
    "exponential": lambda rng, shape: clipped(rng.exponential(12, shape)),
    "log-normal": lambda rng, shape: clipped(rng.lognormal(2.2, 0.8, shape)),
    "zero-inflated": lambda rng, shape: np.where(
        rng.random(shape) < 0.6, 0.0, rng.uniform(10, 90, shape)
    ),
    "ceiling": lambda rng, shape: clipped(100 - rng.exponential(8, shape)),
}
"""What the means of questions look like: traits are skewed or mostly 0, coherence is near 100."""


def coverage(intervals: list[stats.Interval], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in intervals]))


@pytest.mark.parametrize("questions", [5, 10, 20])
@pytest.mark.parametrize("name", SAMPLERS)
def test_intervals_of_scores_contain_the_truth_as_often_as_they_say(
    name: str, questions: int
) -> None:
    rng = np.random.default_rng(11)
    truth = float(SAMPLERS[name](rng, 1_000_000).mean())
    samples = SAMPLERS[name](rng, (1000, questions))
    intervals = [
        stats.grouped_mean(row, groups=range(questions), limits=stats.SCORES) for row in samples
    ]
    # 93 % at ten questions on normal and skewed scores; the error of 1,000 trials is 0.7 %.
    least = {5: 0.90, 10: 0.93, 20: 0.92}[questions]
    assert coverage(intervals, truth) >= least
    assert all(0 <= one.low <= one.mean <= one.high <= 100 for one in intervals)
    usual = scipy_stats.t.ppf(0.975, questions - 1) * scipy_stats.sem(samples, axis=1)
    wide = np.mean([one.high - one.low for one in intervals]) / np.mean(2 * usual)
    assert wide < 1.6 if questions < 10 else wide < 1.35


@pytest.mark.parametrize("questions", [5, 10, 20])
@pytest.mark.parametrize("steered", ["normal", "skewed", "exponential", "zero-inflated"])
def test_intervals_of_differences_contain_the_truth_as_often_as_they_say(
    steered: str, questions: int
) -> None:
    rng = np.random.default_rng(12)
    base = clipped(rng.exponential(4, 1_000_000))
    truth = float(SAMPLERS[steered](rng, 1_000_000).mean() - base.mean())
    groups = range(questions)
    intervals = [
        stats.paired_difference(
            SAMPLERS[steered](rng, questions),
            groups=groups,
            baseline=rng.choice(base, questions),
            baseline_groups=groups,
        )
        for _ in range(1000)
    ]
    assert coverage(intervals, truth) >= {5: 0.90, 10: 0.93, 20: 0.93}[questions]


def test_scores_that_all_agree_still_have_an_interval_that_narrows_with_their_number() -> None:
    few, many = (
        stats.grouped_mean(np.zeros(n), groups=range(n), limits=stats.SCORES) for n in (5, 20)
    )
    assert few.mean == few.low == 0
    assert 5 < few.high < 15
    assert 1 < many.high < 3


def test_no_interval_depends_on_the_order_of_rows() -> None:
    values, groups = RNG.uniform(0, 100, size=200), np.repeat(np.arange(20), 10)
    base = RNG.uniform(0, 100, size=200)
    expected = None
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(200)
        mixed, mixed_groups = values[order], [f"q{g}" for g in groups[order]]
        now = (
            stats.grouped_mean(mixed, groups=mixed_groups, limits=stats.SCORES),
            stats.grouped_mean(mixed, groups=mixed_groups),
            stats.paired_difference(
                mixed, groups=mixed_groups, baseline=base[order], baseline_groups=mixed_groups
            ),
        )
        expected = expected or now
        assert now == expected, "to the last bit"


def test_with_unequal_numbers_of_answers_the_mean_is_over_answers() -> None:
    result = stats.grouped_mean(
        [0.0, 0.0, 0.0, 40.0, 60.0], groups=["a", "a", "a", "b", "c"], limits=stats.SCORES
    )
    assert result.mean == 20
    assert result.low < 20 < result.high


def test_missing_scores_are_left_out_and_counted() -> None:
    result = stats.grouped_mean([1.0, None, 3.0, float("nan")], groups=["a", "a", "b", "c"])
    assert result.mean == 2.0
    assert (result.n, result.groups, result.missing) == (2, 2, 2)
    nothing = stats.grouped_mean([None, None], groups=["a", "b"])
    assert np.isnan(nothing.mean)
    assert np.isnan(nothing.low)
    assert (nothing.n, nothing.missing) == (0, 2)


def test_one_question_has_a_mean_but_no_interval() -> None:
    result = stats.grouped_mean([1.0, 2.0], groups=["a", "a"])
    assert result.mean == 1.5
    assert np.isnan(result.low)
    assert np.isnan(result.high)


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
        stats.grouped_mean([1.0, 2.0], groups=["a"])
