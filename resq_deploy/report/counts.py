"""Counts of images and trials, and the rates that they give, as plain JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics
from resq_deploy.records import OUTCOMES, Count, Trial


def accuracy(count: Count, confidence: float) -> dict[str, Any]:
    """Accuracy over images with its Wilson interval; rates in [0, 1]."""
    found = metrics.wilson(count.n_correct, count.n_total, confidence)
    return {
        "n_correct": count.n_correct,
        "n_total": count.n_total,
        "value": found.value,
        "low": found.low,
        "high": found.high,
    }


def fault_accuracy(trials: Sequence[Trial], confidence: float) -> dict[str, Any]:
    """Mean accuracy over fault patterns, bootstrap interval over patterns; rates in [0, 1].

    `n_correct` of `n_total` counts pairs of pattern and image; `q05` is the 5 % quantile over
    patterns (linear between order statistics).
    """
    values = np.array([t.n_correct / t.n_total for t in trials])
    mean = metrics.bootstrap_mean(values, confidence)
    return {
        "n_patterns": len(trials),
        "n_images": trials[0].n_total,
        "n_correct": sum(t.n_correct for t in trials),
        "n_total": sum(t.n_total for t in trials),
        "value": mean.value,
        "low": mean.low,
        "high": mean.high,
        "q05": float(np.quantile(values, 0.05)),
        "worst": float(values.min()),
        "mean_flips": float(np.mean([t.n_flips for t in trials])),
    }


def outcomes(trials: Sequence[Trial], confidence: float) -> dict[str, Any]:
    """Trials by outcome, each rate with its Wilson interval over trials."""
    counts = Counter(t.outcome for t in trials)
    found: dict[str, Any] = {"n_trials": len(trials)}
    for name in OUTCOMES:
        rate = metrics.wilson(counts[name], len(trials), confidence)
        found[name] = {"n": counts[name], "value": rate.value, "low": rate.low, "high": rate.high}
    return found


def layer_bits(
    trials: Sequence[Trial], layers: Sequence[str], n_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Trials with SDC and all trials per layer and bit, both of shape (layers, n_bits)."""
    row = {name: i for i, name in enumerate(layers)}
    sdc = np.zeros((len(layers), n_bits), np.int64)
    total = np.zeros_like(sdc)
    for t in trials:
        if t.site is not None:
            total[row[t.site.tensor], t.site.bit] += 1
            sdc[row[t.site.tensor], t.site.bit] += t.outcome == "sdc"
    return sdc, total
