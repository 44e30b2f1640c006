"""Accuracy of a file in onnxruntime with and without graph optimization, and against another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics, runtime
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.records import Count


def _agreement(a: NDArray[Any], b: NDArray[Any]) -> dict[str, Any]:
    """How far two outputs (N, ...) are apart; differences in the unit of the output."""
    if a.shape != b.shape:
        raise InputError(f"outputs of the shapes {a.shape} and {b.shape} cannot be compared")
    return {
        "max_abs_diff": float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()),
        "n_top1_equal": int((metrics.top1(a) == metrics.top1(b)).sum()),
        "n_total": len(a),
    }


def verify(model: bytes, data: Dataset, *, against: bytes | None = None) -> dict[str, Any]:
    """Run a file (and another one) on images at the optimization levels off and all.

    Keys: accuracy {off, all}, off_against_all, and with `against`: against_accuracy {off, all},
    against {off, all}; agreements have max_abs_diff, n_top1_equal, n_total.
    """

    def outputs(raw: bytes) -> dict[str, NDArray[Any]]:
        sessions = {level: runtime.session(raw, level=level) for level in runtime.LEVELS}
        return {k: runtime.run(s, runtime.adapt(data.x, s)) for k, s in sessions.items()}

    def accuracy(output: NDArray[Any]) -> dict[str, int]:
        n_correct = int((metrics.top1(output) == data.y).sum())
        return dict(vars(Count(n_correct=n_correct, n_total=len(data))))

    mine = outputs(model)
    found: dict[str, Any] = {
        "accuracy": {level: accuracy(output) for level, output in mine.items()},
        "off_against_all": _agreement(mine["off"], mine["all"]),
    }
    if against is not None:
        other = outputs(against)
        found["against_accuracy"] = {level: accuracy(output) for level, output in other.items()}
        found["against"] = {level: _agreement(mine[level], other[level]) for level in mine}
    return found
