"""The memory map: where every stored tensor of an exported file lies in `weights.bin`.

One array of bytes holds all of them, one after the other. Bit `b` of element `i` of a tensor is bit
`p % 8` of the byte `address + p // 8` with `p = i * bits + b`: numbers are little endian, and the
first of two 4-bit codes stands in the low half of their byte, as in the ONNX file.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from resq_deploy import artifacts, bits
from resq_deploy.errors import ExportError, InputError
from resq_deploy.records import Site

FORMAT = "resq-deploy memory map 1"
ALIGNMENT = 16
"""Bytes: every tensor begins at a multiple, for vector loads and DMA; zeros fill the gaps."""

TYPES: dict[int, tuple[str, str]] = {
    TensorProto.INT8: ("int8", "weight"),
    TensorProto.UINT8: ("uint8", "weight"),
    TensorProto.INT4: ("int4", "weight"),
    TensorProto.UINT4: ("uint4", "weight"),
    TensorProto.INT32: ("int32", "bias"),
}
"""Types of stored tensors, as numpy (or ONNX, for the packed ones) calls them, and their target."""

READ = ".read"
"""Behind a decoder, what is read of an encoded weight NAME is called NAME.read."""

LAYOUTS = {"Conv": "OIHW", "Gemm": "OI", "MatMul": "IO"}
"""Axes of a weight (output, input, height, width), by the operator that computes with it."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in `weights.bin`."""

    name: str
    """Of the initializer."""
    target: str
    """`weight` or `bias`."""
    dtype: str
    """`int8`, `uint8`, `int4`, `uint4` or `int32`."""
    address: int
    """First byte, counted from the beginning of `weights.bin`."""
    bytes: int
    """Bytes of the elements, without the fill behind them."""
    elements: int
    bits: int
    """Stored bits of an element."""
    packing: str
    """`one element per byte`, `two elements per byte, low half first`, `little endian`."""
    shape: tuple[int, ...]
    """Elements are in C order."""
    layout: str
    """Meaning of the axes, a letter each: output, input, height, width."""
    scale: tuple[float, ...]
    """value = (code - zero point) * scale; one, or one per channel of `axis`."""
    zero_point: tuple[int, ...]
    axis: int | None
    """Axis of the channels; None where one scale holds for all."""
    sha256: str
    """Of the bytes."""
    crc32: int
    """Of the bytes (IEEE 802.3, as zlib computes it)."""

    def place(self, offset: int, bit: int) -> tuple[int, int]:
        """Byte address in `weights.bin` and bit in that byte (0 = least significant) of a bit."""
        position = offset * self.bits + bit
        return self.address + position // 8, position % 8


@dataclass(frozen=True, kw_only=True)
class MemoryMap:
    """All stored tensors of a file, in the order of its graph."""

    model: str
    """Name of the ONNX file."""
    model_sha256: str
    encoding: str
    """How the codes of weights are stored (resq_deploy.encoding); `plain`: as they are."""
    bytes: int
    """Length of `weights.bin`."""
    sha256: str
    """Of `weights.bin`."""
    crc32: int
    tensors: tuple[Stored, ...]
    alignment: int = ALIGNMENT
    """Of every tensor, in bytes."""

    def place(self, site: Site) -> tuple[int, int] | None:
        """Byte address and bit of a site; None for what `weights.bin` does not hold."""
        found = next((t for t in self.tensors if t.name == site.tensor), None)
        return None if found is None else found.place(site.offset, site.bit)

    @property
    def targets(self) -> tuple[str, ...]:
        """What the map holds of a fault space's targets."""
        return tuple(dict.fromkeys(tensor.target for tensor in self.tensors))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        facts = {"byte_order": "little", "bit_order": "bit 0 is the least significant of a byte"}
        return {"format": FORMAT, **facts, **asdict(self)}


def _readers(graph: onnx.GraphProto) -> dict[str, tuple[onnx.NodeProto, int]]:
    """The first node that reads a value, and at which input."""
    found: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            found.setdefault(name, (node, i))
    return found


