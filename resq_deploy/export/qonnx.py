"""The QONNX file: Quant nodes with explicit bit widths, cleaned, for FINN and hls4ml.

Batch size 1, as those tools expect. The int32 bias is folded to its exact value, because
their front ends choke on its Quant node.
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from resq_deploy.encoding import Encoding
from resq_deploy.export.graph import (
    BIAS_BITS,
    capture,
    constants,
    drop_unused,
    finish,
    integers,
    quiet,
    replace_input,
)
from resq_deploy.nets.quantized import encoding_of

CHUNK = 100
LAYERS = ("Conv", "Gemm", "MatMul")


def _exact_values(graph: onnx.GraphProto, encoding: Encoding) -> None:
    """Put constants on the values that the network computes with.

    Biases lose their Quant node of 32 bits. Weights keep theirs, which rounds to the next integer,
    and get the values of levels that are not all integers.
    """
    stored = constants(graph)
    weights = {n.input[1] for n in graph.node if n.op_type in LAYERS}
    for node in [n for n in graph.node if n.op_type == "Quant" and n.input[0] in stored]:
        if int(stored[node.input[3]]) == BIAS_BITS:
            exact = integers(node, stored, encoding).values
            graph.initializer.append(numpy_helper.from_array(exact, node.output[0]))
            graph.node.remove(node)
        elif node.output[0] in weights and not encoding.uniform:
            weight = next(t for t in graph.initializer if t.name == node.input[0])
            exact = integers(node, stored, encoding).values
            weight.CopyFrom(numpy_helper.from_array(exact, weight.name))
    drop_unused(graph)


def _name_weights(graph: onnx.GraphProto) -> None:
    """Call the float weight behind a Quant node after its convolution or linear layer."""
    producer = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        if node.op_type in LAYERS and node.input[1] in producer:
            quant = producer[node.input[1]]
            for tensor in graph.initializer:
                if tensor.name == quant.input[0]:
                    replace_input(graph, tensor.name, f"{node.name}.weight")
                    tensor.name = f"{node.name}.weight"


def to_qonnx(graph: onnx.ModelProto, net: nn.Module, *, ir_version: int) -> onnx.ModelProto:
    """The cleaned QONNX model of a network, from its graph as `graph.capture` gives it."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.cleanup import cleanup_model

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    with quiet():
        model = cleanup_model(ModelWrapper(model)).model
    _exact_values(model.graph, encoding_of(net))
    _name_weights(model.graph)
    model = finish(model, ir_version=ir_version)
    with quiet():
        return cast(onnx.ModelProto, ModelWrapper(model).transform(InferShapes()).model)


def qonnx(
    net: nn.Module, shape: tuple[int, ...], *, opset: int, ir_version: int
) -> onnx.ModelProto:
    """The cleaned QONNX model of a quantized network for one image (1, C, H, W).

    Its weights are what a device reads, whatever the encoding of the stored codes. Every tensor
    has its shape, which qonnx's executor and some front ends ask for.
    """
    return to_qonnx(capture(net, shape, opset=opset), net, ir_version=ir_version)


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
