"""Integer layers of an optimized graph, as the kernels of `inject.kernels` see them.

QLinearConv with channels last, QGemm and QLinearMatMul with constant 8-bit weights are all
"sums over taps and channels, then requantize": a matrix product is a convolution with a 1x1
kernel whose positions are its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from resq_deploy import runtime
from resq_deploy.inject import kernels
from resq_deploy.inject.graph import Cut, Unit, Value, array
from resq_deploy.inject.kernels import Geometry
from resq_deploy.inject.simd import LANES

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

CHUNK = 50
"""Images at a time where accumulators are made."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One integer layer: x (N, H, W, C) bytes -> y (N, P, Q, O) bytes."""

    weight: str
    """Initializer that holds the weights."""
    codes: Array
    """Its contents."""
    transposed: bool
    """Is the initializer (in, out) instead of (out, in, ...)?"""
    geometry: Geometry
    weights: NDArray[np.int8]
    """(kernel height, kernel width, C / groups, O): the codes, of uint8 minus 128; O is filled up
    with zeros to a multiple of LANES."""
    shift: NDArray[np.int32]
    """(O,) what to add to `weights` for code minus zero point."""
    bias: NDArray[np.int32]
    scale: NDArray[np.float32]
    """(O,) input scale * weight scale / output scale."""
    x_shape: tuple[int, int, int]
    y_shape: tuple[int, int, int]

    @property
    def macs(self) -> int:
        """Multiplications for one image."""
        return int(np.prod(self.y_shape)) * int(np.prod(self.weights.shape[:3]))

    @property
    def acc_bytes(self) -> int:
        """Bytes of the accumulators of one image."""
        return int(np.prod(self.y_shape)) * 4

    def x(self, value: Array) -> Bytes:
        """The kept input (N, rows, ...) as the kernels take it."""
        return _bytes(value).reshape(len(value), *self.x_shape)

    def y(self, value: Array) -> Bytes:
        """The kept output (N, rows, ...) as the kernels take it."""
        return _bytes(value).reshape(len(value), *self.y_shape)

    def patched(self, taps: NDArray[np.int64], delta: NDArray[np.int64]) -> NDArray[np.int8]:
        """`weights` with some of them changed (`taps`, `delta`)."""
        weights = self.weights.copy()
        at = (taps[:, 2], taps[:, 3], taps[:, 1], taps[:, 0])
        weights[at] = (weights[at] + delta).astype(np.int8)
        return weights

    def taps(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """(F, 4) output channel, input channel (in its group), kernel row and column."""
        index = np.unravel_index(offsets, self.codes.shape)
        zero = np.zeros(len(offsets), np.int64)
        if len(index) == 4:
            taps = np.stack(index, 1)
        else:
            out, channel = index[::-1] if self.transposed else index
            taps = np.stack([out, channel, zero, zero], 1)
        return np.ascontiguousarray(taps, np.int64)

    def accumulators(self, x: Bytes, out: NDArray[np.int32]) -> NDArray[np.int32]:
        """Fill `out` (N, P, Q, O) with the accumulators of bytes x (N, H, W, C), and return it.

        By onnxruntime's integer matrix product; groups one channel after the other.
        """
        weights = self.weights[..., : self.y_shape[2]] + self.shift
        accumulate = self._grouped if self.geometry.groups > 1 else self._product
        accumulate(x, weights.reshape(-1, self.y_shape[2]), out)
        out += self.bias
        return out

    def _product(self, x: Bytes, weights: Array, out: NDArray[np.int32]) -> None:
        low, high = int(weights.min()), int(weights.max())
        # the codes again, whatever their zero point was: int8 when they fit, else uint8
        fits = low >= -128 and high <= 127
        zero = 0 if fits else max(0, -low)
        codes = (weights + zero).astype(np.int8 if fits else np.uint8)
        session = runtime.build(_matmul_integer(codes, zero, self.geometry.x_zero), level="off")
        for start in range(0, len(x), CHUNK):
            patches = self._patches(x[start : start + CHUNK])
            (sums,) = session.run(None, {"x": patches.reshape(-1, patches.shape[-1])})
            out[start : start + CHUNK] = sums.reshape(-1, *self.y_shape)

    def _grouped(self, x: Bytes, weights: Array, out: NDArray[np.int32]) -> None:
        g = self.geometry
        each = self.x_shape[2] // g.groups
        for start in range(0, len(x), CHUNK):
            patches = self._patches(x[start : start + CHUNK]).astype(np.int32) - g.x_zero
            patches = patches.reshape(*patches.shape[:3], -1, g.groups, each)
            part = out[start : start + CHUNK]
            part[:] = 0
            sums = part.reshape(*part.shape[:3], g.groups, -1)
            for tap in range(patches.shape[3]):
                for channel in range(each):
                    row = weights[tap * each + channel].reshape(g.groups, -1)
                    sums += patches[:, :, :, tap, :, channel, None] * row

    def _patches(self, x: Bytes) -> Bytes:
        """(N, P, Q, taps * C) what every output position sees of bytes x (N, H, W, C)."""
        g = self.geometry
        pads = [(0, 0), (g.pad_h, g.pad_h_end), (g.pad_w, g.pad_w_end), (0, 0)]
        x = np.pad(x ^ np.uint8(g.x_flip), pads, constant_values=g.x_zero)
        rows, columns = self.y_shape[:2]
        high, wide = rows * g.stride_h, columns * g.stride_w
        patches = np.empty((len(x), rows, columns, g.kernel_h, g.kernel_w, x.shape[3]), np.uint8)
        for a in range(g.kernel_h):
            for b in range(g.kernel_w):
                i, j = a * g.dilation_h, b * g.dilation_w
                patches[:, :, :, a, b] = x[:, i : i + high : g.stride_h, j : j + wide : g.stride_w]
        return patches.reshape(len(x), rows, columns, -1)

    def reproduces(self, acc: NDArray[np.int32], y: Bytes) -> bool:
        """Do the accumulators, requantized by our kernel, give the kept output?"""
        rows = acc.reshape(-1, acc.shape[-1])
        out = np.empty(rows.shape, np.uint8)
        g = self.geometry
        kernels.requantize(rows, self.scale, g.y_zero, g.y_flip, out)
        return bool((out == y.reshape(rows.shape)).all())


def _bytes(value: Array) -> Bytes:
    return np.ascontiguousarray(value).view(np.uint8)


def _matmul_integer(codes: Array, zero: int, x_zero: int) -> bytes:
    """A model that multiplies bytes (rows, C) with `codes` (C, O), zero points taken off."""
    kind = helper.np_dtype_to_tensor_dtype(codes.dtype)
    tensors = [
        helper.make_tensor("w", kind, codes.shape, codes.tobytes(), raw=True),
        helper.make_tensor("x_zero", TensorProto.UINT8, [], [x_zero]),
        helper.make_tensor("w_zero", kind, [], [zero]),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "x_zero", "w_zero"], ["y"])],
        "accumulate",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", None])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    return bytes(model.SerializeToString())


