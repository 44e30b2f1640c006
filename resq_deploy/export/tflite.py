"""The TFLite file: the QDQ graph in int8, for LiteRT, TFLite Micro and Arm Vela.

The integer codes are those of the QDQ file. What differs is the form: activations are int8 (a uint8
code minus 128, the same value), images are NHWC, convolution weights are OHWI (1HWO where every
channel has its own filter), and the batch size is 1. The runtimes round half away from zero or
multiply in fixed point, so outputs may be a step or two apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.errors import ExportError
from resq_deploy.export import flatbuffer
from resq_deploy.export.flatbuffer import Operator, Tensor
from resq_deploy.export.graph import INPUT, OUTPUT, attributes

SHIFT = 128
"""Between uint8 codes and zero points and int8 ones."""
LOWEST = -128
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
FILTERS_LAST, FILTERS_FIRST = (1, 2, 3, 0), (3, 0, 1, 2)
"""O1HW -> 1HWO, where every channel has its own filter, and back."""
FILTER_AXIS = 3
"""Of 1HWO."""
RELU, LINEAR = 1, 0
"""Fused activations of the schema (ActivationFunctionType)."""
SAME, VALID = 0, 1
"""Paddings of the schema."""


class Unsupported(ExportError):
    """The network has an operator that this file format has no exact int8 form of."""


def _refuse(node: onnx.NodeProto, why: str) -> Unsupported:
    return Unsupported(f"model.tflite cannot hold {node.op_type} {node.name!r}: {why}")


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[i] for i in NHWC) if len(shape) == 4 else shape


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor for one image."""
    one = onnx.ModelProto()
    one.CopyFrom(model)
    one.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(one, strict_mode=True).graph
    infos = (*graph.input, *graph.value_info)
    return {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos}


