"""What our rates are, and how sure we are of them. Intervals come from scipy."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy.errors import InputError
from resq_deploy.records import Interval

Array = NDArray[Any]
BOOTSTRAP_RESAMPLES = 2000
LARGE_SAMPLE = 5000
Method = Literal["wilson", "exact"]
METHODS: tuple[Method, ...] = get_args(Method)
"""Intervals of rates."""


def flat(output: Array) -> Array:
    """(N, ...) outputs as (N, classes); N may be 0."""
    return output.reshape(len(output), math.prod(output.shape[1:]))


def top1(logits: Array) -> NDArray[np.int64]:
    """Arg max over the last axes of (N, ...) outputs; the first of equal values wins."""
    return np.asarray(np.argmax(flat(logits), axis=1), np.int64)


def changed(golden: Array, faulty: Array) -> NDArray[np.bool_]:
    """Per image of (N, ...): does any stored byte of the output differ (NaN-proof)?"""
    if golden.shape != faulty.shape or golden.dtype != faulty.dtype:
        raise InputError(
            f"outputs of shape {faulty.shape} and type {faulty.dtype} given; the golden run has "
            f"{golden.shape} and {golden.dtype}"
        )
    a = flat(np.ascontiguousarray(golden)).view(np.uint8)
    b = flat(np.ascontiguousarray(faulty)).view(np.uint8)
    return np.asarray((a != b).any(axis=1))


def rate(k: int, n: int, confidence: float = 0.95, *, method: Method = "wilson") -> Interval:
    """Interval of a rate k / n (scipy.stats.binomtest).

    `method` is one of METHODS: `wilson` (score interval, right on average) or `exact`
    (Clopper-Pearson, never covers less often than it says).
    """
    if not 0 <= k <= n or n == 0:
        raise InputError(f"a rate needs 0 <= k <= n and n > 0, got k={k}, n={n}")
    if method not in METHODS:
        raise InputError(f"interval {method!r} given; expected {' or '.join(METHODS)}")
    ci = stats.binomtest(k, n).proportion_ci(confidence_level=confidence, method=method)
    return Interval(value=k / n, low=float(ci.low), high=float(ci.high), confidence=confidence, n=n)


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate k / n."""
    return rate(k, n, confidence)


def effective_rate(value: float, n_effective: float, confidence: float, n: int) -> Interval:
    """Wilson score interval of a weighted rate `value` that is worth `n_effective` observations.

    With a whole number of successes out of `n_effective` it equals `wilson`; `n` is reported.

    >>> effective_rate(0.25, 40.0, 0.95, 40) == wilson(10, 40)
    True
    """
    z2 = float(stats.norm.ppf(0.5 + confidence / 2)) ** 2
    centre = (value + z2 / (2 * n_effective)) / (1 + z2 / n_effective)
    spread = value * (1 - value) / n_effective + z2 / (4 * n_effective**2)
    half = math.sqrt(z2 * spread) / (1 + z2 / n_effective)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(
        value=value, low=min(low, value), high=max(high, value), confidence=confidence, n=n
    )


def normal(mean: float, variance: float, confidence: float, n: int) -> Interval:
    """Normal interval of an estimate `mean` with the estimated `variance` (scipy.stats.norm)."""
    half = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(variance)
    return Interval(value=mean, low=mean - half, high=mean + half, confidence=confidence, n=n)


def t_mean(values: Array, confidence: float = 0.95) -> Interval:
    """Mean of at least two independent observations with Student's t interval (scipy.stats.t).

    Observations that are all equal give an interval of no width.
    """
    values = np.asarray(values, np.float64)
    if values.size < 2 or not np.isfinite(values).all():
        raise InputError("a t interval needs at least two finite observations")
    mean = low = high = float(values.mean())
    if np.ptp(values) > 0:
        error = stats.sem(values)
        low, high = map(float, stats.t.interval(confidence, values.size - 1, mean, error))
    return Interval(value=mean, low=low, high=high, confidence=confidence, n=values.size)


def bootstrap_mean(values: Array, confidence: float = 0.95, *, seed: int = 0) -> Interval:
    """Mean of independent observations with a BCa bootstrap interval (scipy.stats.bootstrap).

    Used over fault patterns, and for paired differences over patterns or images. One
    observation, or observations that are all equal, give an interval of no width. From
    LARGE_SAMPLE observations on the interval is Student's t: the two agree there, and the cost
    of BCa grows with the square of the number.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError("a mean needs at least one finite observation")
    mean = float(values.mean())
    low = high = mean
    if values.size >= LARGE_SAMPLE and np.ptp(values) > 0:
        wide = t_mean(values, confidence)
        low, high = wide.low, wide.high
    elif values.size > 1 and np.ptp(values) > 0:
        ci = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=confidence,
            n_resamples=BOOTSTRAP_RESAMPLES,
            batch=max(1, 4_000_000 // values.size),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(ci.low), float(ci.high)
    return Interval(value=mean, low=low, high=high, confidence=confidence, n=values.size)


PERMUTATIONS = 9999


def sign_test(differences: Array, *, seed: int = 0) -> float:
    """Two-sided p value that paired differences (n,) are symmetric about 0.

    Sign-flip permutation test of their mean (scipy.stats.permutation_test): exact up to 13
    differences, 9,999 random sign patterns above; from LARGE_SAMPLE on the paired t test, which
    agrees with it there. 1 when all differences are 0.
    """
    values = np.asarray(differences, np.float64)
    if values.size == 0 or not values.any():
        return 1.0
    if values.size >= LARGE_SAMPLE:
        return float(stats.ttest_1samp(values, 0.0).pvalue)
    found = stats.permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, 4_000_000 // values.size),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p value of McNemar's test with `b` and `c` discordant pairs.

    The binomial test of b among b + c at 1/2 (scipy.stats.binomtest); 1 without such pairs.

    >>> mcnemar(0, 5)
    0.0625
    """
    if b < 0 or c < 0:
        raise InputError(f"numbers of pairs must be at least 0, got {b} and {c}")
    return float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def sample_size(population: int, margin: float, confidence: float = 0.95, p: float = 0.5) -> int:
    """Faults to inject so that a rate is known within `margin` at `confidence`.

    n = N / (1 + e^2 (N - 1) / (t^2 p (1 - p))), rounded up: Leveugle et al., "Statistical
    fault injection: quantified error and confidence", DATE 2009, eq. 3. `p` = 0.5 is the
    worst case. Never more than the population.

    >>> sample_size(1_000_000, 0.01, 0.95)
    9513
    """
    if population < 1 or not 0 < margin < 1 or not 0 < confidence < 1 or not 0 < p < 1:
        raise InputError(
            f"population >= 1 and margin, confidence, p in (0, 1) expected, got {population}, "
            f"{margin}, {confidence}, {p}"
        )
    t = float(stats.norm.ppf(0.5 + confidence / 2))
    n = population / (1 + margin**2 * (population - 1) / (t**2 * p * (1 - p)))
    return min(population, math.ceil(n))
