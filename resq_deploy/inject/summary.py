"""What a campaign found: the JSON of `inject` and `results`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics, store
from resq_deploy.errors import InputError
from resq_deploy.inject import addresses, plans, protect, rows
from resq_deploy.inject.plans import Plan, Strata, SweepUntil, Until, sequential
from resq_deploy.inject.space import CHECK, Space
from resq_deploy.metrics import Method
from resq_deploy.records import OUTCOMES, Interval, Trial
from resq_deploy.store import Header

MBIT = 1e6
"""Bits of a megabit, as soft error rates are given per Mbit."""


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Trials, and the bits that each stands for (None: all for as many)."""

    trials: Sequence[Trial]
    weights: NDArray[np.float64] | None

    def take(self, chosen: Sequence[int]) -> Weighted:
        """The trials at these positions."""
        return Weighted(
            trials=[self.trials[i] for i in chosen],
            weights=None if self.weights is None else self.weights[list(chosen)],
        )

    def groups(self, key: Callable[[Trial], Any]) -> Iterator[tuple[Any, Weighted]]:
        """Trials with the same key together, in the order of their first appearance."""
        found: dict[Any, list[int]] = {}
        for i, trial in enumerate(self.trials):
            found.setdefault(key(trial), []).append(i)
        for value, chosen in found.items():
            yield value, self.take(chosen)

    def mean(self, values: Sequence[float]) -> float:
        return float(np.average(values, weights=self.weights))


def _interval(interval: Interval) -> dict[str, Any]:
    return dict(vars(interval))


def _rate(
    group: Weighted, hit: Callable[[Trial], bool], confidence: float, method: Method
) -> Interval:
    """Rate of trials that are `hit`, as a share of the bits that the trials stand for.

    Where trials stand for different numbers of bits, the interval is Wilson's on Kish's effective
    sample size (sum of weights)^2 / sum of squared weights (Kish, Survey Sampling, 1965).
    """
    hits = np.array([hit(trial) for trial in group.trials])
    weights = group.weights
    if weights is None or np.ptp(weights) == 0:
        return metrics.rate(int(hits.sum()), len(hits), confidence, method=method)
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    value = float(np.average(hits, weights=weights))
    return metrics.effective_rate(value, effective, confidence, len(hits))


def _is_sdc(trial: Trial) -> bool:
    return trial.outcome == "sdc"


def _sdc(group: Weighted, confidence: float, method: Method) -> dict[str, Any]:
    """Trial counts and the rate of trials with silent data corruption."""
    return {
        "n_trials": len(group.trials),
        "n_sdc_trials": sum(map(_is_sdc, group.trials)),
        "sdc_rate": _interval(_rate(group, _is_sdc, confidence, method)),
    }


def _accuracies(trials: Sequence[Trial]) -> NDArray[np.float64]:
    return np.array([t.n_correct / t.n_total for t in trials])


def _accuracy(
    trials: Sequence[Trial], confidence: float, mean: Interval | None = None
) -> dict[str, Any]:
    """Accuracy under faults over patterns: mean with interval, worst, 5 % quantile."""
    values = _accuracies(trials)
    mean = mean or metrics.bootstrap_mean(values, confidence)
    return {
        "mean": mean.value,
        "low": mean.low,
        "high": mean.high,
        "confidence": confidence,
        "worst": float(values.min()),
        "q05": float(np.quantile(values, 0.05)),
        "n": len(values),
    }


def _within(accuracy: Interval) -> Interval:
    """An interval made without knowing that accuracies lie in [0, 1], cut to what they can be."""
    return replace(accuracy, low=max(0.0, accuracy.low), high=min(1.0, accuracy.high))


def _outcomes(trials: Sequence[Trial]) -> dict[str, int]:
    counts = Counter(t.outcome for t in trials)
    return {name: counts[name] for name in OUTCOMES}


