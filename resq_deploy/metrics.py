"""What our rates are, and how sure we are of them. Intervals come from scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy.errors import InputError
from resq_deploy.records import Interval

Array = NDArray[Any]
BOOTSTRAP_RESAMPLES = 2000
LARGE_SAMPLE = 5000


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


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate k / n (scipy.stats.binomtest)."""
    if not 0 <= k <= n or n == 0:
        raise InputError(f"a rate needs 0 <= k <= n and n > 0, got k={k}, n={n}")
    ci = stats.binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(value=k / n, low=float(ci.low), high=float(ci.high), confidence=confidence, n=n)


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
        error = stats.sem(values)
        low, high = map(float, stats.t.interval(confidence, values.size - 1, mean, error))
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
