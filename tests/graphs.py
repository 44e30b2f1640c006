"""Random small classifiers, quantized by onnxruntime, for tests that hold engines together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

SHAPE = (3, 7, 6)
N_CLASSES = 5
CHANNELS = [3, 5, 10, 16, 17]
BATCH = 4
"""Of models with a fixed batch."""

Block = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a random classifier is made of; `build` makes the file."""

    blocks: tuple[Block, ...]
    head: str
    form: str = "qdq"
    """qdq, qoperator or dynamic."""
    signed: str = "u8s8"
    """Types of activations and weights."""
    per_channel: bool = False
    symmetric: bool = True
    """Weights without zero points (int8) or at 128 (uint8)."""
    batch: int | str = "N"
    seed: int = 0


OTHERS: list[Block] = [
    ("residual", 3), ("residual", 1), ("concat", 5), ("concat", 16), ("gate",), ("excite",),
    ("max",), ("average",), ("double",), ("scale",),
]  # fmt: skip


def spec(number: int) -> Spec:
    """Classifier number `number`, of all kinds that `build` knows."""
    rng = np.random.default_rng(number)

    def one(choices: Sequence[Any]) -> Any:
        return choices[rng.integers(len(choices))]

    def conv() -> Block:
        return (
            "conv",
            one(CHANNELS),
            one([1, 3, 3, 5]),
            (one([1, 1, 2]), one([1, 1, 2, 3])),  # stride
            tuple(rng.integers(0, 3, 4).tolist()),  # padding
            (one([1, 1, 2]), one([1, 1, 2])),  # dilation
            one(["one", "one", "depthwise", "grouped"]),
            one(["none", "relu", "clip", "leaky", "sigmoid", "silu"]),
        )

    return Spec(
        blocks=(conv(), *(one([conv(), *OTHERS]) for _ in range(one([1, 2, 2, 3])))),
        head=one(["gemm", "matmul", "tokens", "attention", "rows"]),
        form=one(["qdq", "qdq", "qdq", "qoperator", "dynamic"]),
        signed=one(["u8s8", "u8u8", "s8s8"]),
        per_channel=one([False, True]),
        symmetric=one([False, True]),
        batch=one(["N", "N", "N", BATCH]),
        seed=number % 1000,
    )


