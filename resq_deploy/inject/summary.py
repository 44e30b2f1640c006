"""What a campaign found: the JSON of `inject` and `results`, and the rows of the CSV."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import metrics, store
from resq_deploy.errors import InputError
from resq_deploy.inject import plans, protect
from resq_deploy.inject.space import CHECK, Space
from resq_deploy.records import OUTCOMES, Interval, Site, Trial
from resq_deploy.store import Header

CSV_COLUMNS = "trial,tensor,offset,bit,n_flips,n_total,n_correct,n_sdc,n_changed".split(",")


def _interval(interval: Interval) -> dict[str, Any]:
    return dict(vars(interval))


def _sdc(trials: Sequence[Trial], confidence: float) -> dict[str, Any]:
    """Trial counts and the rate of trials with silent data corruption."""
    n_sdc = sum(t.outcome == "sdc" for t in trials)
    return {
        "n_trials": len(trials),
        "n_sdc_trials": n_sdc,
        "sdc_rate": _interval(metrics.wilson(n_sdc, len(trials), confidence)),
    }


def _accuracy(trials: Sequence[Trial], confidence: float) -> dict[str, Any]:
    """Accuracy under faults over patterns: mean with interval, worst, 5 % quantile."""
    values = np.array([t.n_correct / t.n_total for t in trials])
    mean = metrics.bootstrap_mean(values, confidence)
    return {
        "mean": mean.value,
        "low": mean.low,
        "high": mean.high,
        "confidence": confidence,
        "worst": float(values.min()),
        "q05": float(np.quantile(values, 0.05)),
        "n": len(values),
    }


def _groups(
    trials: Sequence[Trial], key: Callable[[Trial], Any]
) -> Iterator[tuple[Any, list[Trial]]]:
    groups: dict[Any, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(key(trial), []).append(trial)
    yield from groups.items()


def _by_site(trials: Sequence[Trial], header: Header, confidence: float) -> dict[str, Any]:
    """Breakdown of the trials with exactly one flip."""
    order = {row["name"]: i for i, row in enumerate(header.space)}
    bits = {row["name"]: row["n_bits"] for row in header.space}
    single = sorted(
        ((t.site, t) for t in trials if t.site is not None),
        key=lambda pair: (order[pair[0].tensor], pair[0].bit, pair[1].trial),
    )
    found = [t for _, t in single]

    def tensor(t: Trial) -> str:
        return t.site.tensor if t.site else ""

    def bit(t: Trial) -> int:
        return t.site.bit if t.site else -1

    return {
        "per_layer": [
            {
                "tensor": name,
                "n_bits": bits[name],
                **_sdc(group, confidence),
                "outcomes": _outcomes(group),
                "mean_accuracy": float(np.mean([t.n_correct / t.n_total for t in group])),
                "worst_accuracy": min(t.n_correct / t.n_total for t in group),
            }
            for name, group in _groups(found, tensor)
        ],
        "per_bit": [
            {"bit": number, **_sdc(group, confidence), "outcomes": _outcomes(group)}
            for number, group in sorted(_groups(found, bit), key=lambda pair: pair[0])
        ],
        "per_layer_bit": [
            {"tensor": name, "bit": number, **_sdc(group, confidence)}
            for (name, number), group in _groups(found, lambda t: (tensor(t), bit(t)))
        ],
    }


def _outcomes(trials: Sequence[Trial]) -> dict[str, int]:
    counts = Counter(t.outcome for t in trials)
    return {name: counts[name] for name in OUTCOMES}


def _per_rate(trials: Sequence[Trial], confidence: float) -> list[dict[str, Any]]:
    return [
        {
            "rate": rate,
            **_accuracy(group, confidence),
            "mean_flips": float(np.mean([t.n_flips for t in group])),
            **_sdc(group, confidence),
        }
        for rate, group in _groups([t for t in trials if t.rate is not None], lambda t: t.rate)
    ]


def summarize(
    header: Header, trials: Sequence[Trial], seconds: float, *, confidence: float = 0.95
) -> dict[str, Any]:
    """The summary of a campaign in plain JSON values.

    `outcomes` counts trials (a trial is `masked` when no image's output changed, `sdc` when a
    top-1 changed on at least one image, else `benign`); `outcomes_images` counts pairs of trial
    and image. Rates over trials have Wilson intervals, accuracies bootstrap intervals over
    patterns. InputError when no trial has finished.
    """
    if not trials:
        raise InputError("the store has no finished trial; continue the campaign with --resume")
    stored = Space.from_json(header.space)
    protection = protect.parse(header.protection)
    plan = plans.restore(header.plan, header.fault, stored)
    index, n_shards = (int(part) for part in header.shard.split("/"))
    n_planned = sum(number % n_shards == index for number in plan.trials())
    pairs = sum(t.n_total for t in trials)
    changed, sdc = sum(t.n_changed for t in trials), sum(t.n_sdc for t in trials)
    warnings = list(header.warnings)
    answered = [t for t in trials if t.n_flips and not t.refused]
    if not changed and answered and header.protection == "none":
        warnings.append("no fault changed any output: check that the model uses these weights")
    if len(trials) < n_planned:
        warnings.append(f"{n_planned - len(trials)} of {n_planned} planned trials are missing")
    return {
        "model_sha256": header.model_sha256,
        "data_sha256": header.data_sha256,
        "n_images": header.n_images,
        "golden": dict(vars(header.golden)),
        "engine": header.engine,
        "fault": header.fault,
        "targets": list(dict.fromkeys(t.target for t in stored.tensors if t.target != CHECK)),
        "protection": protection.cost(stored),
        "plan": {k: v for k, v in header.plan.items() if k != "sites"},
        "seed": header.seed,
        "shard": header.shard,
        "n_bits": sum(row["n_bits"] for row in header.space),
        "n_planned": n_planned,
        "n_trials": len(trials),
        "outcomes": _outcomes(trials),
        "outcomes_images": {"masked": pairs - changed, "benign": changed - sdc, "sdc": sdc},
        "sdc_rate": _sdc(trials, confidence)["sdc_rate"],
        "fault_accuracy": _accuracy(trials, confidence),
        **_by_site(trials, header, confidence),
        "per_rate": _per_rate(trials, confidence),
        "seconds": seconds,
        "versions": header.versions,
        "cpu": header.cpu,
        "warnings": warnings,
    }


def results(paths: Sequence[Path], *, confidence: float = 0.95) -> dict[str, Any]:
    """The summary of a store, or of the stores of one campaign's shards together."""
    header, trials, seconds = store.read(paths)
    return summarize(header, trials, seconds, confidence=confidence)


