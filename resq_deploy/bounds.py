"""Bounds of what comes out of every ReLU of a float ONNX file, in standard operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy import metrics, runtime
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject import discovery, faults
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.reload import Reload

BOUNDS = ("ranger", "zero", "searched", "neuron")

RATES = {"float": (1e-6, 1e-5, 1e-4), "weight": (1e-3, 3e-3, 1e-2)}
"""Bit error rates of the search, by what is struck: from where little is lost to where most is."""
DRAWS, IMAGES = 4, 128
"""Fault patterns a rate, and images, of the search."""
PARTS, ROUNDS = 3, 3
"""The search cuts the range of a bound into parts, and goes on around the best end of one."""


def _ranges(model: onnx.ModelProto, names: list[str], images: Dataset) -> dict[str, NDArray[Any]]:
    """The greatest value of each of these values (N, ...) over the images, without the batch."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.session(probed.SerializeToString(), threads=0)
    x, feed = runtime.adapt(images.x, session), session.get_inputs()[0].name
    found: dict[str, NDArray[Any]] = {}
    for start in range(0, len(x), runtime.CHUNK):
        values = session.run(names, {feed: x[start : start + runtime.CHUNK]})
        for name, value in zip(names, values, strict=True):
            peak = np.asarray(value).max(axis=0)
            found[name] = np.maximum(found.get(name, peak), peak)
    return found


def bound(model: onnx.ModelProto, how: str, images: Dataset) -> None:
    """Bound what comes out of every ReLU, in place, by the greatest values on `images`.

    `ranger`: clipped to the greatest value of the layer (arXiv 2003.13874). `zero`: what exceeds
    it becomes 0 (FT-ClipAct, arXiv 1912.00941), from where `searched` goes on (`search`).
    `neuron`: each output clipped to its own greatest value (FitAct's bounds, arXiv 2112.13544,
    there learned). InputError for another `how` and for a model without ReLUs.
    """
    if how not in BOUNDS:
        raise InputError(f"bound {how!r} is unknown; expected one of {', '.join(BOUNDS)}")
    names = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    if not names:
        raise InputError("the model has no Relu whose output could be bounded")
    ordered: list[onnx.NodeProto] = []
    ranges = _ranges(model, names, images)
    for node in model.graph.node:
        ordered.append(node)
        if node.op_type != "Relu":
            continue
        name, limit = node.output[0], f"{node.output[0]}.bound"
        peak = ranges[name] if how == "neuron" else ranges[name].max()
        constants = {limit: np.asarray(peak, np.float32)}
        node.output[0] = f"{name}.free"
        if how in ("zero", "searched"):
            constants[f"{limit}.zero"] = np.zeros((), np.float32)
            inside = f"{limit}.inside"
            ordered += [
                helper.make_node("LessOrEqual", [node.output[0], limit], [inside]),
                helper.make_node("Where", [inside, node.output[0], f"{limit}.zero"], [name]),
            ]
        else:
            ordered.append(helper.make_node("Min", [node.output[0], limit], [name]))
        for key, value in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(value, key))
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    onnx.checker.check_model(model)


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
        names = [node.input[1] for node in model.graph.node if node.op_type == "LessOrEqual"]
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.limits = [stored[name] for name in names if name.endswith(".bound")]
        """In the order in which the network computes with them."""

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
