"""A second reading of the TFLite schema: runs an int8 file in numpy, as the specification says.

Integer sums, then one multiplication in float64 and rounding half to even: what every runtime
approximates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tflite as schema
from numpy.typing import NDArray

OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}


def _options(op: schema.Operator, kind: type) -> Any:
    table, found = op.BuiltinOptions(), kind()
    found.Init(table.Bytes, table.Pos)
    return found


def _windows(x: Any, kernel: Any, options: Any, dilation: Any = (1, 1)) -> Any:
    """(N, H', W', C, kh, kw) windows of NHWC; SAME pads what is missing with 0, more behind."""
    strides = (options.StrideH(), options.StrideW())
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if options.Padding() == schema.Padding.SAME:
        pads = []
        for n, span, stride in zip(x.shape[1:3], spans, strides, strict=True):
            total = max((-(-n // stride) - 1) * stride + span - n, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
    found = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(1, 2))
    return found[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]


class Interpreter:
    """One subgraph; `run` takes and returns int8 codes for any number of images."""

    def __init__(self, raw: bytes) -> None:
        assert schema.Model.ModelBufferHasIdentifier(raw, 0)
        self.model = schema.Model.GetRootAs(raw, 0)
        assert self.model.Version() == 3 and self.model.Buffers(0).DataLength() == 0
        self.graph = self.model.Subgraphs(0)

    def quantization(self, index: int) -> tuple[NDArray[np.float64], int, int]:
        """Scales, the one zero point, the axis of the scales."""
        q = self.graph.Tensors(index).Quantization()
        zero = set(q.ZeroPointAsNumpy().tolist())
        assert len(zero) == 1 and q.ScaleLength() == q.ZeroPointLength()
        return q.ScaleAsNumpy().astype(np.float64), zero.pop(), q.QuantizedDimension()

    def constant(self, index: int) -> NDArray[Any] | None:
        tensor = self.graph.Tensors(index)
        buffer = self.model.Buffers(tensor.Buffer())
        if not buffer.DataLength():
            return None
        assert buffer._tab.Vector(buffer._tab.Offset(4)) % 16 == 0  # force_align of the schema
        types = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}
        data = np.frombuffer(buffer.DataAsNumpy().tobytes(), types[tensor.Type()])
        return data.reshape(tensor.ShapeAsNumpy())

    def run(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        values: dict[int, Any] = {self.graph.Inputs(0): codes}
        for i in range(self.graph.TensorsLength()):
            constant = self.constant(i)
            if constant is not None:
                values[i] = constant
        for i in range(self.graph.OperatorsLength()):
            op = self.graph.Operators(i)
            code = OPERATORS[self.model.OperatorCodes(op.OpcodeIndex()).BuiltinCode()]
            out = op.Outputs(0)
            found = getattr(self, code.lower())(op, op.InputsAsNumpy(), values, out)
            assert found.shape[1:] == tuple(self.graph.Tensors(out).ShapeAsNumpy()[1:]), code
            values[out] = found.astype(np.int8)
        return np.asarray(values[self.graph.Outputs(0)])

    def real(self, index: int, values: Any) -> NDArray[np.float64]:
        scale, zero, _ = self.quantization(index)
        return (values[index].astype(np.float64) - zero) * scale

    def rounded(self, out: int, real: Any, activation: int) -> Any:
        scale, zero, _ = self.quantization(out)
        low = zero if activation == schema.ActivationFunctionType.RELU else -128
        return np.clip(np.rint(real / scale) + zero, low, 127)

    def _weighted(self, inputs: Any, out: int, sums: Any, options: Any) -> Any:
        (sx,), _, _ = self.quantization(inputs[0])
        sw, zw, axis = self.quantization(inputs[1])
        sb, zb, _ = self.quantization(inputs[2])
        shape = self.graph.Tensors(int(inputs[1])).ShapeAsNumpy()
        assert zw == zb == 0 and len(sw) in (1, shape[axis])
        np.testing.assert_allclose(sb, sx * sw, rtol=1e-6)
        return self.rounded(out, sums * (sx * sw), options.FusedActivationFunction())

    def conv_2d(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        options, w = _options(op, schema.Conv2DOptions), values[inputs[1]].astype(np.float64)
        x = values[inputs[0]].astype(np.float64) - self.quantization(inputs[0])[1]
        dilation = (options.DilationHFactor(), options.DilationWFactor())
        # integers in float64 are exact, and its matrix product is the fast one
        windows = _windows(x, w.shape[1:3], options, dilation)
        filters = w.transpose(0, 3, 1, 2).reshape(len(w), -1)
        sums = windows.reshape(*windows.shape[:3], -1) @ filters.T
        return self._weighted(inputs, out, sums + values[inputs[2]], options)

    def depthwise_conv_2d(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        options, w = _options(op, schema.DepthwiseConv2DOptions), values[inputs[1]].astype(np.int64)
        x = values[inputs[0]].astype(np.int64) - self.quantization(inputs[0])[1]
        filters = w[0].reshape(*w.shape[1:3], x.shape[3], options.DepthMultiplier())
        windows = _windows(x, w.shape[1:3], options)
        sums = (windows[..., None] * filters.transpose(2, 0, 1, 3)).sum(axis=(4, 5))
        sums = sums.reshape(*sums.shape[:3], -1) + values[inputs[2]]
        return self._weighted(inputs, out, sums, options)

    def fully_connected(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        options = _options(op, schema.FullyConnectedOptions)
        x = values[inputs[0]].astype(np.int64) - self.quantization(inputs[0])[1]
        sums = x @ values[inputs[1]].astype(np.int64).T + values[inputs[2]]
        return self._weighted(inputs, out, sums, options)

    def add(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        activation = _options(op, schema.AddOptions).FusedActivationFunction()
        return self.rounded(
            out, self.real(inputs[0], values) + self.real(inputs[1], values), activation
        )

    def mean(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        keep, axes = _options(op, schema.ReducerOptions).KeepDims(), tuple(values[inputs[1]])
        return self.rounded(out, self.real(inputs[0], values).mean(axes, keepdims=keep), 0)

    def max_pool_2d(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        assert self.quantization(inputs[0]) == self.quantization(out)
        options = _options(op, schema.Pool2DOptions)
        assert options.Padding() == schema.Padding.VALID
        kernel = (options.FilterHeight(), options.FilterWidth())
        return _windows(values[inputs[0]], kernel, options).max(axis=(4, 5))

    def pad(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        zero = self.quantization(inputs[0])[1]
        return np.pad(values[inputs[0]], values[inputs[1]], constant_values=zero)

    def padv2(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        return np.pad(values[inputs[0]], values[inputs[1]], constant_values=values[inputs[2]][0])

    def reshape(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        target = values[inputs[1]].tolist()
        assert target[0] == -1
        return values[inputs[0]].reshape(target)

    def transpose(self, op: Any, inputs: Any, values: Any, out: int) -> Any:
        return values[inputs[0]].transpose(values[inputs[1]])
