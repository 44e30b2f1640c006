"""Plans that end when an interval is narrow enough, without biasing it.

Looking at the data after every trial and stopping when it pleases would make intervals too
narrow. Here the campaign is looked at only at trial numbers that are fixed beforehand, at most
LOOKS times, and the interval of every look has the confidence 1 - (1 - C) / LOOKS. By Bonferroni's
inequality all of them cover together with probability C at least, so the last one does,
whichever it is: repeated confidence intervals, Jennison and Turnbull, "Interim analyses: the
repeated confidence interval approach", JRSS B 51 (1989), with the simplest spending of the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from resq_deploy import metrics
from resq_deploy.errors import InputError
from resq_deploy.inject.faults import Fault
from resq_deploy.inject.plans.base import Plan
from resq_deploy.inject.space import Flat, Space
from resq_deploy.records import Interval, Trial

LOOKS = 10
FIRST_DRAWS = 20
"""Patterns at the first look at an accuracy: fewer say little about its spread."""


def corrected(confidence: float) -> float:
    """Confidence of the interval of every look, so that all together have `confidence`."""
    return 1 - (1 - confidence) / LOOKS


def _schedule(first: int, last: int) -> tuple[int, ...]:
    """At most LOOKS numbers in geometric progression from `first` to `last`."""
    if first >= last:
        return (last,)
    steps = np.geomspace(first, last, LOOKS)
    return tuple(sorted({*(math.ceil(step) for step in steps[1:-1]), first, last}))


def sdc_rate(trials: Sequence[Trial], confidence: float) -> Interval:
    """Rate of trials with silent data corruption at one look: Clopper-Pearson.

    Exact, because the normal approximation is worst in the far tails that the correction needs.
    """
    k = sum(trial.outcome == "sdc" for trial in trials)
    found = metrics.rate(k, len(trials), corrected(confidence), method="exact")
    return Interval(
        value=found.value, low=found.low, high=found.high, confidence=confidence, n=found.n
    )


def mean_accuracy(trials: Sequence[Trial], confidence: float) -> Interval:
    """Mean accuracy over patterns at one look: Student's t.

    Accuracies that are all equal have no spread to judge by. Then the share p of patterns with
    another accuracy, whatever it is in [0, 1], is bounded (Clopper-Pearson for none of n), and by
    it the mean.
    """
    values = np.array([trial.n_correct / trial.n_total for trial in trials])
    level = corrected(confidence)
    if np.ptp(values) > 0:
        found = metrics.t_mean(values, level)
        value, low, high = found.value, found.low, found.high
    else:
        value = float(values[0])
        p = metrics.rate(0, values.size, level, method="exact").high
        low, high = value * (1 - p), value + (1 - value) * p
    return Interval(value=value, low=low, high=high, confidence=confidence, n=values.size)


def _width(interval: Interval) -> float:
    return interval.high - interval.low


@dataclass(frozen=True, kw_only=True)
class Until(Plan):
    """Random patterns until the interval of the SDC rate is at most `width` wide."""

    model: Fault
    width: float
    """In (0, 1)."""
    confidence: float
    population: int
    """Patterns that there are: with all of them seen the campaign ends in any case."""

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """Numbers of trials after which the campaign may end.

        The first one could do if no trial is an SDC, the last one does if half of them are.
        """

        def enough(n: int, k: int) -> bool:
            level = corrected(self.confidence)
            return _width(metrics.rate(k, n, level, method="exact")) <= self.width

        def least(k_of: int) -> int:
            high = 1
            while high < self.population and not enough(high, high // k_of if k_of else 0):
                high *= 2
            high = min(high, self.population)
            low = high // 2
            while high - low > 1:
                middle = (low + high) // 2
                if enough(middle, middle // k_of if k_of else 0):
                    high = middle
                else:
                    low = middle
            return high

        return _schedule(least(0), least(2))

    @property
    def n_stages(self) -> int:
        return len(self.looks)

    def trials(self) -> Sequence[int]:
        return range(self.looks[-1])

    def stage(self, index: int, trials: Sequence[Trial]) -> Sequence[int]:
        start = self.looks[index - 1] if index else 0
        if index:
            seen = [trial for trial in trials if trial.trial < start]
            if _width(sdc_rate(seen, self.confidence)) <= self.width:
                return range(0)
        return range(start, self.looks[index])

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        return self.model.sample(space, seed=seed, draw=trial)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "until",
            "width": self.width,
            "confidence": self.confidence,
            "population": self.population,
            "looks": list(self.looks),
        }


@dataclass(frozen=True, kw_only=True)
class SweepUntil(Plan):
    """Patterns at each rate until the interval of its mean accuracy is at most `width` wide.

    Trial number = index of the rate * draws + draw; every rate ends by itself.
    """

    model: Fault
    rates: tuple[float, ...]
    draws: int
    """At most so many at a rate."""
    width: float
    """In (0, 1)."""
    confidence: float

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """Numbers of draws after which a rate may end."""
        return _schedule(FIRST_DRAWS, self.draws)

    @property
    def n_stages(self) -> int:
        return len(self.looks)

    def trials(self) -> Sequence[int]:
        return range(len(self.rates) * self.draws)

    def stage(self, index: int, trials: Sequence[Trial]) -> Sequence[int]:
        start = self.looks[index - 1] if index else 0
        seen: dict[int, list[Trial]] = {rate: [] for rate in range(len(self.rates))}
        for trial in trials:
            if trial.trial % self.draws < start:
                seen[trial.trial // self.draws].append(trial)
        going = [
            rate
            for rate, group in seen.items()
            if not index or _width(mean_accuracy(group, self.confidence)) > self.width
        ]
        return [
            rate * self.draws + draw for rate in going for draw in range(start, self.looks[index])
        ]

    def rate(self, trial: int) -> float | None:
        return self.rates[trial // self.draws]

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        draw = trial % self.draws
        return self.model.sample(space, seed=seed, draw=draw, rate=self.rate(trial))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "sweep-until",
            "rates": list(self.rates),
            "draws": self.draws,
            "width": self.width,
            "confidence": self.confidence,
        }


def check_width(width: float) -> float:
    """`width` when it lies in (0, 1), else InputError."""
    if not 0 < width < 1:
        raise InputError(f"--until-width must lie in (0, 1), got {width}")
    return width
