"""The fault space of an ONNX file: the stored bits of its 8-bit weights, numbered from 0.

A weight is an int8 or uint8 initializer that a known operator reads as data. Zero points,
scales and int32 biases are not in the space. What is neither known data nor a known zero
point is refused by name: a campaign never skips weights silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from resq_deploy import bits, runtime
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.records import Site

Flat = NDArray[np.int64]
Accepts = Callable[[int], bool]

WIDTHS = {TensorProto.INT8: "int8", TensorProto.UINT8: "uint8"}

# Integer types that may hold weights but are not handled (yet). int32 is missing on purpose:
# it holds biases, which are listed by `excluded` and left alone.
UNHANDLED = {
    TensorProto.DataType.Value(name)
    for name in ("INT4", "UINT4", "INT2", "UINT2", "INT16", "UINT16", "FLOAT4E2M1")
    + ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0")
}


def _at(*positions: int) -> Accepts:
    return lambda i: i in positions


# Inputs that operators read as quantized data. ONNX and com.microsoft names do not clash.
DATA: dict[str, Accepts] = {
    "DequantizeLinear": _at(0),
    "QLinearConv": _at(0, 3),
    "QLinearMatMul": _at(0, 3),
    "QGemm": _at(0, 3),
    "QLinearAdd": _at(0, 3),
    "QLinearMul": _at(0, 3),
    "QLinearConcat": lambda i: i % 3 == 2,
    "MatMulInteger": _at(0, 1),
    "ConvInteger": _at(0, 1),
    "DynamicQuantizeMatMul": _at(1),
    "MatMulIntegerToFloat": _at(0, 1),
}

# Inputs that hold zero points, limits and fill values: not weights.
PARAMETERS: dict[str, Accepts] = {
    "QuantizeLinear": _at(2),
    "DequantizeLinear": _at(2),
    "QLinearConv": _at(2, 5, 7),
    "QLinearMatMul": _at(2, 5, 7),
    "QGemm": _at(2, 5, 8),
    "QLinearAdd": _at(2, 5, 7),
    "QLinearMul": _at(2, 5, 7),
    "QLinearConcat": lambda i: i == 1 or (i > 2 and i % 3 == 1),
    "QLinearAveragePool": _at(2, 4),
    "QLinearGlobalAveragePool": _at(2, 4),
    "QLinearReduceMean": _at(2, 4),
    "QLinearLeakyRelu": _at(2, 4),
    "QLinearSigmoid": _at(2, 4),
    "QLinearSoftmax": _at(2, 4),
    "MatMulInteger": _at(2, 3),
    "ConvInteger": _at(2, 3),
    "DynamicQuantizeMatMul": _at(3),
    "MatMulIntegerToFloat": _at(4, 5),
    "Pad": _at(2),
    "Clip": _at(1, 2),
    "Max": _at(1),
    "Min": _at(1),
}

# Operators that hand a weight on (input 0) on its way to the operator that computes with it.
PASS_THROUGH = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Clip"} | {
    "Gather"
}
# Operators whose float weights we report as outside of the space.
FLOAT_WEIGHTS: dict[str, Accepts] = {
    "Conv": _at(1),
    "ConvTranspose": _at(1),
    "Gemm": _at(1),
    "MatMul": _at(0, 1),
    "FusedConv": _at(1),
    "FusedMatMul": _at(0, 1),
    "QuantizeLinear": _at(0),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One initializer of the fault space."""

    name: str
    dtype: str
    """`int8` or `uint8`."""
    shape: tuple[int, ...]
    op_type: str
    """Operator that computes with it; behind DequantizeLinear and changes of layout."""
    node: str
    """Name of that node, or of its first output where it has none."""
    absorbed: bool
    """A Clip stands between the initializer and that operator, and may undo a flip."""

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def width(self) -> int:
        """Stored bits of an element."""
        return bits.width(self.dtype)

    @property
    def n_bits(self) -> int:
        return self.size * self.width

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived `n_bits`."""
        return {**vars(self), "shape": list(self.shape), "n_bits": self.n_bits}


@dataclass(frozen=True, kw_only=True)
class Space:
    """Tensors in the order of the network; the bits of all of them numbered through.

    Flat bit index = bits of the tensors before + offset * width + bit.
    """

    tensors: tuple[Tensor, ...]

    @cached_property
    def starts(self) -> Flat:
        """First flat bit index of every tensor, and the number of bits at the end."""
        sizes = [tensor.n_bits for tensor in self.tensors]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @property
    def n_bits(self) -> int:
        return int(self.starts[-1])

    def split(self, flat: Flat) -> dict[int, tuple[Flat, Flat]]:
        """Element offsets and bits of flat bit indices, by index of the tensor they hit."""
        flat = np.asarray(flat, np.int64)
        if flat.size and (flat.min() < 0 or flat.max() >= self.n_bits):
            raise InputError(f"bit outside of [0, {self.n_bits}) given")
        owner = np.searchsorted(self.starts, flat, side="right") - 1
        parts = {}
        for index in np.unique(owner).tolist():
            inside = flat[owner == index] - self.starts[index]
            offset, bit = np.divmod(inside, self.tensors[index].width)
            parts[index] = (offset, bit)
        return parts

    def sites(self, flat: Flat) -> list[Site]:
        """The sites of flat bit indices, in ascending order."""
        return [
            Site(tensor=self.tensors[index].name, offset=offset, bit=bit)
            for index, (offsets, bits_) in self.split(np.sort(flat)).items()
            for offset, bit in zip(offsets.tolist(), bits_.tolist(), strict=True)
        ]

    def flat(self, site: Site) -> int:
        """Flat bit index of a site; InputError when this file has no such bit."""
        for start, tensor in zip(self.starts.tolist(), self.tensors, strict=False):
            if tensor.name == site.tensor:
                if site.offset >= tensor.size or site.bit >= tensor.width:
                    raise InputError(
                        f"{tensor.name} has the offsets 0 to {tensor.size - 1} and the bits 0 to "
                        f"{tensor.width - 1}, got offset {site.offset}, bit {site.bit}"
                    )
                return int(start) + site.offset * tensor.width + site.bit
        names = ", ".join(tensor.name for tensor in self.tensors)
        raise InputError(f"no weight {site.tensor!r} in the file; it has {names}")

    def to_json(self) -> list[dict[str, Any]]:
        return [tensor.to_json() for tensor in self.tensors]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> Space:
        """The space that `to_json` wrote."""
        kept = [{k: v for k, v in row.items() if k != "n_bits"} for row in rows]
        return cls(tensors=tuple(Tensor(**{**k, "shape": tuple(k["shape"])}) for k in kept))


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """A model made ready for faults, and what is in it."""

    model: onnx.ModelProto
    """The file's graph with weights in Constant nodes turned into initializers."""
    space: Space
    excluded: list[dict[str, Any]]
    """int32 initializers that are dequantized (biases): name, dtype, shape."""
    warnings: list[str]