def _layout(consumer: onnx.NodeProto, target: str) -> str:
    if target == "bias":
        return "O"
    if consumer.op_type == "Gemm" and not any(
        a.name == "transB" and a.i for a in consumer.attribute
    ):
        return "IO"
    if consumer.op_type not in LAYOUTS:
        raise ExportError(f"the memory map knows no weights of {consumer.op_type} {consumer.name}")
    return LAYOUTS[consumer.op_type]


def raw_bytes(proto: onnx.TensorProto, dtype: str) -> bytes:
    """The stored bytes of an initializer: little endian, 4-bit codes packed in pairs."""
    values = numpy_helper.to_array(proto)
    if dtype in bits.PACKED:
        return bits.pack(values.astype(np.int8).reshape(-1)).tobytes()
    return values.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def _packing(dtype: str) -> str:
    if dtype in bits.PACKED:
        return "two elements per byte, low half first"
    return "one element per byte" if bits.width(dtype) == 8 else "little endian"


def of(
    model: onnx.ModelProto, *, name: str, sha256: str, encoding: str = "plain"
) -> tuple[MemoryMap, bytes]:
    """The map of a QDQ model in the file `name` of digest `sha256`, and its `weights.bin`.

    Stored tensors are the integer initializers that a DequantizeLinear reads as data, directly or
    behind the decoder of `encoding`. ExportError for a weight of an operator whose layout is not
    known.
    """
    initializers = {t.name: t for t in model.graph.initializer}
    arrays: Mapping[str, NDArray[Any]] = {
        name: numpy_helper.to_array(t) for name, t in initializers.items()
    }
    readers = _readers(model.graph)
    image, tensors = bytearray(), []
    for node in model.graph.node:
        proto = initializers.get(node.input[0].removesuffix(READ))
        if proto is None or node.op_type != "DequantizeLinear":
            continue
        dtype, target = TYPES[proto.data_type]
        content = raw_bytes(proto, dtype)
        scale = arrays[node.input[1]]
        zero = arrays[node.input[2]] if len(node.input) > 2 else np.zeros_like(scale, np.int32)
        axis = (
            next((a.i for a in node.attribute if a.name == "axis"), 1) if scale.size > 1 else None
        )
        tensors.append(
            Stored(
                name=proto.name,
                target=target,
                dtype=dtype,
                address=len(image),
                bytes=len(content),
                elements=int(np.prod(proto.dims, dtype=np.int64)),
                bits=bits.width(dtype),
                packing=_packing(dtype),
                shape=tuple(proto.dims),
                layout=_layout(readers[node.output[0]][0], target),
                scale=tuple(scale.reshape(-1).tolist()),
                zero_point=tuple(int(z) for z in zero.reshape(-1)),
                axis=axis,
                sha256=hashlib.sha256(content).hexdigest(),
                crc32=zlib.crc32(content),
            )
        )
        image += content + bytes(-len(content) % ALIGNMENT)
    whole = MemoryMap(
        model=name,
        model_sha256=sha256,
        encoding=encoding,
        bytes=len(image),
        sha256=hashlib.sha256(image).hexdigest(),
        crc32=zlib.crc32(image),
        tensors=tuple(tensors),
    )
    return whole, bytes(image)


def _plain(kind: type[Any], row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in a JSON object, lists as tuples."""
    values = {field.name: row[field.name] for field in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def read(path: Path, *, model_sha256: str) -> MemoryMap:
    """The map in a JSON file; InputError unless it is one, and one of the file of that digest."""
    raw = artifacts.read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a memory map of the format {FORMAT!r}; `resq-deploy export` writes one "
            "as memory_map.json"
        )
    try:
        tensors = tuple(Stored(**_plain(Stored, row)) for row in raw["tensors"])
        found = MemoryMap(**{**_plain(MemoryMap, raw), "tensors": tensors})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is a damaged memory map ({error}); export it again") from None
    if found.model_sha256 != model_sha256:
        raise InputError(
            f"{path} is the map of {found.model} with the SHA-256 {found.model_sha256[:12]}..., "
            f"the model given has {model_sha256[:12]}...; give the map that was exported with it"
        )
    return found