def _by_site(found: Weighted, stored: Space, confidence: float, method: Method) -> dict[str, Any]:
    """Breakdown of the trials that struck exactly one bit."""
    tensors = {tensor.name: i for i, tensor in enumerate(stored.tensors)}
    places = {
        i: (tensors[t.site.tensor], t.site.bit, t.trial)
        for i, t in enumerate(found.trials)
        if t.site is not None
    }
    single = found.take(sorted(places, key=places.__getitem__))
    sdc = partial(_sdc, confidence=confidence, method=method)

    def tensor(t: Trial) -> str:
        return t.site.tensor if t.site else ""

    def bit(t: Trial) -> int:
        return t.site.bit if t.site else -1

    def channel(t: Trial) -> int | None:
        return rows.channel(stored.tensors[tensors[tensor(t)]], t.site.offset) if t.site else None

    channels = [
        ((tensors[name], number), {"tensor": name, "channel": number, **sdc(group)})
        for (name, number), group in single.groups(lambda t: (tensor(t), channel(t)))
        if number is not None
    ]
    return {
        "per_layer": [
            {
                "tensor": name,
                "n_bits": stored.tensors[tensors[name]].n_bits,
                **sdc(group),
                "outcomes": _outcomes(group.trials),
                "mean_accuracy": group.mean(_accuracies(group.trials).tolist()),
                "worst_accuracy": float(_accuracies(group.trials).min()),
            }
            for name, group in single.groups(tensor)
        ],
        "per_bit": [
            {"bit": number, **sdc(group), "outcomes": _outcomes(group.trials)}
            for number, group in sorted(single.groups(bit), key=lambda pair: pair[0])
        ],
        "per_layer_bit": [
            {"tensor": name, "bit": number, **sdc(group)}
            for (name, number), group in single.groups(lambda t: (tensor(t), bit(t)))
        ],
        "per_channel": [row for _, row in sorted(channels, key=lambda pair: pair[0])],
    }


def _per_rate(
    trials: Sequence[Trial], plan: Plan, confidence: float, method: Method
) -> list[dict[str, Any]]:
    table = []
    for rate, group in Weighted(trials=trials, weights=None).groups(lambda t: t.rate):
        if rate is None:
            continue
        mean = None
        if isinstance(plan, SweepUntil) and len(group.trials) > 1:
            mean = _within(sequential.mean_accuracy(group.trials, confidence))
        table.append(
            {
                "rate": rate,
                **_accuracy(group.trials, confidence, mean),
                "mean_flips": float(np.mean([t.n_flips for t in group.trials])),
                **_sdc(group, confidence, method),
            }
        )
    return table


def stratified(
    plan: Strata, trials: Sequence[Trial], values: Sequence[float] | Sequence[bool]
) -> tuple[float, float]:
    """Mean of `values` (one a trial) over all bits, and the variance of that estimate.

    Mean = sum W_h m_h and variance = sum W_h^2 (1 - n_h / N_h) s_h^2 / n_h with W_h = N_h / N, over
    the strata h with a finished trial: Cochran, Sampling Techniques (1977), theorems 5.1 and 5.3.
    Of a rate (bool values) s_h^2 is that of (k + 1/2) of (n + 1), so that strata without a hit do
    not count as certain; else a stratum with one trial has the variance of all trials.
    """
    owner, y = plan.owner(trials), np.asarray(values, np.float64)
    binary = np.asarray(values).dtype == np.bool_
    groups = {int(h): y[owner == h] for h in np.unique(owner)}
    total = sum(plan.strata[h].size for h in groups)
    mean = variance = 0.0
    for h, group in groups.items():
        size, n = plan.strata[h].size, len(group)
        share = size / total
        mean += share * float(group.mean())
        if binary:
            smooth = (float(group.sum()) + 0.5) / (n + 1)
            spread = smooth * (1 - smooth)
        else:
            spread = float((group if n > 1 else y).var(ddof=1)) if len(y) > 1 else 0.0
        variance += share**2 * (1 - n / size) * spread / n
    return mean, variance