@dataclass
class _Graph:
    """A float network while it grows; `at` is the last value, `shape` its (C, H, W)."""

    rng: np.random.Generator
    at: str = "x"
    shape: tuple[int, int, int] = SHAPE
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], f"n_{name}", **attributes))
        return name

    def tensor(self, values: Any) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = np.asarray(values)
        return name

    def weight(self, *shape: int) -> str:
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        return self.tensor(self.rng.normal(0, 1.2 / np.sqrt(fan_in), shape).astype(np.float32))

    def bias(self, n: int) -> str:
        return self.tensor(self.rng.normal(0, 0.2, n).astype(np.float32))

    def activate(self, kind: str) -> None:
        if kind == "relu":
            self.at = self.node("Relu", self.at)
        elif kind == "clip":
            low, high = self.tensor(np.float32(0)), self.tensor(np.float32(0.6))
            self.at = self.node("Clip", self.at, low, high)
        elif kind == "leaky":
            self.at = self.node("LeakyRelu", self.at, alpha=0.1)
        elif kind == "sigmoid":
            self.at = self.node("Sigmoid", self.at)
        elif kind == "silu":
            self.at = self.node("Mul", self.at, self.node("Sigmoid", self.at))

    def conv(
        self, out: int, kernel: int = 3, stride: tuple[int, int] = (1, 1),
        pads: tuple[int, ...] = (1, 1, 1, 1), dilation: tuple[int, int] = (1, 1),
        kind: str = "one", activation: str = "none",
    ) -> None:  # fmt: skip
        c, *sizes = self.shape
        groups = 1
        if kind == "depthwise":
            groups, out = c, c
        elif kind == "grouped":
            groups = next((g for g in (2, 3, 5) if c % g == 0), 1)
            out = -(-out // groups) * groups
        reach = [d * (kernel - 1) + 1 for d in dilation]
        if any(
            s + pads[i] + pads[i + 2] < r for i, (s, r) in enumerate(zip(sizes, reach, strict=True))
        ):
            dilation, pads, reach = (1, 1), (kernel // 2,) * 4, [kernel] * 2
        self.at = self.node(
            "Conv", self.at, self.weight(out, c // groups, kernel, kernel), self.bias(out),
            kernel_shape=[kernel] * 2, strides=stride, pads=pads, dilations=dilation, group=groups,
        )  # fmt: skip
        after = [
            (s + pads[i] + pads[i + 2] - reach[i]) // stride[i] + 1 for i, s in enumerate(sizes)
        ]
        self.shape = (out, *after)
        self.activate(activation)

    def block(self, kind: str, *options: Any) -> None:
        start, (c, h, w) = self.at, self.shape
        if kind == "conv":
            self.conv(*options)
        elif kind == "residual":
            self.conv(c, options[0], pads=(options[0] // 2,) * 4)
            self.at = self.node("Add", self.at, start)
            self.activate("relu")
        elif kind == "concat":
            self.conv(options[0], 3, activation="relu")
            left, self.at, self.shape = self.at, start, (c, h, w)
            self.conv(3, 1, pads=(0, 0, 0, 0))
            self.at = self.node("Concat", left, self.at, axis=1)
            self.shape = (options[0] + 3, h, w)
        elif kind == "gate":
            self.conv(c, 1, pads=(0, 0, 0, 0), activation="sigmoid")
            self.at = self.node("Mul", start, self.at)
        elif kind == "excite":  # one factor for every channel
            self.at = self.node("GlobalAveragePool", self.at)
            self.shape = (c, 1, 1)
            self.conv(c, 1, pads=(0, 0, 0, 0), activation="sigmoid")
            self.at, self.shape = self.node("Mul", start, self.at), (c, h, w)
        elif kind == "double":  # both inputs are one value
            self.at = self.node("Add", start, start)
        elif kind == "scale":
            self.at = self.node("Mul", start, self.tensor(np.float32(0.7)))
        elif kind in ("max", "average"):
            operator = "MaxPool" if kind == "max" else "AveragePool"
            self.at = self.node(
                operator, self.at, kernel_shape=[2, 2], strides=[1, 2], pads=[0, 1, 1, 0]
            )
            self.shape = (c, h, (w + 1 - 2) // 2 + 1)

    def head(self, kind: str) -> None:
        c, h, w = self.shape
        if kind == "matmul":
            flat = self.node("Flatten", self.at)
            product = self.node("MatMul", flat, self.weight(c * h * w, N_CLASSES))
            self.at = self.node("Add", product, self.bias(N_CLASSES))
            return
        if kind == "gemm":
            mean = self.node("GlobalAveragePool", self.at)
        else:
            to = self.tensor(np.array([0, c, h * w]))
            tokens = self.node("Transpose", self.node("Reshape", self.at, to), perm=[0, 2, 1])
            if kind == "rows":  # several rows for every image
                rows = self.node("Reshape", tokens, self.tensor(np.array([-1, c])))
                rows = self.node("Gemm", rows, self.weight(10, c), self.bias(10), transB=1)
                tokens = self.node("Reshape", rows, self.tensor(np.array([-1, h * w, 10])))
                c = 10
            elif kind == "tokens":
                product = self.node("MatMul", tokens, self.weight(c, 17))
                tokens = self.node("Relu", self.node("Add", product, self.bias(17)))
                c = 17
            else:
                q, k, v = (self.node("MatMul", tokens, self.weight(c, 6)) for _ in range(3))
                scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 2, 1]))
                mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
                tokens = self.node("Add", tokens, self.node("MatMul", mixed, self.weight(6, c)))
            mean = self.node("ReduceMean", tokens, self.tensor(np.array([1])), keepdims=0)
        flat = self.node("Flatten", mean)
        self.at = self.node("Gemm", flat, self.weight(c, N_CLASSES), self.bias(N_CLASSES))


def images(n: int, seed: int = 0) -> np.ndarray:
    """uint8 pixels; pairs of images differ in a few pixels only."""
    x = np.random.default_rng(seed).integers(0, 256, (n, *SHAPE)).astype(np.uint8)
    x[1::2, :, 2:] = x[: n // 2 * 2 : 2, :, 2:]
    return x


class _Reader(CalibrationDataReader):
    def __init__(self) -> None:
        x = images(8 * BATCH, 99).astype(np.float32) / 255
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(
            {"x": x[i : i + BATCH]} for i in range(0, len(x), BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


TYPES = {
    "u8s8": (QuantType.QUInt8, QuantType.QInt8),
    "u8u8": (QuantType.QUInt8, QuantType.QUInt8),
    "s8s8": (QuantType.QInt8, QuantType.QInt8),
}


def float_model(spec: Spec) -> onnx.ModelProto:
    """The network before quantization."""
    g = _Graph(np.random.default_rng(spec.seed))
    for block in spec.blocks:
        g.block(*block)
    g.head(spec.head)
    graph = helper.make_graph(
        g.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [spec.batch, *SHAPE])],
        [helper.make_tensor_value_info(g.at, TensorProto.FLOAT, [spec.batch, N_CLASSES])],
        [numpy_helper.from_array(v, k) for k, v in g.tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def quantized(model: onnx.ModelProto, spec: Spec) -> bytes:
    """The file that onnxruntime.quantization makes of a float model in the form of `spec`."""
    activations, weights = TYPES[spec.signed]
    extra = {"WeightSymmetric": spec.symmetric}
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        if spec.form == "dynamic":
            quantize_dynamic(
                source, target, weight_type=weights, per_channel=spec.per_channel,
                extra_options=extra,
            )  # fmt: skip
        else:
            quantize_static(
                source, target, _Reader(), activation_type=activations, weight_type=weights,
                quant_format=QuantFormat.QDQ if spec.form == "qdq" else QuantFormat.QOperator,
                per_channel=spec.per_channel, extra_options=extra,
            )  # fmt: skip
        return target.read_bytes()


def build(spec: Spec) -> bytes:
    """The quantized file of a random classifier."""
    return quantized(float_model(spec), spec)
