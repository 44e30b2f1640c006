"""Two campaigns on the same faults and images: the paired difference of their accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import metrics, store
from resq_deploy.errors import InputError
from resq_deploy.inject import plans
from resq_deploy.inject.plans import Plan, Strata
from resq_deploy.inject.space import Space
from resq_deploy.inject.summary import stratified
from resq_deploy.records import Trial
from resq_deploy.store import Header, check_same


def _check_paired(a: Header, b: Header, where: str) -> None:
    """HeaderMismatch naming the first field that keeps the faults or images from being the same."""
    for field in ("data_sha256", "n_images", "fault", "plan", "seed"):
        check_same(field, getattr(a, field), getattr(b, field), where=where)
    check_same("versions.numpy", a.versions["numpy"], b.versions["numpy"], where=where)
    sizes = [[(row["shape"], row["n_bits"]) for row in header.space] for header in (a, b)]
    check_same("space", sizes[0], sizes[1], where=where)


Pairs = Sequence[tuple[Trial, Trial]]


def _difference(pairs: Pairs, plan: Plan, confidence: float) -> dict[str, Any]:
    """B minus A in percentage points over the paired patterns, with interval and p value."""
    points = np.array([100 * (b.n_correct / b.n_total - a.n_correct / a.n_total) for a, b in pairs])
    if isinstance(plan, Strata):
        value, variance = stratified(plan, [a for a, _ in pairs], points.tolist())
        mean = metrics.normal(value, variance, confidence, len(pairs))
    else:
        mean = metrics.bootstrap_mean(points, confidence)
    return {
        "mean": mean.value,
        "low": mean.low,
        "high": mean.high,
        "confidence": confidence,
        "n": mean.n,
        "p_value": metrics.sign_test(points),
    }


def _sdc(pairs: Pairs) -> dict[str, Any]:
    """Trials with silent data corruption in one file only, and the exact McNemar test of them."""
    outcomes = [(a.outcome == "sdc", b.outcome == "sdc") for a, b in pairs]
    only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
    return {
        "both": outcomes.count((True, True)),
        "only_a": only_a,
        "only_b": only_b,
        "neither": outcomes.count((False, False)),
        "p_value": metrics.mcnemar(only_a, only_b),
    }


def compare(path_a: Path, path_b: Path, *, confidence: float = 0.95) -> dict[str, Any]:
    """Fault accuracy of store B minus that of store A, in percentage points, paired by trial.

    Both must have the same data, fault model, plan, seed and sizes of the weights; else
    HeaderMismatch names the field. Keys: a, b (model_sha256, golden), n_paired, golden_difference
    (points), difference and per_rate (mean, low, high, confidence, n, p_value of the sign-flip
    permutation test; sdc of a rate), sdc (both, only_a, only_b, neither, p_value of the exact
    McNemar test), warnings.
    """
    a, trials_a, _ = store.read([path_a])
    b, trials_b, _ = store.read([path_b])
    _check_paired(a, b, f"{path_a} and {path_b} cannot be paired")
    by_number = {t.trial: t for t in trials_b}
    pairs = [(t, by_number[t.trial]) for t in trials_a if t.trial in by_number]
    if not pairs:
        raise InputError(f"{path_a} and {path_b} have no finished trial in common")
    unpaired = len(trials_a) + len(trials_b) - 2 * len(pairs)
    plan = plans.restore(a.plan, a.fault, Space.from_json(a.space))
    rates = dict.fromkeys(t.rate for t, _ in pairs if t.rate is not None)
    return {
        "a": {"model_sha256": a.model_sha256, "golden": dict(vars(a.golden))},
        "b": {"model_sha256": b.model_sha256, "golden": dict(vars(b.golden))},
        "n_paired": len(pairs),
        "golden_difference": 100 * (b.golden.rate - a.golden.rate),
        "difference": _difference(pairs, plan, confidence),
        "sdc": _sdc(pairs),
        "per_rate": [
            {"rate": rate, **_difference(group, plan, confidence), "sdc": _sdc(group)}
            for rate, group in ((r, [p for p in pairs if p[0].rate == r]) for r in rates)
        ],
        "warnings": [f"{unpaired} trials stand in one store only, and were left out"]
        if unpaired
        else [],
    }