def _totals(
    plan: Plan, found: Weighted, confidence: float, method: Method
) -> tuple[Interval, Interval | None]:
    """Interval of the SDC rate, and of the mean accuracy where it is not the bootstrap one."""
    trials = found.trials
    if isinstance(plan, Until):
        return sequential.sdc_rate(trials, confidence), None
    if not isinstance(plan, Strata):
        return _rate(found, _is_sdc, confidence, method), None
    value, variance = stratified(plan, trials, [_is_sdc(t) for t in trials])
    middle = min(max(value, 0.5 / len(trials)), 1 - 0.5 / len(trials))
    rate = Interval(value=value, low=value, high=value, confidence=confidence, n=len(trials))
    if variance > 0:
        effective = middle * (1 - middle) / variance
        rate = metrics.effective_rate(value, effective, confidence, len(trials))
    mean, variance = stratified(plan, trials, _accuracies(trials).tolist())
    return rate, _within(metrics.normal(mean, variance, confidence, len(trials)))


def _margin(trials: Sequence[Trial], confidence: float) -> dict[str, Any] | None:
    """By how much the golden top-1's lead shrank; None when no trial was answered."""
    answered = [t for t in trials if not t.refused]
    if not answered:
        return None
    mean = metrics.bootstrap_mean(np.array([t.margin_lost for t in answered]), confidence)
    return {**_interval(mean), "worst": max(t.margin_worst for t in answered)}


def check_options(interval: Method, raw_fit: float | None, fault: str) -> None:
    """InputError unless `summarize` takes these for a campaign with the fault model `fault`."""
    if interval not in metrics.METHODS:
        raise InputError(f"--interval {interval} given; expected {' or '.join(metrics.METHODS)}")
    if raw_fit is None:
        return
    if not 0 <= raw_fit < np.inf:
        raise InputError(f"--raw-fit must be a number of at least 0, got {raw_fit}")
    if fault != "single":
        raise InputError(
            f"--raw-fit given for the fault model {fault}; it goes with single, drawn from all bits"
        )


def _fit(raw: float | None, n_bits: int, sdc: Interval) -> dict[str, Any] | None:
    """Failures in 10^9 hours of the model's memory; None without a raw rate.

    FIT = raw FIT per Mbit * Mbit * P(SDC of a single flip), as Li et al. (SC 2017) sum it over
    components; the interval is that of P(SDC). A flip counts when it changes the top-1 of at least
    one image, because it stays in the memory.
    """
    if raw is None:
        return None
    mbit = n_bits / MBIT
    return {
        "raw_fit_per_mbit": raw,
        "mbit": mbit,
        "value": raw * mbit * sdc.value,
        "low": raw * mbit * sdc.low,
        "high": raw * mbit * sdc.high,
        "confidence": sdc.confidence,
        "n": sdc.n,
    }


def _planned(plan: Plan, trials: Sequence[Trial]) -> set[int]:
    """Numbers of the trials that the plan wants, where what was found may end it early."""
    wanted: set[int] = set()
    for index in range(plan.n_stages):
        stage = plan.stage(index, trials)
        if not stage:
            break
        wanted.update(stage)
        if plan.n_stages > 1 and not wanted <= {t.trial for t in trials}:
            break
    return wanted


