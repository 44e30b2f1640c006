"""Rates: published values, counting by hand, and coverage of the intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from resq_deploy import metrics
from resq_deploy.errors import InputError
from resq_deploy.metrics import (
    LARGE_SAMPLE,
    bootstrap_mean,
    changed,
    sample_size,
    top1,
    wilson,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in
        # Medicine 17 (1998), table I, method 3 (Wilson, without continuity correction), 95 %
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    interval = wilson(k, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert interval.value == k / n and interval.n == n and interval.confidence == 0.95


@given(st.integers(1, 10_000), st.data(), st.floats(0.5, 0.999))
def test_wilson_equals_its_formula(n: int, data, confidence: float) -> None:
    from statistics import NormalDist

    k = data.draw(st.integers(0, n))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    interval = wilson(k, n, confidence)
    assert interval.low == pytest.approx(max(0.0, middle - half), abs=1e-9)
    assert interval.high == pytest.approx(min(1.0, middle + half), abs=1e-9)
    assert interval.low <= interval.value + 1e-12 and interval.value <= interval.high + 1e-12


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_a_rate_that_cannot_be_is_refused(k: int, n: int) -> None:
    with pytest.raises(InputError, match="0 <= k <= n"):
        wilson(k, n)


@pytest.mark.parametrize(
    ("population", "margin", "confidence", "n"),
    [
        # infinite population, p = 0.5: the textbook 385 (5 %), 9,604 (1 %), 16,588 (1 %, 99 %),
        # which a finite population approaches from below
        (10**12, 0.05, 0.95, 385),
        (10**12, 0.01, 0.95, 9604),
        (10**12, 0.01, 0.99, 16588),
        # finite population: Krejcie and Morgan (1970), table 1: population and sample at 5 %
        # (their chi-square 3.841 is our t squared)
        (100, 0.05, 0.95, 80),
        (10_000, 0.05, 0.95, 370),
        (1_000_000, 0.05, 0.95, 384),
    ],
)
def test_sample_size_equals_published_tables(
    population: int, margin: float, confidence: float, n: int
) -> None:
    assert sample_size(population, margin, confidence) == n


@given(st.integers(1, 10**9), st.floats(1e-3, 0.5), st.floats(0.5, 0.999))
def test_sample_size_is_enough_and_not_one_too_many(
    population: int, margin: float, confidence: float
) -> None:
    from statistics import NormalDist

    n = sample_size(population, margin, confidence)
    assert 1 <= n <= population
    t = NormalDist().inv_cdf(0.5 + confidence / 2)

    def reached(size: int) -> float:  # half width with the finite-population correction
        return t * math.sqrt(0.25 / size * (population - size) / max(1, population - 1))

    assert reached(n) <= margin * (1 + 1e-6)
    if n > 1:
        assert reached(n - 1) > margin * (1 - 1e-6)


@pytest.mark.parametrize(
    "arguments", [(0, 0.1, 0.9), (5, 0.0, 0.9), (5, 0.1, 1.0), (5, 1.0, 0.9), (5, 0.1, 0.9, 0.0)]
)
def test_sample_size_refuses_what_makes_no_sense(arguments: tuple) -> None:
    with pytest.raises(InputError):
        sample_size(*arguments)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    # 200 samples of 40 skewed values (exponential, mean 1) at 90 %: the expected count is a
    # little below 180 (BCa on 40 skewed values); 160 is 4.7 standard deviations below 180
    rng = np.random.default_rng(3)
    intervals = [bootstrap_mean(rng.exponential(size=40), 0.90, seed=i) for i in range(200)]
    hits = sum(i.low <= 1.0 <= i.high for i in intervals)
    assert 160 <= hits <= 197
    assert all(i.low < i.value < i.high and i.n == 40 for i in intervals)


def test_bootstrap_agrees_with_the_normal_interval_on_symmetric_values() -> None:
    values = np.random.default_rng(0).normal(10, 2, 400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert interval.value == values.mean()
    assert interval.low == pytest.approx(values.mean() - half, abs=0.25 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.25 * half)


def test_bootstrap_equals_bca_written_out() -> None:
    # Efron and Tibshirani, An Introduction to the Bootstrap (1993), equations 14.9 to 14.15
    from statistics import NormalDist

    normal, rng = NormalDist(), np.random.default_rng(8)
    values = rng.exponential(size=30) ** 2  # skewed: the basic and percentile intervals are off
    means = np.sort(rng.choice(values, (200_000, 30)).mean(axis=1))
    z0 = normal.inv_cdf(float((means < values.mean()).mean()))
    left_out = (values.sum() - values) / 29
    d = left_out.mean() - left_out
    a = (d**3).sum() / (6 * ((d**2).sum()) ** 1.5)

    def end(z: float) -> float:
        level = normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
        return float(np.quantile(means, level))

    low, high = end(normal.inv_cdf(0.025)), end(normal.inv_cdf(0.975))
    ours = [bootstrap_mean(values, seed=i) for i in range(20)]  # 2,000 resamples each
    assert np.mean([i.low for i in ours]) == pytest.approx(low, rel=0.02)
    assert np.mean([i.high for i in ours]) == pytest.approx(high, rel=0.04)


def test_bootstrap_repeats_with_its_seed() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize("values", [[0.25], [0.5, 0.5, 0.5]])
def test_bootstrap_of_values_without_spread_has_no_width(values: list[float]) -> None:
    interval = bootstrap_mean(np.array(values))
    assert interval.low == interval.value == interval.high == values[0]
    assert interval.n == len(values)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_bootstrap_refuses_nothing_and_nonsense(values: list[float]) -> None:
    with pytest.raises(InputError):
        bootstrap_mean(np.array(values))


def test_top1_takes_the_first_of_equal_values() -> None:
    assert top1(np.array([[0, 3, 3], [5, 5, 5], [-2, -1, -3]])).tolist() == [1, 0, 1]
    assert top1(np.zeros((2, 1, 1, 4))).tolist() == [0, 0], "trailing axes are flattened"


def test_changed_looks_at_stored_bytes() -> None:
    golden = np.float32([[0, 1], [np.nan, 1], [0, 1], [0, 1]])
    faulty = np.float32([[0, 1], [np.nan, 1], [-0.0, 1], [0, np.nextafter(np.float32(1), 2)]])
    assert changed(golden, faulty).tolist() == [False, False, True, True]
    assert (
        changed(golden.reshape(4, 2, 1), faulty.reshape(4, 2, 1)).tolist()
        == [False] * 2 + [True] * 2
    )


def test_changed_refuses_other_shapes_and_types() -> None:
    golden = np.zeros((2, 3), np.float32)
    with pytest.raises(InputError, match="shape"):
        changed(golden, np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match="type"):
        changed(golden, golden.astype(np.float64))


def test_large_samples_get_the_t_interval_and_it_agrees_with_the_bootstrap() -> None:
    """Just below and just above the limit: the same interval within a twentieth of its width."""
    values = np.random.default_rng(0).exponential(size=LARGE_SAMPLE)
    large, small = bootstrap_mean(values), bootstrap_mean(values[:-1])
    width = small.high - small.low
    assert abs(large.low - small.low) < width / 20
    assert abs(large.high - small.high) < width / 20


# --------------------------------------------------------------------------- exact and weighted


@pytest.mark.parametrize("k, n", [(0, 20), (3, 20), (20, 20), (1, 1), (77, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_exact_intervals_are_quantiles_of_the_beta_distribution(
    k: int, n: int, confidence: float
) -> None:
    """Clopper and Pearson's interval in its other form."""
    alpha = 1 - confidence
    low = stats.beta.ppf(alpha / 2, k, n - k + 1) if k else 0.0
    high = stats.beta.ppf(1 - alpha / 2, k + 1, n - k) if k < n else 1.0
    found = metrics.rate(k, n, confidence, method="exact")
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.value, found.n, found.confidence) == (k / n, n, confidence)


