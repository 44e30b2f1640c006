"""Tensors and operators as a TFLite flatbuffer, and back.

The schema comes from the package `tflite`, whose generated functions begin, fill and end one table
each. Written front to back from lists, so that equal lists give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
import tflite
from numpy.typing import NDArray

SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
ALIGNMENT = 16
"""Of the bytes of every constant, as the schema demands."""
TYPES: dict[str, int] = {"int8": tflite.TensorType.INT8, "int32": tflite.TensorType.INT32}
NO_BUFFER = 0
"""The first buffer is empty: tensors that are computed name it."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of the graph; the value is scale * (code - zero_point)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "int8"
    """One of TYPES."""
    scale: tuple[float, ...] = ()
    """One, or one for each index along `axis`; none for shapes and axes."""
    zero_point: int = 0
    axis: int = 0
    data: NDArray[Any] | None = None
    """Of a constant."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator; tensors by name."""

    code: str
    """Its name in the schema, such as CONV_2D."""
    version: int
    inputs: tuple[str, ...]
    output: str
    options: str
    """The schema's table of its options, such as Conv2DOptions."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of that table."""


def _table(builder: flatbuffers.Builder, name: str, **fields: Any) -> int:
    getattr(tflite, f"{name}Start")(builder)
    for key, value in fields.items():
        getattr(tflite, f"{name}Add{key}")(builder, value)
    return int(getattr(tflite, f"{name}End")(builder))


def _offsets(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _numbers(builder: flatbuffers.Builder, values: Any, dtype: Any) -> int:
    return int(builder.CreateNumpyVector(np.asarray(values, dtype)))


def _buffer(builder: flatbuffers.Builder, data: NDArray[Any] | None) -> int:
    if data is None:
        return _table(builder, "Buffer")
    raw = data.tobytes()
    builder.StartVector(1, len(raw), ALIGNMENT)
    builder.head = builder.head - len(raw)
    builder.Bytes[builder.head : builder.head + len(raw)] = raw
    return _table(builder, "Buffer", Data=int(builder.EndVector()))


def _tensor(builder: flatbuffers.Builder, tensor: Tensor, buffer: int) -> int:
    name = builder.CreateString(tensor.name)
    shape = _numbers(builder, tensor.shape, np.int32)
    fields = {"Shape": shape, "Type": TYPES[tensor.dtype], "Buffer": buffer, "Name": name}
    if tensor.scale:
        scale = _numbers(builder, tensor.scale, np.float32)
        zero = _numbers(builder, [tensor.zero_point] * len(tensor.scale), np.int64)
        fields["Quantization"] = _table(
            builder, "QuantizationParameters", Scale=scale, ZeroPoint=zero,
            QuantizedDimension=tensor.axis,
        )  # fmt: skip
    return _table(builder, "Tensor", **fields)


def write(
    tensors: Sequence[Tensor], operators: Sequence[Operator], *, inputs: str, outputs: str
) -> bytes:
    """The flatbuffer of one subgraph with one input and one output tensor."""
    builder = flatbuffers.Builder(1 << 20)
    index = {tensor.name: i for i, tensor in enumerate(tensors)}
    constants = [tensor for tensor in tensors if tensor.data is not None]
    buffer_of = {tensor.name: i for i, tensor in enumerate(constants, NO_BUFFER + 1)}
    buffers = [_buffer(builder, None), *(_buffer(builder, tensor.data) for tensor in constants)]
    made = [_tensor(builder, t, buffer_of.get(t.name, NO_BUFFER)) for t in tensors]
    codes = list(dict.fromkeys((op.code, op.version) for op in operators))
    nodes = []
    for op in operators:
        read = _numbers(builder, [index[name] for name in op.inputs], np.int32)
        written = _numbers(builder, [index[op.output]], np.int32)
        options = _table(builder, op.options, **op.fields)
        nodes.append(
            _table(
                builder, "Operator", OpcodeIndex=codes.index((op.code, op.version)), Inputs=read,
                Outputs=written, BuiltinOptions=options,
                BuiltinOptionsType=getattr(tflite.BuiltinOptions, op.options),
            )
        )  # fmt: skip
    graph = {
        "Tensors": _offsets(builder, made),
        "Inputs": _numbers(builder, [index[inputs]], np.int32),
        "Outputs": _numbers(builder, [index[outputs]], np.int32),
        "Operators": _offsets(builder, nodes),
        "Name": builder.CreateString("main"),
    }
    subgraph = _table(builder, "SubGraph", **graph)
    numbers = [(getattr(tflite.BuiltinOperator, code), version) for code, version in codes]
    opcodes = [
        # Codes above 127 do not exist in the field of old readers; ours are all below.
        _table(builder, "OperatorCode", DeprecatedBuiltinCode=number, BuiltinCode=number,
               Version=version)
        for number, version in numbers
    ]  # fmt: skip
    model = {
        "Version": SCHEMA_VERSION,
        "OperatorCodes": _offsets(builder, opcodes),
        "Subgraphs": _offsets(builder, [subgraph]),
        "Description": builder.CreateString("resq-deploy"),
        "Buffers": _offsets(builder, buffers),
    }
    builder.Finish(_table(builder, "Model", **model), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def constants(raw: bytes) -> list[Tensor]:
    """The constant tensors of a TFLite file."""
    model = tflite.Model.GetRootAs(raw, 0)
    graph = model.Subgraphs(0)
    types = {number: name for name, number in TYPES.items()}
    found = []
    for i in range(graph.TensorsLength()):
        tensor = graph.Tensors(i)
        if tensor.Buffer() == NO_BUFFER:
            continue
        quantization, dtype = tensor.Quantization(), types[tensor.Type()]
        data = np.frombuffer(model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes(), dtype)
        shape = tuple(int(n) for n in tensor.ShapeAsNumpy())
        scales = quantization.ScaleAsNumpy() if quantization else ()
        found.append(
            Tensor(
                name=tensor.Name().decode(), shape=shape, dtype=dtype, data=data.reshape(shape),
                scale=tuple(float(s) for s in scales),
                axis=quantization.QuantizedDimension() if quantization else 0,
            )
        )  # fmt: skip
    return found
