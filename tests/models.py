"""Tiny classifiers built in code and quantized by onnxruntime: files that are not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

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

from resq_deploy.data import Dataset

N_CLASSES = 4
SHAPE = (1, 6, 6)


def data(n: int = 23, *, dtype: type = np.float32, seed: int = 0) -> Dataset:
    """`n` images of noise; an odd number, so that chunks and fixed batches leave a remainder."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, *SHAPE)).astype(np.uint8)
    y = rng.integers(0, N_CLASSES, n)
    return Dataset(name="noise", x=x if dtype is np.uint8 else (x / 255).astype(dtype), y=y)


def _model(nodes: list, tensors: dict[str, np.ndarray], batch: str | int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, N_CLASSES])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def float_resnet(batch: str | int = "N") -> onnx.ModelProto:
    """Convolution, ReLU, residual addition, pooling, linear layer; 36 + 144 + 16 weights."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["s"], "add"),
        helper.make_node("Relu", ["s"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "fc", transB=1),
    ]
    tensors = {
        "w1": rng.normal(0, 0.6, (4, 1, 3, 3)),
        "b1": rng.normal(0, 0.1, 4),
        "w2": rng.normal(0, 0.3, (4, 4, 3, 3)),
        "b2": rng.normal(0, 0.1, 4),
        "w3": rng.normal(0, 1.0, (N_CLASSES, 4)),
        "b3": rng.normal(0, 0.1, N_CLASSES),
    }
    return _model(nodes, tensors, batch)


def float_mlp() -> onnx.ModelProto:
    """Two matrix products; 36 * 5 + 5 * 4 weights."""
    rng = np.random.default_rng(2)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "m1"], ["h"], "mm1"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "m2"], ["logits"], "mm2"),
    ]
    tensors = {"m1": rng.normal(0, 0.4, (36, 5)), "m2": rng.normal(0, 0.7, (5, N_CLASSES))}
    return _model(nodes, tensors, "N")


class _Reader(CalibrationDataReader):
    def __init__(self, batch: int) -> None:
        x = data(40).x
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(
            {"x": x[i : i + batch]} for i in range(0, 40, batch)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _static(model: onnx.ModelProto, *, batch: int = 10, **options: object) -> bytes:
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(source, target, _Reader(batch), **options)
        return target.read_bytes()


def _dynamic(model: onnx.ModelProto, **options: object) -> bytes:
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_dynamic(source, target, **options)
        return target.read_bytes()


def _with_constants(raw: bytes) -> bytes:
    """The same file with its 8-bit initializers as Constant nodes."""
    model = onnx.load_model_from_string(raw)
    small = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in small]
    for tensor in small:
        model.graph.initializer.remove(tensor)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + rest)
    return model.SerializeToString()


S8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
U8S8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
U8U8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
QDQ, QOP = {"quant_format": QuantFormat.QDQ}, {"quant_format": QuantFormat.QOperator}

BUILDERS: dict[str, Callable[[], bytes]] = {
    "qdq-channel": lambda: _static(float_resnet(), per_channel=True, **QDQ, **U8S8),
    "qdq-tensor": lambda: _static(float_resnet(), **QDQ, **S8),
    "qdq-uint8": lambda: _static(float_resnet(), **QDQ, **U8U8),
    "qdq-constants": lambda: _with_constants(_static(float_resnet(), **QDQ, **S8)),
    "qdq-batch-5": lambda: _static(float_resnet(5), batch=5, **QDQ, **U8S8),
    "qdq-matmul": lambda: _static(float_mlp(), **QDQ, **U8S8),
    "qoperator": lambda: _static(float_resnet(), **QOP, **U8S8),
    "qoperator-matmul": lambda: _static(float_mlp(), **QOP, **U8S8),
    "dynamic": lambda: _dynamic(float_resnet(), weight_type=QuantType.QUInt8),
    "dynamic-matmul": lambda: _dynamic(float_mlp(), weight_type=QuantType.QInt8),
}


@cache
def quantized(name: str) -> bytes:
    """The file that BUILDERS[name] makes; built once a test run."""
    return BUILDERS[name]()


def matmul_integer_to_float() -> bytes:
    """MatMulIntegerToFloat and DynamicQuantizeMatMul, as onnxruntime's fusions write them."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "qs", "qz"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["q", "m1", "qs", "s", "qz", "zero"],
            ["h"],
            domain="com.microsoft",
        ),
        helper.make_node(
            "DynamicQuantizeMatMul", ["h", "m2", "s", "zero"], ["logits"], domain="com.microsoft"
        ),
    ]
    tensors = {
        "m1": rng.integers(-127, 128, (36, 5)).astype(np.int8),
        "m2": rng.integers(-127, 128, (5, N_CLASSES)).astype(np.int8),
        "s": np.float32(0.01),
        "zero": np.int8(0),
    }
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", N_CLASSES])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _int4() -> bytes:
    """Weights in [-8, 7], packed two a byte, behind DequantizeLinear (opset 21)."""
    rng = np.random.default_rng(5)
    model = float_resnet()
    model.opset_import[0].version = 21
    weights = {t.name: t for t in model.graph.initializer if t.name.startswith("w")}
    nodes = []
    for name, proto in weights.items():
        codes = rng.integers(-8, 8, proto.dims)
        model.graph.initializer.remove(proto)
        model.graph.initializer.extend(
            [
                helper.make_tensor(f"{name}_q", TensorProto.INT4, codes.shape, codes.ravel()),
                numpy_helper.from_array(np.float32(0.1), f"{name}_scale"),
            ]
        )
        inputs = [f"{name}_q", f"{name}_scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name]))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + rest)
    return model.SerializeToString()


BUILDERS["fused-matmul"] = matmul_integer_to_float
ALL = tuple(BUILDERS)
BUILDERS["qdq-int4"] = _int4  # its float layers need not repeat over chunks
