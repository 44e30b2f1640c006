"""The int8 QDQ file: Brevitas' exporter behind one function, then made clean and exact.

Brevitas 0.13 builds integer initializers through the TorchScript exporter only.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from resq_deploy.errors import ExportError
from resq_deploy.nets.quantized import UNSIGNED, codes, weight_layers

INPUT, OUTPUT, BATCH_AXIS = "input", "logits", "N"
MOVES = (
    "Concat", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
"""Operators that hand elements on as they are: they work on the codes."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no prints of the exporters in here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def torchscript(
    exporter: Callable[..., Any], net: nn.Module, example: Tensor, **options: Any
) -> onnx.ModelProto:
    """Run one of Brevitas' exporters quietly and return what it wrote.

    ExportError when it refuses, such as for a bias that is too large for the int32 grid of a
    channel with next to no weights.
    """
    # A real file: given a buffer, Brevitas leaves out its passes that make initializers.
    with TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "model.onnx"
        try:
            exporter(
                net.eval(), args=example, export_path=str(file), dynamo=False, input_names=[INPUT],
                output_names=[OUTPUT], keep_initializers_as_inputs=False, **options,
            )  # fmt: skip
        except RuntimeError as error:
            line = str(error).partition("\n")[0]
            raise ExportError(f"Brevitas cannot export this network: {line}") from error
        return onnx.load(file)


def replace_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a tensor wherever a node reads it."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads."""
    used = {name for node in graph.node for name in node.input}
    unused = [t for t in graph.initializer if t.name not in used]
    for initializer in unused:
        graph.initializer.remove(initializer)


def _fold_weight_clips(graph: onnx.GraphProto) -> None:
    """A Clip behind a weight would absorb a flip to -128: apply it to the codes, remove it."""
    stored = {t.name: t for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Clip" and n.input[0] in stored]:
        weight = stored[node.input[0]]
        low, high = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        clipped = np.clip(numpy_helper.to_array(weight), low, high)
        weight.CopyFrom(numpy_helper.from_array(clipped, weight.name))
        replace_input(graph, node.output[0], weight.name)
        graph.node.remove(node)


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


def _unsigned_activations(graph: onnx.GraphProto) -> None:
    """Store signed activations as uint8 with zero point 128 instead of int8 with 0.

    The same grid; but onnxruntime has integer convolutions only for inputs and outputs of one
    type, and those behind a ReLU are uint8.
    """
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    signed: set[str] = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and stored[node.input[2]].dtype == np.int8:
            signed.add(node.output[0])
        elif node.op_type in MOVES and node.input[0] in signed:
            signed.update(node.output)
            continue
        elif not (node.op_type == "DequantizeLinear" and node.input[0] in signed):
            continue
        node.input[2] = "signed_zero_point"
    if signed:
        zero = numpy_helper.from_array(np.array(128, np.uint8), "signed_zero_point")
        graph.initializer.append(zero)


def _signed_weights(graph: onnx.GraphProto) -> None:
    """Store uint8 weights as int8: the same bytes with the top bit inverted, zero point and all."""
    stored = {t.name: t for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "DequantizeLinear"]:
        weight = stored.get(node.input[0])
        if weight is None or weight.data_type != onnx.TensorProto.UINT8:
            continue
        for slot in (0, 2):
            unsigned = numpy_helper.to_array(stored[node.input[slot]])
            node.input[slot] += ".signed"
            signed = (unsigned.astype(np.int16) - UNSIGNED).astype(np.int8)
            graph.initializer.append(numpy_helper.from_array(signed, node.input[slot]))


def _name_weights(graph: onnx.GraphProto, net: nn.Module) -> None:
    """Name weights, scales and biases like the PyTorch parameters, in the order of the graph.

    Every weight layer gets initializers of its own, also where two happen to be equal and the
    exporter stored them once: a fault in one must not reach the other.
    """
    stored = {t.name: t for t in graph.initializer}
    producer = {out: node for node in graph.node for out in node.output}
    wanted = {n: codes(layer).numpy() for n, layer in weight_layers(net).items()}
    users = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    for node in users:
        weight_dq = producer[node.input[1]]
        stored_codes = numpy_helper.to_array(stored[weight_dq.input[0]])
        leaf = node.name.split("/")[-2].split(".")[-1]  # /layer1/layer1.0/conv1/Conv -> conv1
        leaves = (leaf, re.sub(r"_\d+$", "", leaf))  # the exporter numbers scopes of one name
        names = [
            name
            for name, expected in wanted.items()
            if name.split(".")[-1] in leaves and np.array_equal(expected, stored_codes)
        ]
        if not names:
            raise ExportError(f"no weight of the network has the codes of node {node.name!r}")
        wanted.pop(names[0])
        bias_dq = producer[node.input[2]]
        roles = [
            (weight_dq, 0, "weight"), (weight_dq, 1, "weight_scale"),
            (weight_dq, 2, "weight_zero_point"), (bias_dq, 0, "bias"), (bias_dq, 1, "bias_scale"),
            (bias_dq, 2, "bias_zero_point"),
        ]  # fmt: skip
        for reader, slot, suffix in roles:
            own = onnx.TensorProto()
            own.CopyFrom(stored[reader.input[slot]])
            own.name = f"{names[0]}.{suffix}"
            graph.initializer.append(own)
            reader.input[slot] = own.name
    if wanted:
        raise ExportError(f"weights missing from the exported graph: {', '.join(wanted)}")
    drop_unused(graph)


def finish(model: onnx.ModelProto, *, ir_version: int) -> onnx.ModelProto:
    """The metadata that must not vary; checked by onnx."""
    model.ir_version = ir_version
    model.producer_name, model.producer_version = "resq-deploy", ""
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.checker.check_model(model, full_check=False)
    return model


def qdq(net: nn.Module, shape: tuple[int, ...], *, opset: int, ir_version: int) -> onnx.ModelProto:
    """The QDQ model of a quantized network for images (C, H, W), batch dimension dynamic.

    int8 weights and int32 biases are initializers named like the parameters
    (`layer1.0.conv1.weight`); no Clip stands behind a weight.
    """
    from brevitas.export import export_onnx_qcdq

    model = torchscript(
        export_onnx_qcdq, net, torch.zeros(1, *shape), opset_version=opset,
        dynamic_axes={INPUT: {0: BATCH_AXIS}, OUTPUT: {0: BATCH_AXIS}},
    )  # fmt: skip
    _fold_weight_clips(model.graph)
    _move_codes(model.graph)
    _unsigned_activations(model.graph)
    _signed_weights(model.graph)
    _name_weights(model.graph, net)
    return finish(model, ir_version=ir_version)