@dataclass(kw_only=True)
class _Use:
    """How the graph uses one initializer."""

    data: bool = False
    absorbed: bool = False
    order: int = 2**62
    op_type: str = ""
    node: str = ""
    unknown: list[str] = field(default_factory=list)
    read: bool = False


def _label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


class _Graph:
    """Who reads which value in the top-level graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.readers: dict[str, list[tuple[int, onnx.NodeProto, int]]] = {}
        for order, node in enumerate(graph.node):
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((order, node, i))

    def use(self, name: str) -> _Use:
        """Follow an initializer to the operators that compute with it."""
        use = _Use()
        self._follow(name, use, clipped=False)
        return use

    def _follow(self, value: str, use: _Use, *, clipped: bool) -> None:
        for order, node, i in self.readers.get(value, []):
            use.read = True
            if node.op_type in PASS_THROUGH and i == 0:
                self._follow(node.output[0], use, clipped=clipped or node.op_type == "Clip")
            elif DATA.get(node.op_type, _at())(i):
                use.data = True
                use.absorbed |= clipped
                if node.op_type == "DequantizeLinear":
                    self._consumer(node.output[0], (order, node), use)
                else:
                    self._take(order, node, use)
            elif not PARAMETERS.get(node.op_type, _at())(i):
                use.unknown.append(f"input {i} of {node.op_type} {_label(node)}")

    def _consumer(self, value: str, default: tuple[int, onnx.NodeProto], use: _Use) -> None:
        """The first operator behind a DequantizeLinear that does more than change the layout."""
        readers = self.readers.get(value, [])
        if not readers:
            self._take(*default, use)
        for order, node, i in readers:
            if node.op_type in PASS_THROUGH and i == 0:
                use.absorbed |= node.op_type == "Clip"
                self._consumer(node.output[0], (order, node), use)
            else:
                self._take(order, node, use)

    def _take(self, order: int, node: onnx.NodeProto, use: _Use) -> None:
        if order < use.order:
            use.order, use.op_type, use.node = order, node.op_type, _label(node)


def _promote_constants(model: onnx.ModelProto) -> None:
    """Turn Constant nodes that hold tensors of small integers into initializers."""
    graph = model.graph
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if (
            node.op_type == "Constant"
            and value is not None
            and (value.data_type in WIDTHS or value.data_type in UNHANDLED)
        ):
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _inner_graphs(nodes: Any) -> Iterator[tuple[str, onnx.GraphProto]]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in chain([attribute.g] if attribute.HasField("g") else [], attribute.graphs):
                yield f"{node.op_type} {_label(node)}", graph
                yield from _inner_graphs(graph.node)


def _refuse_hidden(model: onnx.ModelProto) -> None:
    """UnsupportedModel for small-integer tensors where we do not follow them."""
    small = set(WIDTHS) | UNHANDLED
    outer = {t.name for t in model.graph.initializer if t.data_type in small}
    for where, graph in _inner_graphs(model.graph.node):
        tensors = [t for t in graph.initializer if t.data_type in small] + [
            a.t
            for n in graph.node
            for a in n.attribute
            if a.HasField("t") and a.t.data_type in small
        ]
        shared = outer & {name for node in graph.node for name in node.input}
        for name in [t.name for t in tensors] + sorted(shared):
            raise UnsupportedModel(
                f"quantized tensor {name!r} is used in the subgraph of {where}; weights in "
                "subgraphs (If, Loop, Scan) are not handled: unroll the model first"
            )
    for function in model.functions:
        for node in function.node:
            if any(a.HasField("t") and a.t.data_type in small for a in node.attribute):
                raise UnsupportedModel(
                    f"quantized constant in the model function {function.name!r} is not handled; "
                    "inline the functions first (onnx.inliner.inline_local_functions)"
                )
    for sparse in model.graph.sparse_initializer:
        raise UnsupportedModel(
            f"sparse initializer {sparse.values.name!r} is not handled; store it densely"
        )


def _float_weights(model: onnx.ModelProto) -> list[str]:
    floats = {
        t.name for t in model.graph.initializer if t.data_type in (1, 10, 11, 16)
    }  # float, float16, double, bfloat16
    floats |= {
        node.output[0]
        for node in model.graph.node
        for a in node.attribute
        if node.op_type == "Constant" and a.HasField("t") and a.t.data_type in (1, 10, 11, 16)
    }
    found = [
        name
        for node in model.graph.node
        for i, name in enumerate(node.input)
        if name in floats and FLOAT_WEIGHTS.get(node.op_type, _at())(i)
    ]
    return list(dict.fromkeys(found))


def _warnings(model: onnx.ModelProto, tensors: list[Tensor], unread: list[str]) -> list[str]:
    found = []
    clipped = [tensor.name for tensor in tensors if tensor.absorbed]
    if clipped:
        found.append(
            f"a Clip stands behind {len(clipped)} weights (first: {clipped[0]}): it may absorb "
            "flips, so the file looks safer than its memory is"
        )
    inputs = {value.name for value in model.graph.input} & {tensor.name for tensor in tensors}
    if inputs:
        found.append(
            f"{len(inputs)} weights are graph inputs (first: {min(inputs)}): onnxruntime then "
            "takes other kernels than for constants; export without them"
        )
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
        found.append(
            "DynamicQuantizeLinear takes its scale from all images that run together "
            f"({runtime.CHUNK} at a time): a fault can change an image through its neighbours"
        )
    floats = _float_weights(model)
    if floats:
        found.append(f"{len(floats)} float weights (first: {floats[0]}) are not in the fault space")
    if unread:
        found.append(
            f"{len(unread)} 8-bit initializers (first: {unread[0]}) are read by no operator and "
            "are not in the fault space"
        )
    return found


def discover(model: onnx.ModelProto) -> Discovery:
    """The fault space of a model, in the order in which the network computes with its weights.

    The model itself is changed: Constant nodes become initializers, and the data of weights
    moves to `raw_data`. UnsupportedModel, naming the tensor, for float models and for weights
    of types or in places that are not handled.
    """
    _refuse_hidden(model)
    _promote_constants(model)
    graph = _Graph(model.graph)
    found: list[tuple[int, Tensor]] = []
    excluded, unread = [], []
    for proto in model.graph.initializer:
        if proto.data_type not in WIDTHS and proto.data_type not in UNHANDLED:
            if proto.data_type == TensorProto.INT32 and graph.use(proto.name).data:
                shape = list(proto.dims)
                excluded.append({"name": proto.name, "dtype": "int32", "shape": shape})
            continue
        use = graph.use(proto.name)
        if use.unknown:
            raise UnsupportedModel(
                f"initializer {proto.name!r} goes to {use.unknown[0]}, where we do not know "
                "whether it is a weight; it is not skipped silently, so the model is refused"
            )
        if not use.read:
            unread.append(proto.name)
        if not use.data:
            continue
        if proto.data_type in UNHANDLED:
            name = TensorProto.DataType.Name(proto.data_type).lower()
            raise UnsupportedModel(
                f"weight {proto.name!r} of {use.op_type} {use.node} has the type {name}; only "
                "int8 and uint8 weights are handled"
            )
        codes = np.ascontiguousarray(numpy_helper.to_array(proto))
        proto.ClearField("int32_data")
        proto.raw_data = codes.tobytes()
        tensor = Tensor(
            name=proto.name,
            dtype=WIDTHS[proto.data_type],
            shape=tuple(proto.dims),
            op_type=use.op_type,
            node=use.node,
            absorbed=use.absorbed,
        )
        found.append((use.order, tensor))
    tensors = [tensor for _, tensor in sorted(found, key=lambda pair: pair[0])]
    if not tensors:
        floats = _float_weights(model)
        raise UnsupportedModel(
            f"the model has no int8 or uint8 weights ({len(floats)} float weights"
            + (f", first: {floats[0]}" if floats else "")
            + "); faults go into quantized weights: quantize it first"
        )
    return Discovery(
        model=model,
        space=Space(tensors=tuple(tensors)),
        excluded=excluded,
        warnings=_warnings(model, tensors, unread),
    )


def inspect(raw: bytes, name: str = "the model") -> dict[str, Any]:
    """What `resq-deploy inspect` shows of the bytes of an ONNX file.

    Keys: tensors (list of Tensor.to_json), n_tensors, n_bytes, n_bits, excluded, warnings,
    kernels (node types that onnxruntime runs, with their numbers).
    """
    found = discover(runtime.parse_model(raw, name))
    return {
        "n_tensors": len(found.space.tensors),
        "n_bytes": sum(tensor.n_bits for tensor in found.space.tensors) // 8,
        "n_bits": found.space.n_bits,
        "tensors": found.space.to_json(),
        "excluded": found.excluded,
        "kernels": runtime.kernels(raw),
        "warnings": found.warnings,
    }
