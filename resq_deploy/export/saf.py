"""Saturated activation functions on float weights (Fuengfusin and Tamukoh, arXiv 2411.19027).

A float that loses a bit of its exponent can become 1e38. A file that stores v and computes with
w = bound tau(v) cannot read more than the bound of a tensor, whatever is flipped short of a NaN.
Storing v = tau^-1(w / bound) needs no training; the paper also trains with tau in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import InputError

Real = NDArray[np.float64]

TAUS: dict[str, tuple[str, float, Callable[[Real], Real]]] = {
    "tanh": ("Tanh", 1.0, np.arctanh),
    "arctan": ("Atan", np.pi / 2, np.tan),
    "softsign": ("Softsign", 1.0, lambda y: y / (1 - np.abs(y))),
}
"""Operator, its bound, and its inverse."""

ROOM = 1.02
"""The bound of a tensor, relative to max|w|: the inverse of tau at its bound is infinite."""
MATRICES = ("Conv", "Gemm", "MatMul")


def store_through(model: onnx.ModelProto, tau: str, *, half: bool = False) -> None:
    """Store the weights of a float model, in place, so that it reads them through `tau`.

    `tau` is a key of TAUS, or "none" to store them as they are; `half`: in float16. InputError for
    another tau or a model without float weights.
    """
    if tau not in (*TAUS, "none"):
        raise InputError(f"tau {tau!r} is unknown; expected none or one of {', '.join(TAUS)}")
    read = {node.input[1] for node in model.graph.node if node.op_type in MATRICES}
    weights = [t for t in model.graph.initializer if t.name in read and len(t.dims) > 1]
    if not weights:
        raise InputError("the model has no float weights in Conv, Gemm or MatMul")
    nodes: list[onnx.NodeProto] = []
    for tensor in weights:
        w, name = numpy_helper.to_array(tensor).astype(np.float64), tensor.name
        steps: list[tuple[str, list[str], dict[str, Any]]] = []
        if half:
            steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        if tau != "none":
            op, bound, inverse = TAUS[tau]
            gain = max(float(np.abs(w).max()), 1e-30) * ROOM / bound
            w = inverse(w / gain)
            factor = numpy_helper.from_array(np.array(gain, np.float32), f"{name}.gain")
            model.graph.initializer.append(factor)
            steps += [(op, [], {}), ("Mul", [factor.name], {})]
        stored = np.asarray(w, np.float16 if half else np.float32)
        tensor.CopyFrom(numpy_helper.from_array(stored, name))
        for i, (op, more, attributes) in enumerate(steps):
            out = f"{name}.read{i}"
            nodes.append(helper.make_node(op, [name if i == 0 else f"{name}.read{i - 1}", *more],
                                          [out], **attributes))  # fmt: skip
        for node in model.graph.node if steps else ():
            node.input[:] = [nodes[-1].output[0] if x == name else x for x in node.input]
    network = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *network])
    onnx.checker.check_model(model)
