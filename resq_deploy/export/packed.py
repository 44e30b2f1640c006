"""Packed 4-bit weights: INT4 initializers, two codes a byte, as a device stores them.

A Cast to int8 stands behind each: onnxruntime folds it when it loads the file and keeps its integer
kernels. With the DequantizeLinear right behind an INT4 tensor it would compute in float.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import ExportError
from resq_deploy.memory_map import READ

OPSET, IR_VERSION = 21, 10
"""The first that have INT4 tensors."""
LOW, HIGH = -8, 7


def pack(model: onnx.ModelProto, weights: list[str]) -> None:
    """Store these int8 initializers of a QDQ model as INT4, in place; the values stay.

    ExportError, with nothing changed, names the first with a code outside of -8 ... 7, or with a
    decoder behind it.
    """
    direct = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    stored = {t.name: t for t in model.graph.initializer}
    arrays = {name: numpy_helper.to_array(stored[name]) for name in weights}
    for name, array in arrays.items():
        if name not in direct:
            raise ExportError(f"weight {name!r} has a decoder behind it and cannot be packed")
        low, high = int(array.min()), int(array.max())
        if not LOW <= low <= high <= HIGH:
            raise ExportError(
                f"weight {name!r} has codes from {low} to {high}, packed 4-bit weights hold {LOW} "
                f"to {HIGH}: train with model.weight_bits = 4"
            )
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            name = node.input[0]
            array = arrays[name].astype(np.int8)
            stored[name].CopyFrom(
                helper.make_tensor(name, TensorProto.INT4, array.shape, array.reshape(-1))
            )
            node.input[0] = f"{name}{READ}"
            model.graph.node.append(
                helper.make_node("Cast", [name], [node.input[0]], f"{name}/Cast",
                                 to=TensorProto.INT8)
            )  # fmt: skip
        model.graph.node.append(node)
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = max(entry.version, OPSET)
    model.ir_version = max(model.ir_version, IR_VERSION)
    onnx.checker.check_model(model)