def recognize(unit: Unit, cut: Cut) -> Layer | None:
    """The integer layer that a unit is; None when it is something else."""
    if len(unit.nodes) != 1:
        return None
    (node,) = unit.nodes
    maker = {"QLinearConv": _conv, "QLinearMatMul": _matmul, "QGemm": _gemm}.get(node.op_type)
    constants = {
        name: array(cut.initializers[name]) for name in node.input if name in cut.initializers
    }
    if maker is None or unit.inputs != [node.input[0]]:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, y = cut.values[unit.inputs[0]], cut.values[unit.outputs[0]]
    if x.dtype.itemsize != 1 or y.dtype.itemsize != 1:
        return None
    return maker(node, constants, attributes, x, y)


def _scale(x: Array, w: Array, y: Array, n_out: int) -> NDArray[np.float32]:
    """In float32 and in this order, as onnxruntime multiplies them."""
    scale = np.float32(x.reshape(())) * w.reshape(-1).astype(np.float32) / np.float32(y.reshape(()))
    return np.ascontiguousarray(np.broadcast_to(scale, (n_out,)), np.float32)


def _zeros(zero: Array, value: Value) -> tuple[int, int]:
    """What to xor into a byte, and the zero point of the result, which is in [0, 255]."""
    flip = 128 if value.dtype == np.int8 else 0
    return flip, int(zero.reshape(-1)[0]) + flip if zero.size else flip