def _sites(header: Header, trials: Sequence[Trial]) -> Iterator[tuple[Trial, list[Site]]]:
    """Every trial with its sites; those of several flips are drawn again from the seed."""
    space = Space.from_json(header.space)
    plan = plans.restore(header.plan, header.fault, space)
    for trial in trials:
        if trial.site is not None:
            yield trial, [trial.site]
        else:
            yield trial, space.sites(plan.cells(trial.trial, space, header.seed))


def write_csv(paths: Sequence[Path], out: Path, *, sites: bool = False) -> int:
    """One row per trial in the columns CSV_COLUMNS (and `rate` where the campaign has rates).

    With `sites` the sites of patterns with several flips stand in the three site columns, joined
    with `;`; without, those columns are empty there. Returns the number of rows.
    """
    header, trials, _ = store.read(paths)
    rated = any(t.rate is not None for t in trials)
    pairs = _sites(header, trials) if sites else ((t, [t.site] if t.site else []) for t in trials)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*CSV_COLUMNS, *(["rate"] if rated else [])])
        for t, hit in pairs:
            columns = [
                ";".join(str(getattr(s, f)) for s in hit) for f in ("tensor", "offset", "bit")
            ]
            counts = [t.n_flips, t.n_total, t.n_correct, t.n_sdc, t.n_changed]
            writer.writerow([t.trial, *columns, *counts, *([t.rate] if rated else [])])
    return len(trials)


def write_sites(paths: Sequence[Path], out: Path) -> int:
    """The faults alone, as Injection,Layer,TensorIndex,Bit: input for `--sites`. Returns rows."""
    header, trials, _ = store.read(paths)
    rows = 0
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(plans.CSV_COLUMNS)
        for t, hit in _sites(header, trials):
            writer.writerows([t.trial, s.tensor, s.offset, s.bit] for s in hit)
            rows += len(hit)
    return rows