def _until(plan: Plan, rate: Interval, per_rate: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What `--until-width` came to; None for other plans."""
    if isinstance(plan, Until):
        widths = [rate.high - rate.low]
    elif isinstance(plan, SweepUntil):
        widths = [row["high"] - row["low"] for row in per_rate]
    else:
        return None
    return {
        "width": plan.width,
        "looks": list(plan.looks),
        "confidence_per_look": sequential.corrected(plan.confidence),
        "widths": widths,
        "reached": all(width <= plan.width for width in widths),
    }


def summarize(
    header: Header,
    trials: Sequence[Trial],
    seconds: float,
    *,
    confidence: float = 0.95,
    interval: Method = "wilson",
    raw_fit: float | None = None,
) -> dict[str, Any]:
    """The summary of a campaign in plain JSON values.

    `outcomes` counts trials (Trial.outcome); `outcomes_images` counts pairs of trial and image.
    Rates over trials have the intervals that `interval` names (metrics.METHODS), accuracies
    bootstrap intervals over patterns. With strata both are weighted by the bits that a trial
    stands for; with `--until-width` the monitored interval is the one of the last look.
    `raw_fit` in FIT per Mbit. InputError when no trial has finished.
    """
    check_options(interval, raw_fit, header.fault)
    if not trials:
        raise InputError("the store has no finished trial; continue the campaign with --resume")
    stored = Space.from_json(header.space)
    protection = protect.parse(header.protection)
    plan = plans.restore(header.plan, header.fault, stored)
    index, n_shards = (int(part) for part in header.shard.split("/"))
    n_planned = sum(number % n_shards == index for number in _planned(plan, trials))
    found = Weighted(trials=trials, weights=plan.weights(trials))
    sdc_rate, mean = _totals(plan, found, confidence, interval)
    per_rate = _per_rate(trials, plan, confidence, interval)
    images = {
        name: sum(getattr(t, f"n_{name}") for t in trials)
        for name in ("total", "changed", "sdc", "sdc5", "nonfinite")
    }
    refused = sum(t.n_total for t in trials if t.refused)
    warnings = list(header.warnings)
    answered = [t for t in trials if t.n_flips and not t.refused]
    if not images["changed"] and answered and header.protection == "none":
        warnings.append("no fault changed any output: check that the model uses these weights")
    if len(trials) < n_planned:
        warnings.append(f"{n_planned - len(trials)} of {n_planned} planned trials are missing")
    return {
        "model_sha256": header.model_sha256,
        "data_sha256": header.data_sha256,
        "n_images": header.n_images,
        "golden": dict(vars(header.golden)),
        "engine": header.engine,
        "reloaded": header.reloaded,
        "fault": header.fault,
        "targets": list(dict.fromkeys(t.target for t in stored.tensors if t.target != CHECK)),
        "protection": protection.cost(stored),
        "plan": {k: v for k, v in header.plan.items() if k not in ("sites", "masks")},
        "seed": header.seed,
        "shard": header.shard,
        "n_bits": stored.n_bits,
        "n_planned": n_planned,
        "n_trials": len(trials),
        "outcomes": _outcomes(trials),
        "outcomes_images": {
            "masked": images["total"] - images["changed"] - refused,
            "benign": images["changed"] - images["sdc"],
            "sdc": images["sdc"],
            "due": refused,
        },
        "interval": interval,
        "sdc_rate": _interval(sdc_rate),
        "sdc5_rate": _interval(_rate(found, lambda t: t.n_sdc5 > 0, confidence, interval)),
        "n_images_sdc5": images["sdc5"],
        "n_images_nonfinite": images["nonfinite"],
        "margin_lost": _margin(trials, confidence),
        "fault_accuracy": _accuracy(trials, confidence, mean),
        "fit": _fit(raw_fit, stored.n_bits, sdc_rate),
        "until": _until(plan, sdc_rate, per_rate),
        **_by_site(found, stored, confidence, interval),
        "per_rate": per_rate,
        "seconds": seconds,
        "versions": header.versions,
        "cpu": header.cpu,
        "warnings": warnings,
    }


def results(
    paths: Sequence[Path],
    *,
    confidence: float = 0.95,
    interval: Method = "wilson",
    raw_fit: float | None = None,
    map_file: Path | None = None,
) -> dict[str, Any]:
    """The summary of a store, or of the stores of one campaign's shards together.

    With `addresses.report`, for which `map_file` is the memory map of the model.
    """
    header, trials, seconds = store.read(paths)
    mapped = addresses.read_map(map_file, header)
    summary = summarize(
        header, trials, seconds, confidence=confidence, interval=interval, raw_fit=raw_fit
    )
    return summary | addresses.report(header, trials, mapped)
