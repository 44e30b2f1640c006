"""The int8 QDQ file, written from the QONNX graph of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

from resq_deploy.errors import ExportError
from resq_deploy.export.graph import (
    OUTPUT,
    attributes,
    capture,
    constants,
    drop_unused,
    finish,
    integers,
)
from resq_deploy.nets.quantized import encoding_of, weight_layers

MOVES = (
    "Concat", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
"""Operators that hand elements on as they are: they work on the codes."""
SIGNED_ZERO = "signed_zero_point"
"""Of signed activations, stored as uint8 with zero point 128 instead of int8 with 0: the same grid,
but onnxruntime has integer convolutions only for inputs and outputs of one type, and those behind a
ReLU are uint8."""


def _parameters(graph: onnx.GraphProto, net: nn.Module) -> dict[str, str]:
    """The names of weights and biases by the output of the Quant node behind them.

    ExportError unless these are the weights of the network.
    """
    value = {out: node.input[0] for node in graph.node for out in node.output}
    users = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    found = {name: value.get(name, name) for node in users for name in node.input[1:3]}
    expected = [f"{name}.{role}" for name in weight_layers(net) for role in ("weight", "bias")]
    if sorted(found.values()) != sorted(expected):
        wrong = sorted(set(expected) ^ set(found.values()))
        raise ExportError(f"weights missing from the exported graph, or not its own: {wrong[:4]}")
    return found


class _Writer:
    """Goes through a QONNX graph; what it writes grows in its order."""

    def __init__(self, graph: onnx.GraphProto, net: nn.Module) -> None:
        self.graph, self.encoding = graph, encoding_of(net)
        self.stored = constants(graph)
        self.parameters = _parameters(graph, net)
        self.not_quant = {n for node in graph.node if node.op_type != "Quant" for n in node.input}
        self.nodes: list[onnx.NodeProto] = []
        self.zeros: dict[str, NDArray[Any]] = {}
        """Zero points of activations."""
        self.made: dict[str, NDArray[Any]] = {}
        """Weights and biases, with their scales and zero points."""
        self.renamed: dict[str, str] = {}
        """What the output of a Quant node is called now."""

    def node(self, op: str, quant: onnx.NodeProto, inputs: Sequence[str]) -> onnx.NodeProto:
        """Write a node that stands for a Quant node, called after it."""
        name = op.join(quant.name.rsplit("Quant", 1))
        last = op == "DequantizeLinear" and quant.output[0] == OUTPUT
        output = OUTPUT if last else f"{name}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [output], name))
        self.renamed[quant.output[0]] = output
        return self.nodes[-1]

    def parameter(self, quant: onnx.NodeProto, name: str) -> None:
        made = integers(quant, self.stored, self.encoding)
        inputs = {
            name: made.codes, f"{name}_scale": made.scale, f"{name}_zero_point": made.zero_point
        }  # fmt: skip
        self.made |= inputs
        node = self.node("DequantizeLinear", quant, list(inputs))
        if made.scale.ndim:
            node.attribute.append(helper.make_attribute("axis", 0))

    def activation(self, quant: onnx.NodeProto) -> None:
        x, scale, zero, bits = quant.input
        facts, point = attributes(quant), int(self.stored[zero])
        signed = bool(facts["signed"])
        given = (int(self.stored[bits]), facts["narrow"], facts["rounding_mode"])
        if given != (8, 0, b"ROUND") or self.stored[scale].size != 1 or (signed and point):
            raise ExportError(
                f"quantizer {quant.name!r} has no form in the file: activations have 8 bits, the "
                "full range, one scale, and no zero point where they are signed"
            )
        if signed:
            zero, point = SIGNED_ZERO, 128
        elif zero in self.not_quant:  # as a float
            zero = f"{zero}.code"
        self.zeros[zero] = np.array(point, np.uint8)
        codes = self.node("QuantizeLinear", quant, [self.renamed.get(x, x), scale, zero])
        self.node("DequantizeLinear", quant, [codes.output[0], scale, zero])

    def write(self) -> None:
        """Replace the nodes and initializers of the graph by those of a QDQ file."""
        for node in self.graph.node:
            if node.op_type != "Quant":
                node.input[:] = [self.renamed.get(name, name) for name in node.input]
                if node.op_type == "Pow" and np.all(self.stored.get(node.input[1]) == 2):
                    node.op_type, node.input[1] = "Mul", node.input[0]  # the same, but faster
                self.nodes.append(node)
            elif node.output[0] in self.parameters:
                self.parameter(node, self.parameters[node.output[0]])
            else:
                self.activation(node)
        values = self.stored | self.zeros | self.made
        kept = [name for name in self.stored if name not in self.made]
        order = dict.fromkeys([*kept, *self.zeros, *self.made])
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(numpy_helper.from_array(values[n], n) for n in order)
        drop_unused(self.graph)


def _move_codes(graph: onnx.GraphProto) -> None:
    """Let operators that only move elements read the integer codes.

    Q -> DQ -> Reshape -> Conv becomes Q -> Reshape -> DQ -> Conv, because onnxruntime finds an
    integer kernel only where the DequantizeLinear is the direct neighbour. Scales per tensor;
    inputs of a Concat must share theirs.
    """
    producer = {out: node for node in graph.node for out in node.output}
    ordered: list[onnx.NodeProto] = []
    for node in graph.node:
        ordered.append(node)
        data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        readers = [producer.get(name) for name in data]
        if node.op_type not in MOVES or not all(r and r.op_type == "DequantizeLinear"
                                                for r in readers):  # fmt: skip
            continue
        parameters = {tuple(cast(onnx.NodeProto, r).input[1:]) for r in readers}
        if len(parameters) > 1 or len(node.output) > 1:
            continue
        for i, reader in enumerate(readers):
            node.input[i] = cast(onnx.NodeProto, reader).input[0]
        moved, node.output[0] = node.output[0], f"{node.output[0]}.codes"
        behind = onnx.helper.make_node(
            "DequantizeLinear", [node.output[0], *parameters.pop()], [moved],
            name=f"{node.name}/DequantizeLinear",
        )  # fmt: skip
        producer[moved] = behind
        ordered.append(behind)
    read = {name for node in ordered for name in node.input} | {o.name for o in graph.output}
    del graph.node[:]
    graph.node.extend(n for n in ordered if n.op_type != "DequantizeLinear" or n.output[0] in read)


def to_qdq(graph: onnx.ModelProto, net: nn.Module, *, ir_version: int) -> onnx.ModelProto:
    """The QDQ model of a network, from its graph as `graph.capture` gives it."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _Writer(model.graph, net).write()
    _move_codes(model.graph)
    for entry in [entry for entry in model.opset_import if entry.domain]:
        model.opset_import.remove(entry)
    return finish(model, ir_version=ir_version)


def qdq(net: nn.Module, shape: tuple[int, ...], *, opset: int, ir_version: int) -> onnx.ModelProto:
    """The QDQ model of a quantized network for images (C, H, W), batch dimension dynamic.

    int8 weights and int32 biases are initializers named like the parameters
    (`layer1.0.conv1.weight`); no Clip stands behind a weight.
    """
    return to_qdq(capture(net, shape, opset=opset), net, ir_version=ir_version)