@pytest.mark.parametrize("k, n", [(0, 7), (3, 20), (20, 20), (77, 1000)])
def test_a_weighted_rate_of_whole_numbers_is_wilsons(k: int, n: int) -> None:
    ours, scipys = metrics.effective_rate(k / n, n, 0.95, n), metrics.wilson(k, n)
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)


def test_a_weighted_rate_is_wider_with_fewer_effective_observations() -> None:
    wide, narrow = (metrics.effective_rate(0.3, n, 0.95, 100) for n in (20.5, 100))
    assert wide.low < narrow.low < 0.3 < narrow.high < wide.high


def test_t_intervals_cover_normal_means() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = metrics.t_mean(rng.normal(2.0, 3.0, 5), 0.9)
        covered += found.low <= 2.0 <= found.high
    assert stats.binomtest(covered, 1000, 0.9).pvalue > 1e-3
    assert metrics.t_mean(np.ones(3)).low == 1.0
    with pytest.raises(InputError, match="at least two"):
        metrics.t_mean(np.ones(1))


@pytest.mark.parametrize("values", [[1, 2, 3], [1, -2, 3, 0, 0], [0.5, 0.5, 0.5, -0.1, 4, 2, 1]])
def test_the_sign_test_is_exact_for_few_differences(values: list[float]) -> None:
    """All sign patterns enumerated: the share with a mean at least as far from 0."""
    signs = itertools.product((-1, 1), repeat=len(values))
    means = [np.dot(pattern, values) / len(values) for pattern in signs]
    extreme = sum(abs(m) >= abs(np.mean(values)) - 1e-12 for m in means)
    assert metrics.sign_test(np.array(values)) == pytest.approx(extreme / len(means))


def test_the_sign_test_holds_its_level_and_finds_differences() -> None:
    rng = np.random.default_rng(1)
    p = [metrics.sign_test(rng.standard_t(3, 40)) for _ in range(100)]
    assert stats.binomtest(sum(x < 0.1 for x in p), 100, 0.1).pvalue > 1e-3
    assert metrics.sign_test(rng.normal(1, 1, 40)) < 1e-3
    assert metrics.sign_test(np.zeros(5)) == 1.0
    large = rng.normal(0.03, 1, metrics.LARGE_SAMPLE)
    assert metrics.sign_test(large) == pytest.approx(stats.ttest_1samp(large, 0).pvalue)


@pytest.mark.parametrize("b, c", [(0, 0), (0, 1), (2, 9), (9, 2), (5, 5)])
def test_mcnemars_test_counts_coin_tosses(b: int, c: int) -> None:
    """Probability of a split at least as uneven among b + c fair tosses, added up by hand."""
    n = b + c
    uneven = sum(math.comb(n, i) for i in range(n + 1) if abs(i - n / 2) >= abs(b - n / 2))
    assert metrics.mcnemar(b, c) == pytest.approx(uneven / 2**n)


def test_outputs_of_no_images() -> None:
    """What the fast engine has when a fault changes nothing."""
    none = np.empty((0, 4), np.float32)
    assert metrics.top1(none).shape == metrics.changed(none, none).shape == (0,)
