"""The QONNX file: Quant nodes with explicit bit widths, cleaned, for FINN and hls4ml.

Batch size 1, as those tools expect. The int32 bias is folded to its exact value, because
their front ends choke on its Quant node.
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from resq_deploy.encoding import Encoding
from resq_deploy.export.qdq import drop_unused, finish, quiet, replace_input, torchscript
from resq_deploy.nets.quantized import encoding_of

CHUNK = 100


def _fold_bias_quant(graph: onnx.GraphProto) -> None:
    """Replace every Quant node of 32 bits on an initializer by the value it computes."""
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Quant" and n.input[0] in stored]:
        x, scale, zero, width = (stored[name] for name in node.input)
        if int(width) != 32:
            continue
        limit = 2.0**31
        steps = np.clip(np.rint(x.astype(np.float64) / scale + zero), -limit, limit - 1)
        exact = ((steps - zero) * scale).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(exact, node.output[0]))
        graph.node.remove(node)
    drop_unused(graph)


def _name_weights(graph: onnx.GraphProto) -> None:
    """Call the float weight behind a Quant node after its convolution or linear layer."""
    producer = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in producer:
            quant = producer[node.input[1]]
            for tensor in graph.initializer:
                if tensor.name == quant.input[0]:
                    replace_input(graph, tensor.name, f"{node.name}.weight")
                    tensor.name = f"{node.name}.weight"


def _round_to_levels(graph: onnx.GraphProto, encoding: Encoding) -> None:
    """Put float weights on levels that are not those of their Quant node, which rounds to the next
    integer."""
    stored = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Quant" and node.input[0] in stored:
            weight = stored[node.input[0]]
            scale = numpy_helper.to_array(stored[node.input[1]])
            code = encoding.nearest(numpy_helper.to_array(weight) / scale)
            exact = code.astype(np.float32) * scale
            weight.CopyFrom(numpy_helper.from_array(exact, weight.name))


def qonnx(
    net: nn.Module, shape: tuple[int, ...], *, opset: int, ir_version: int
) -> onnx.ModelProto:
    """The cleaned QONNX model of a quantized network for one image (1, C, H, W).

    Its weights are what a device reads, whatever the encoding of the stored codes. Every tensor
    has its shape, which qonnx's executor and some front ends ask for.
    """
    from brevitas.export import export_qonnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.cleanup import cleanup_model

    model = torchscript(export_qonnx, net, torch.zeros(1, *shape), opset_version=opset)
    with quiet():
        model = cleanup_model(ModelWrapper(model)).model
    _fold_bias_quant(model.graph)
    _name_weights(model.graph)
    if not encoding_of(net).uniform:
        _round_to_levels(model.graph, encoding_of(net))
    model = finish(model, ir_version=ir_version)
    with quiet():
        return cast(onnx.ModelProto, ModelWrapper(model).transform(InferShapes()).model)


def execute(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (N, n_classes) of float images (N, C, H, W), by qonnx's own executor."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    size = min(CHUNK, len(x))
    with quiet():
        model = copy.deepcopy(model)
        for info in (*model.graph.input, *model.graph.output):
            info.type.tensor_type.shape.dim[0].dim_value = size
        del model.graph.value_info[:]  # qonnx's ChangeBatchSize would break Reshapes of tokens
        wrapped = ModelWrapper(model).transform(InferShapes())
        source, sink = wrapped.graph.input[0].name, wrapped.graph.output[0].name
        outputs = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            full = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            outputs.append(execute_onnx(wrapped, {source: full})[sink][: len(part)])
    return np.concatenate(outputs)
