"""Clean, attack, fault, attack and fault: one file, the same fault patterns in every column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from resq_deploy import metrics, progress, store
from resq_deploy.data.base import Dataset
from resq_deploy.inject import inject


def matrix(
    model: Path,
    images: Mapping[float, Dataset],
    *,
    rates: Sequence[float],
    draws: int,
    seed: int,
    workers: int,
    confidence: float,
) -> list[dict[str, Any]]:
    """Accuracy of the exported file for every set of images and every bit error rate.

    `images` by the epsilon of their attack, 0 for clean ones. Without faults (`rate` 0) the
    interval is Wilson's over images, else a bootstrap over the `draws` patterns, whose counts of
    right images are `n_correct`.
    """
    rows = []
    for epsilon, data in images.items():
        with TemporaryDirectory() as folder:
            path = Path(folder) / "ber.store"
            found = inject(
                model, data, out=path, rates=rates, draws=draws, seed=seed,
                workers=workers, confidence=confidence, show=progress.bar,
            )  # fmt: skip
            _, trials, _ = store.read([path])
        golden = found["golden"]
        whole = metrics.wilson(golden["n_correct"], golden["n_total"], confidence)
        rows.append(
            {"epsilon": epsilon, "rate": 0.0, "n_images": len(data), "n_patterns": 0}
            | {"mean": whole.value, "low": whole.low, "high": whole.high, "worst": whole.value}
        )
        for row in found["per_rate"]:
            numbers = {key: row[key] for key in ("mean", "low", "high", "worst")}
            counts = [t.n_correct for t in trials if t.rate == row["rate"]]
            facts = {"epsilon": epsilon, "rate": row["rate"], "n_correct": counts}
            rows.append(facts | {"n_images": len(data), "n_patterns": row["n"]} | numbers)
    return rows
