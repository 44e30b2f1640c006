"""Bounds of what comes out of every ReLU of a float ONNX file, in standard operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy import runtime
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError

BOUNDS = ("ranger", "zero", "searched", "neuron", "learned")
TO_ZERO = ("zero", "searched", "learned")
"""Those that make 0 of what exceeds them."""
ROOM = 1.0001
"""Bounds of these, relative to the greatest value: other kernels round otherwise, and what they
give for the same image must not become 0."""


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
    `neuron`: each output clipped to its own greatest value. `learned`: 0 where an output exceeds
    its own greatest value (FitAct, arXiv 2112.13544), from where `learned.learn` goes on.
    InputError for another `how` and for a model without ReLUs.
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
        peak = ranges[name] if how in ("neuron", "learned") else ranges[name].max()
        constants = {limit: np.asarray(peak, np.float32)}
        node.output[0] = f"{name}.free"
        if how in TO_ZERO:
            constants[limit] *= np.float32(ROOM)
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


def limits(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The bounds above which outputs become 0, in the order in which the network computes."""
    names = [node.input[1] for node in model.graph.node if node.op_type == "LessOrEqual"]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return [stored[name] for name in names if name.endswith(".bound")]