class _Converter:
    """Goes through the nodes; `tensors` and `operators` grow in their order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.producer = {out: node for node in model.graph.node for out in node.output}
        self.shapes = _shapes(model)
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []

    # ------------------------------------------------------------------ tensors

    def constant(self, name: str, data: NDArray[Any], **facts: Any) -> str:
        tensor = Tensor(name=name, shape=data.shape, dtype=str(data.dtype), data=data, **facts)
        self.tensors.setdefault(name, tensor)
        return name

    def activation(self, name: str, onnx_shape: tuple[int, ...], like: Tensor) -> str:
        """A tensor that is computed, with the scale and zero point of `like`."""
        self.tensors[name] = Tensor(
            name=name, shape=_nhwc(onnx_shape), scale=like.scale, zero_point=like.zero_point
        )
        return name

    def quantized(self, node: onnx.NodeProto) -> str:
        """The int8 tensor that a QuantizeLinear writes."""
        scale, zero = (self.stored[name] for name in node.input[1:])
        if zero.dtype != np.uint8 or scale.size != 1:
            raise _refuse(node, f"one uint8 zero point expected, got {zero.size} {zero.dtype}")
        name = str(node.output[0])
        self.tensors[name] = Tensor(
            name=name, shape=_nhwc(self.shapes[name]), scale=(float(scale),),
            zero_point=int(zero) - SHIFT,
        )  # fmt: skip
        return name

    def codes(self, value: str, reader: onnx.NodeProto) -> str:
        """The code tensor behind the DequantizeLinear that `value` comes from."""
        node = self.producer.get(value)
        if node is None or node.op_type != "DequantizeLinear":
            raise _refuse(reader, f"its input {value!r} is not quantized")
        if node.input[0] not in self.tensors and node.input[0] not in self.stored:
            behind = self.producer[node.input[0]]
            raise _refuse(behind, "its output would have to be computed when the file is loaded")
        return str(node.input[0])

    def parameters(self, node: onnx.NodeProto, *, depthwise: bool) -> tuple[str, str]:
        """Weight and bias of a Conv or Gemm as constants; codes as they are, axes in TFLite's
        order."""
        names = []
        for value in node.input[1:3]:
            name, dq = self.codes(value, node), self.producer[value]
            if self.stored[dq.input[2]].any():
                raise _refuse(node, f"{name!r} has a zero point that is not 0")
            data, axis = self.stored[name], 0
            if data.ndim == 4:
                data = data.transpose(FILTERS_LAST if depthwise else NHWC)
                axis = FILTER_AXIS if depthwise else 0
            scale = tuple(float(s) for s in self.stored[dq.input[1]].reshape(-1))
            names.append(self.constant(name, np.ascontiguousarray(data), scale=scale, axis=axis))
        return names[0], names[1]

    # ------------------------------------------------------------------ operators

    def emit(
        self, code: str, version: int, inputs: tuple[str, ...], output: str, options: str,
        **fields: Any,
    ) -> None:  # fmt: skip
        self.operators.append(
            Operator(
                code=code, version=version, inputs=inputs, output=output, options=options,
                fields=fields,
            )
        )  # fmt: skip

    def padded(self, x: str, node: onnx.NodeProto, *, lowest: bool = False) -> tuple[str, int]:
        """Input and padding mode of a window operator.

        SAME pads behind more than in front where a stride leaves a remainder, ONNX evenly: there
        an operator of its own pads, with the zero point, or with the `lowest` code.
        """
        facts = attributes(node)
        if facts.get("auto_pad", b"NOTSET") != b"NOTSET" or facts.get("ceil_mode", 0):
            raise _refuse(node, "auto_pad and ceil_mode are not translated")
        pads = facts.get("pads", [0, 0, 0, 0])
        if not any(pads):
            return x, VALID
        kernel, strides = facts["kernel_shape"], facts.get("strides", [1, 1])
        dilations = facts.get("dilations", [1, 1])
        shape = self.tensors[x].shape
        same = []
        for n, k, stride, dilation in zip(shape[1:3], kernel, strides, dilations, strict=True):
            total = max(0, (-(-n // stride) - 1) * stride + (k - 1) * dilation + 1 - n)
            same.append((total // 2, total - total // 2))
        if [same[0][0], same[1][0], same[0][1], same[1][1]] == list(pads):
            return x, SAME
        around = np.array([[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]], np.int32)
        size = tuple(int(n) for n in np.array(shape) + around.sum(axis=1))
        like, name = self.tensors[x], f"{node.name}.padded"
        self.tensors[name] = Tensor(
            name=name, shape=size, scale=like.scale, zero_point=like.zero_point
        )
        amounts = self.constant(f"{node.name}.pads", around)
        if lowest and like.zero_point != LOWEST:
            code = np.full(1, LOWEST, np.int8)
            value = self.constant(f"{node.name}.lowest", code, scale=like.scale,
                                  zero_point=like.zero_point)  # fmt: skip
            self.emit("PADV2", 2, (x, amounts, value), name, "PadV2Options")
        else:
            self.emit("PAD", 2, (x, amounts), name, "PadOptions")
        return name, VALID

    def conv(self, node: onnx.NodeProto, out: str, activation: int) -> None:
        facts = attributes(node)
        x = self.codes(node.input[0], node)
        channels, group = self.shapes[x][1], facts.get("group", 1)
        depthwise = group == channels and group > 1
        if group != 1 and not depthwise:
            raise _refuse(node, f"{group} groups of {channels} channels")
        weight, bias = self.parameters(node, depthwise=depthwise)
        x, padding = self.padded(x, node)
        (h, w), (dh, dw) = facts.get("strides", [1, 1]), facts.get("dilations", [1, 1])
        fields = {
            "Padding": padding, "StrideW": w, "StrideH": h, "FusedActivationFunction": activation,
            "DilationWFactor": dw, "DilationHFactor": dh,
        }  # fmt: skip
        if depthwise:
            fields["DepthMultiplier"] = self.tensors[weight].shape[3] // channels
        code, options = (
            ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise
            else ("CONV_2D", "Conv2DOptions")
        )  # fmt: skip
        self.emit(code, 3, (x, weight, bias), out, options, **fields)

    def gemm(self, node: onnx.NodeProto, out: str, activation: int) -> None:
        facts = attributes(node)
        usual = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
        if {**{"transB": 0}, **facts} | usual != {**usual, **facts}:
            raise _refuse(node, "x W^T + b expected")
        x = self.codes(node.input[0], node)
        weight, bias = self.parameters(node, depthwise=False)
        version = 12 if len(self.tensors[weight].scale) > 1 else 4  # per channel came late
        self.emit("FULLY_CONNECTED", version, (x, weight, bias), out, "FullyConnectedOptions",
                  FusedActivationFunction=activation)  # fmt: skip

    def add(self, node: onnx.NodeProto, out: str, activation: int) -> None:
        a, b = (self.codes(value, node) for value in node.input)
        if self.tensors[a].shape != self.tensors[b].shape:
            raise _refuse(node, f"shapes {self.shapes[a]} and {self.shapes[b]}")
        self.emit("ADD", 2, (a, b), out, "AddOptions", FusedActivationFunction=activation)

    def mean(self, node: onnx.NodeProto, out: str, activation: int) -> None:
        if activation != LINEAR:
            raise _refuse(node, "a ReLU behind an average")
        x = self.codes(node.input[0], node)
        axes = self.constant("spatial_axes", np.array([1, 2], np.int32))
        keep = len(self.tensors[out].shape) == 4
        self.emit("MEAN", 2, (x, axes), out, "ReducerOptions", KeepDims=keep)

    def max_pool(self, node: onnx.NodeProto) -> None:
        facts = attributes(node)
        if any(d != 1 for d in facts.get("dilations", [1, 1])):
            raise _refuse(node, "dilations")
        source, out = self.tensors[node.input[0]], node.output[0]
        x, padding = self.padded(source.name, node, lowest=True)
        self.activation(out, self.shapes[out], source)
        (h, w), (kh, kw) = facts.get("strides", [1, 1]), facts["kernel_shape"]
        self.emit("MAX_POOL_2D", 2, (x,), out, "Pool2DOptions", Padding=padding, StrideW=w,
                  StrideH=h, FilterWidth=kw, FilterHeight=kh)  # fmt: skip

    def flatten(self, node: onnx.NodeProto) -> None:
        """(N, C, H, W) -> (N, C H W) in ONNX's order of elements."""
        source, out = self.tensors[node.input[0]], node.output[0]
        if attributes(node).get("axis", 1) != 1:
            raise _refuse(node, "an axis that is not 1")
        x, shape = source.name, self.shapes[source.name]
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            x = f"{out}.nchw"
            self.tensors[x] = Tensor(
                name=x, shape=shape, scale=source.scale, zero_point=source.zero_point
            )
            order = self.constant("nchw", np.array(NCHW, np.int32))
            self.emit("TRANSPOSE", 2, (source.name, order), x, "TransposeOptions")
        self.activation(out, self.shapes[out], source)
        target = self.constant(f"{out}.shape", np.array([-1, self.shapes[out][1]], np.int32))
        self.emit("RESHAPE", 1, (x, target), out, "ReshapeOptions")

    # ------------------------------------------------------------------ the graph

    def computed(self, quantize: onnx.NodeProto) -> None:
        """The operator whose result a QuantizeLinear rounds, with what is fused into it."""
        out = self.quantized(quantize)
        if quantize.input[0] == INPUT:
            return
        node, activation = self.producer[quantize.input[0]], LINEAR
        if node.op_type == "Relu":
            node, activation = self.producer[node.input[0]], RELU
        if node.op_type == "Flatten":  # behind an average it only drops axes of size 1
            before = self.producer.get(node.input[0])
            node = before if before and before.op_type == "GlobalAveragePool" else node
        if node.op_type not in COMPUTING:
            raise _refuse(node, f"supported are {', '.join(sorted({*COMPUTING, *MOVING}))}")
        COMPUTING[node.op_type](self, node, out, activation)

    def convert(self, model: onnx.ModelProto) -> bytes:
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                self.computed(node)
            elif node.op_type in MOVING and node.input[0] in self.tensors:
                MOVING[node.op_type](self, node)
        source = next(n for n in model.graph.node if n.input[0] == INPUT).output[0]
        names = {source: INPUT, self.codes(OUTPUT, self.producer[OUTPUT]): OUTPUT}

        def named(name: str) -> str:
            return names.get(name, name)

        tensors = [replace(t, name=named(t.name)) for t in self.tensors.values()]
        operators = [
            replace(op, inputs=tuple(map(named, op.inputs)), output=named(op.output))
            for op in self.operators
        ]
        return flatbuffer.write(tensors, operators, inputs=INPUT, outputs=OUTPUT)


COMPUTING = {
    "Conv": _Converter.conv,
    "Gemm": _Converter.gemm,
    "Add": _Converter.add,
    "GlobalAveragePool": _Converter.mean,
}
MOVING = {"MaxPool": _Converter.max_pool, "Flatten": _Converter.flatten}


def tflite(model: onnx.ModelProto) -> bytes:
    """The TFLite file of a QDQ model that `export.qdq` made, for one image (1, H, W, C).

    Input: int8, a pixel's byte minus 128; output: int8 logits (1, n_classes). Weights and biases
    are named as in the QDQ file. Unsupported names the first operator that has no form here.
    """
    return _Converter(model).convert(model)


def codes(raw: bytes) -> dict[str, NDArray[Any]]:
    """Weights and biases of such a file by name, weights of convolutions as OIHW."""
    found = {}
    for tensor in flatbuffer.constants(raw):
        data, quantized = tensor.data, bool(tensor.scale)
        assert data is not None
        if quantized and data.ndim == 4:
            data = data.transpose(FILTERS_FIRST if tensor.axis == FILTER_AXIS else NCHW)
        if quantized:
            found[tensor.name] = data
    return found