def _layer(
    *, weight: str, codes: Array, transposed: bool, weights: Array, zero: Array, bias: Array | None,
    scales: tuple[Array, Array, Array], zeros: tuple[Array, Array], x: Value, y: Value,
    x_shape: tuple[int, ...], y_shape: tuple[int, ...], shape: Mapping[str, int],
) -> Layer | None:  # fmt: skip
    """`weights` are the codes as (kernel height, kernel width, C / groups, O)."""
    n_out = weights.shape[3]
    middle = 128 if codes.dtype == np.uint8 else 0
    weights = (weights.astype(np.int16) - middle).astype(np.int8)
    shift = np.broadcast_to(middle - zero.astype(np.int32).reshape(-1), (n_out,))
    if int((weights + shift).max()) - int((weights + shift).min()) > 255:
        return None  # zero points differ so much that no 8-bit type holds all weights
    x_flip, x_zero = _zeros(zeros[0], x)
    y_flip, y_zero = _zeros(zeros[1], y)
    return Layer(
        weight=weight,
        codes=codes,
        transposed=transposed,
        geometry=Geometry(**shape, x_flip=x_flip, x_zero=x_zero, y_flip=y_flip, y_zero=y_zero),
        weights=np.pad(np.ascontiguousarray(weights), [(0, 0)] * 3 + [(0, -n_out % LANES)]),
        shift=np.ascontiguousarray(shift),
        bias=np.zeros(n_out, np.int32) if bias is None else bias.astype(np.int32).reshape(-1),
        scale=_scale(*scales, n_out),
        x_shape=x_shape,  # type: ignore[arg-type]
        y_shape=y_shape,  # type: ignore[arg-type]
    )


def _conv(
    node: onnx.NodeProto, c: Mapping[str, Array], a: Mapping[str, Any], x: Value, y: Value
) -> Layer | None:
    names = [*node.input, ""][:9]
    if len(x.tail) != 3 or x.rows != 1 or a.get("channels_last", 0) != 1:
        return None
    if any(name not in c for name in names[1:8]) or a.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    codes = c[names[3]]
    if codes.ndim != 4:
        return None
    strides, pads = a.get("strides", [1, 1]), a.get("pads", [0, 0, 0, 0])
    dilations = a.get("dilations", [1, 1])
    shape = {
        "kernel_h": codes.shape[2], "kernel_w": codes.shape[3],
        "stride_h": strides[0], "stride_w": strides[1],
        "pad_h": pads[0], "pad_w": pads[1], "pad_h_end": pads[2], "pad_w_end": pads[3],
        "dilation_h": dilations[0], "dilation_w": dilations[1], "groups": a.get("group", 1),
    }  # fmt: skip
    return _layer(
        weight=names[3], codes=codes, transposed=False, weights=codes.transpose(2, 3, 1, 0),
        zero=c[names[5]],
        bias=c.get(names[8]) if names[8] else None,
        scales=(c[names[1]], c[names[4]], c[names[6]]), zeros=(c[names[2]], c[names[7]]),
        x=x, y=y, x_shape=x.tail, y_shape=y.tail, shape=shape,
    )  # fmt: skip


_PRODUCT = {
    "kernel_h": 1, "kernel_w": 1, "stride_h": 1, "stride_w": 1, "pad_h": 0, "pad_w": 0,
    "pad_h_end": 0, "pad_w_end": 0, "dilation_h": 1, "dilation_w": 1, "groups": 1,
}  # fmt: skip


def _product(
    c: Mapping[str, Array], names: list[str], x: Value, y: Value, *, transposed: bool,
    bias: Array | None, output: tuple[str, str],
) -> Layer | None:  # fmt: skip
    """A matrix product of rows (..., C) with weights (C, O), or (O, C) if not `transposed`."""
    codes = c[names[3]]
    if codes.ndim != 2:
        return None
    weights = codes if transposed else codes.T
    rows = x.rows * int(np.prod(x.tail[:-1], dtype=np.int64))
    return _layer(
        weight=names[3], codes=codes, transposed=transposed, weights=weights[None, None],
        zero=c[names[5]],
        bias=bias, scales=(c[names[1]], c[names[4]], c[output[0]]),
        zeros=(c[names[2]], c[output[1]]), x=x, y=y,
        x_shape=(rows, 1, weights.shape[0]), y_shape=(rows, 1, weights.shape[1]), shape=_PRODUCT,
    )  # fmt: skip


def _matmul(
    node: onnx.NodeProto, c: Mapping[str, Array], a: Mapping[str, Any], x: Value, y: Value
) -> Layer | None:
    names = list(node.input)
    if any(name not in c for name in names[1:8]):
        return None
    return _product(c, names, x, y, transposed=True, bias=None, output=(names[6], names[7]))


def _gemm(
    node: onnx.NodeProto, c: Mapping[str, Array], a: Mapping[str, Any], x: Value, y: Value
) -> Layer | None:
    names = [*node.input]
    if len(names) < 9 or any(name and name not in c for name in names[1:]) or not names[8]:
        return None
    if a.get("alpha", 1.0) != 1.0 or a.get("transA", 0):
        return None
    return _product(
        c, names, x, y, transposed=not a.get("transB", 0),
        bias=c[names[6]] if names[6] else None, output=(names[7], names[8]),
    )  # fmt: skip
