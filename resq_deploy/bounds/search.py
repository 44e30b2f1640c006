"""Bounds lowered by a search under faults: FT-ClipAct (Hoang et al., arXiv 1912.00941)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from resq_deploy import bounds, metrics
from resq_deploy.data.base import Dataset
from resq_deploy.inject import discovery, faults
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.reload import Reload

RATES = {"float": (1e-6, 1e-5, 1e-4), "weight": (1e-3, 3e-3, 1e-2)}
"""Bit error rates of the search, by what is struck: from where little is lost to where most is."""
DRAWS, IMAGES = 4, 128
"""Fault patterns a rate, and images, of the search."""
PARTS, ROUNDS = 3, 3
"""The search cuts the range of a bound into parts, and goes on around the best end of one."""


class _Search:
    """Accuracy of a model with `zero` bounds under the same faults, whatever the bounds are."""

    def __init__(self, model: onnx.ModelProto, images: Dataset, target: str) -> None:
        found = discovery.discover(model, [target])
        memory, ber = Memory.of(found), faults.parse("ber")
        self.images = images.first(min(len(images), IMAGES))
        self.rates = RATES[target]
        self._changes = [
            [
                memory.read(ber.flips(ber.sample(memory.space, seed=0, draw=i, rate=rate), memory))
                for i in range(DRAWS)
            ]
            for rate in self.rates
        ]
        self._reload = Reload(found.model, found.space, self.images.x)
        self.limits = bounds.limits(model)

    def area(self) -> float:
        """Mean accuracy over no faults and every rate: the area under the curve of accuracy by
        rate, whose rates lie evenly on a logarithmic axis."""
        rows = [[self._reload.run({})], *([self._reload.run(c) for c in row]
                                          for row in self._changes)]  # fmt: skip
        right = [[(metrics.top1(out) == self.images.y).mean() for out in row] for row in rows]
        return float(np.mean([np.mean(row) for row in right]))

    def lower(self, limit: onnx.TensorProto, best: float) -> float:
        """Leave a bound where the area is greatest, `best` or more; returned."""
        chosen = float(numpy_helper.to_array(limit))
        low, high = 0.0, chosen
        for _ in range(ROUNDS):
            step = (high - low) / PARTS
            for i in range(1, PARTS + 1):
                value = np.float32(low + i * step)
                limit.raw_data = value.tobytes()
                area = self.area() if value != chosen else best
                if area > best:
                    best, chosen = area, float(value)
            low, high = max(0.0, chosen - step), min(chosen + step, high)
            limit.raw_data = np.float32(chosen).tobytes()
        return best


def search(model: onnx.ModelProto, images: Dataset, target: str) -> dict[str, Any]:
    """Lower the bounds that `bound` has put as `searched`, in place, layer by layer.

    FT-ClipAct's interval search (arXiv 1912.00941, algorithm 1): the range of a bound is cut into
    parts, and again around the part with the greatest area under the curve of accuracy by bit
    error rate. Faults strike what is stored as `target`, the same for every bound, on the first
    `IMAGES` of `images`; what wins nothing there stays. Returns what was searched with, and the
    areas before and after.
    """
    bench = _Search(model, images, target)
    before = best = bench.area()
    for limit in bench.limits:
        best = bench.lower(limit, best)
    return {
        "rates": list(bench.rates),
        "draws": DRAWS,
        "n_images": len(bench.images),
        "area_before": before,
        "area": best,
    }
