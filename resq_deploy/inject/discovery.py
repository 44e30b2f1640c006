"""What of an ONNX file stands in the fault space.

A weight is an int8, uint8, int4 or uint4 initializer that a known operator reads as data. Other
targets stand in the space when they are asked for by name: int32 biases, float scales, zero
points. What is neither known data nor a known zero point is refused by name: a campaign never
skips weights silently. The 8-bit values between the kernels (`inject.activations`) may stand
behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import bits, runtime
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.inject import activations, decoders
from resq_deploy.inject.decoders import NONE, Decoders
from resq_deploy.inject.space import ACTIVATION, TARGETS, Space, Tensor

Accepts = Callable[[int], bool]

SMALL: dict[int, str] = {
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
}
INT32: dict[int, str] = {TensorProto.INT32: "int32"}
FLOATS: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}

TYPES: dict[str, dict[int, str]] = {
    "weight": SMALL,
    "bias": INT32,
    "scale": FLOATS,
    "zero-point": SMALL | INT32,
    "float": FLOATS,
    ACTIVATION: {TensorProto.INT8: "int8", TensorProto.UINT8: "uint8"},
}
"""Types that each target may be stored in, as numpy (or ONNX, for the packed ones) calls them."""

# Integer types that may hold weights but are not handled (yet).
UNHANDLED = {
    TensorProto.DataType.Value(name)
    for name in ("INT2", "UINT2", "INT16", "UINT16", "FLOAT4E2M1")
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

ZERO_POINTS: dict[str, Accepts] = {
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
}

SCALES: dict[str, Accepts] = {
    "QuantizeLinear": _at(1),
    "DequantizeLinear": _at(1),
    "QLinearConv": _at(1, 4, 6),
    "QLinearMatMul": _at(1, 4, 6),
    "QGemm": _at(1, 4, 7),
    "QLinearAdd": _at(1, 4, 6),
    "QLinearMul": _at(1, 4, 6),
    "QLinearConcat": lambda i: i == 0 or (i > 2 and i % 3 == 0),
    "QLinearAveragePool": _at(1, 3),
    "QLinearGlobalAveragePool": _at(1, 3),
    "QLinearReduceMean": _at(1, 3),
    "QLinearLeakyRelu": _at(1, 3),
    "QLinearSigmoid": _at(1, 3),
    "QLinearSoftmax": _at(1, 3),
    "DynamicQuantizeMatMul": _at(2),
    "MatMulIntegerToFloat": _at(2, 3),
}

# Inputs that hold int32 biases; behind DequantizeLinear they are told by their type.
BIASES: dict[str, Accepts] = {"QLinearConv": _at(8), "QGemm": _at(6)}

# Inputs that hold limits and fill values: not in any fault space.
LIMITS: dict[str, Accepts] = {"Pad": _at(2), "Clip": _at(1, 2), "Max": _at(1), "Min": _at(1)}

# Axis of the output channels in the weight input of an operator; Gemm and QGemm depend on transB.
CHANNEL_AXES = {"Conv": 0, "QLinearConv": 0, "ConvInteger": 0}
COLUMNS = ("MatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat") + (
    "DynamicQuantizeMatMul",
)

# Operators that hand a weight on (input 0) on its way to the operator that computes with it.
PASS_THROUGH = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Clip"} | {
    "Gather"
}
# Inputs that hold float weights: the target `float`, and else reported as outside of the space.
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
class Discovery:
    """A model made ready for faults, and what is in it."""

    model: onnx.ModelProto
    """The file's graph with weights in Constant nodes turned into initializers."""
    space: Space
    excluded: list[dict[str, Any]]
    """int32 initializers that are dequantized (biases): name, dtype, shape."""
    warnings: list[str]
    decoders: Decoders = NONE
    """Constant operators behind the stored weights."""


@dataclass(kw_only=True)
class _Place:
    """The first operator in the graph that uses an initializer in one role."""

    order: int = 2**62
    op_type: str = ""
    node: str = ""
    absorbed: bool = False
    axis: int | None = None


@dataclass(kw_only=True)
class _Use:
    """How the graph uses one initializer."""

    places: dict[str, _Place] = field(default_factory=dict)
    """By role: `data`, or one of TARGETS."""
    unknown: list[str] = field(default_factory=list)
    read: bool = False


@dataclass(frozen=True, kw_only=True)
class _Path:
    """What stands between an initializer and the operator that computes with it."""

    clipped: bool = False
    perms: tuple[tuple[int, ...], ...] | None = ()
    """Transposes in their order; None once the layout changed in another way."""

    def through(self, node: onnx.NodeProto) -> _Path:
        perms = self.perms
        if node.op_type == "Transpose" and perms is not None:
            perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)
            perms = None if perm is None else (*perms, perm)
        elif node.op_type not in ("Identity", "Clip"):
            perms = None
        return _Path(clipped=self.clipped or node.op_type == "Clip", perms=perms)

    def axis(self, node: onnx.NodeProto, i: int, rank: int) -> int | None:
        """Axis of the output channels in the initializer, where `node` reads it as input `i`."""
        found = None
        if i in (1, 3) and node.op_type in CHANNEL_AXES:
            found = CHANNEL_AXES[node.op_type]
        elif i in (1, 3) and node.op_type in COLUMNS:
            found = rank - 1
        elif i in (1, 3) and node.op_type in ("Gemm", "QGemm"):
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            found = 0 if transposed else 1
        if found is None or self.perms is None or not rank > found >= 0:
            return None
        for perm in reversed(self.perms):
            found = perm[found]
        return found


def _label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


class _Graph:
    """Who reads which value in the top-level graph."""

    def __init__(self, graph: onnx.GraphProto, *, floats: bool) -> None:
        """`floats`: float matrices and kernels may be weights too."""
        stored = {
            t.name
            for t in graph.initializer
            if t.data_type in SMALL or (floats and t.data_type in FLOATS and len(t.dims) > 1)
        }
        self._floats = floats
        ends = DATA.keys() | ZERO_POINTS.keys()
        self.decoders = decoders.find(graph, stored, PASS_THROUGH, ends)
        self.readers: dict[str, list[tuple[int, onnx.NodeProto, int]]] = {}
        self.dynamic_scales = set()
        for order, node in enumerate(graph.node):
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((order, node, i))
            if node.op_type == "DynamicQuantizeLinear":
                self.dynamic_scales.add(node.output[1])
        self.int32_products = {
            n.output[0] for n in graph.node if n.op_type in ("ConvInteger", "MatMulInteger")
        }

    def use(self, name: str, rank: int) -> _Use:
        """Follow an initializer with `rank` axes to the operators that compute with it."""
        use = _Use()
        # decoders leave codes in their places
        for value in (name, *self.decoders.read.get(name, ())):
            self._follow(value, use, _Path(), rank)
        return use

    def _role(self, node: onnx.NodeProto, i: int) -> str | None:
        """What an operator takes its input `i` for; None where we do not know."""
        tables = {"data": DATA, "zero-point": ZERO_POINTS, "scale": SCALES, "bias": BIASES}
        if self._floats:
            tables["float"] = FLOAT_WEIGHTS
        for role, table in {**tables, "limit": LIMITS}.items():
            if table.get(node.op_type, _at())(i):
                return role
        # quantize_dynamic multiplies the scales outside of the integer operators
        if node.op_type == "Mul" and self.dynamic_scales & set(node.input):
            return "scale"
        if node.op_type == "Add" and self.int32_products & set(node.input):
            return "bias"
        return None

    def _follow(self, value: str, use: _Use, path: _Path, rank: int) -> None:
        for order, node, i in self.readers.get(value, []):
            use.read = True
            if value in self.decoders.tables or self.decoders.values & set(node.output):
                continue
            if node.op_type in PASS_THROUGH and i == 0:
                self._follow(node.output[0], use, path.through(node), rank)
                continue
            role = self._role(node, i)
            if role is None:
                use.unknown.append(f"input {i} of {node.op_type} {_label(node)}")
            elif node.op_type == "DequantizeLinear":
                self._consumer(node.output[0], (order, node, i), use, path, rank, role)
            else:
                self._take(order, node, i, use, path, rank, role)

    def _consumer(
        self,
        value: str,
        default: tuple[int, onnx.NodeProto, int],
        use: _Use,
        path: _Path,
        rank: int,
        role: str,
    ) -> None:
        """The first operator behind a DequantizeLinear that does more than change the layout."""
        readers = self.readers.get(value, [])
        if not readers:
            self._take(*default, use, path, rank, role)
        for order, node, i in readers:
            if node.op_type in PASS_THROUGH and i == 0:
                after = path.through(node)
                self._consumer(node.output[0], (order, node, i), use, after, rank, role)
            else:
                self._take(order, node, i, use, path, rank, role)

    def _take(
        self,
        order: int,
        node: onnx.NodeProto,
        i: int,
        use: _Use,
        path: _Path,
        rank: int,
        role: str,
    ) -> None:
        place = use.places.setdefault(role, _Place())
        place.absorbed |= path.clipped
        if order < place.order:
            place.order, place.op_type, place.node = order, node.op_type, _label(node)
            place.axis = path.axis(node, i, rank) if role in ("data", "float") else None


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node; None for other nodes and for other kinds of constants."""
    if node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            value: onnx.TensorProto = attribute.t
            return value
        if attribute.name in ("value_float", "value_floats"):
            floats = helper.get_attribute_value(attribute)
            return numpy_helper.from_array(np.asarray(floats, np.float32))
    return None


def _promote_constants(model: onnx.ModelProto, types: set[int]) -> None:
    """Turn Constant nodes that hold tensors of `types` into initializers."""
    graph = model.graph
    kept = []
    for node in graph.node:
        value = _constant(node)
        if value is not None and value.data_type in types:
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
    small = set(SMALL) | UNHANDLED
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


def _warnings(
    model: onnx.ModelProto, tensors: list[Tensor], unread: list[str], decoding: Decoders
) -> list[str]:
    found = []
    decoded = [tensor.name for tensor in tensors if tensor.name in decoding.read]
    if decoded:
        found.append(
            f"decoders stand behind {len(decoded)} weights (first: {decoded[0]}): faults strike "
            "what is stored, the network computes with what is read of it"
        )
    if decoding.tables:
        found.append(
            f"{len(decoding.tables)} tables of decoders (first: {min(decoding.tables)}) are not in "
            "the fault space"
        )
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
    inside = {tensor.name for tensor in tensors}
    floats = [name for name in _float_weights(model) if name not in inside]
    if floats:
        found.append(f"{len(floats)} float weights (first: {floats[0]}) are not in the fault space")
    if unread:
        found.append(
            f"{len(unread)} small initializers (first: {unread[0]}) are read by no operator "
            "and are not in the fault space"
        )
    return found


def discover(model: onnx.ModelProto, targets: Sequence[str] = TARGETS[:1]) -> Discovery:
    """The fault space of a model, in the order in which the network computes with its tensors.

    The model itself is changed: Constant nodes become initializers, and the data of what is in
    the space moves to `raw_data`. Activations stand behind all that the file stores, in the order
    of the optimized graph. UnsupportedModel, naming the tensor, for float models, for tensors of
    types or in places that are not handled, and for a target that it does not have.
    """
    known = (*TARGETS, ACTIVATION)
    if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(known):
        raise InputError(
            f"target {','.join(targets)!r} given; expected some of {', '.join(known)}, each once"
        )
    steering = {"scale", "zero-point"} & set(targets)
    if ACTIVATION in targets and steering:
        raise InputError(
            f"target {','.join(targets)!r} given; with another {min(steering)} onnxruntime may run "
            f"other kernels, with other values between them: hit {ACTIVATION} apart from it"
        )
    _refuse_hidden(model)
    types = set(SMALL) | UNHANDLED | {t for target in targets for t in TYPES[target]}
    _promote_constants(model, types)
    graph = _Graph(model.graph, floats="float" in targets)
    found: list[tuple[int, Tensor]] = []
    excluded, unread = [], []
    for proto in model.graph.initializer:
        use = graph.use(proto.name, len(proto.dims))
        small = proto.data_type in SMALL or proto.data_type in UNHANDLED
        if small and use.unknown:
            raise UnsupportedModel(
                f"initializer {proto.name!r} goes to {use.unknown[0]}, where we do not know "
                "whether it is a weight; it is not skipped silently, so the model is refused"
            )
        if small and not use.read:
            unread.append(proto.name)
        role = _target(proto, use)
        if role == "bias" and role not in targets:
            excluded.append({"name": proto.name, "dtype": "int32", "shape": list(proto.dims)})
        if role is not None and role in targets:
            found.append(_tensor(proto, use, role))
    tensors = [tensor for _, tensor in sorted(found, key=lambda pair: pair[0])]
    warnings = _warnings(model, tensors, unread, graph.decoders)
    if ACTIVATION in targets:
        between, more = _activations(model, {proto.name for proto in model.graph.initializer})
        tensors, warnings = tensors + between, warnings + more
    for target in targets:
        if not any(tensor.target == target for tensor in tensors):
            _refuse_without(model, target)
    return Discovery(
        model=model,
        space=Space(tensors=tuple(tensors)),
        excluded=excluded,
        warnings=warnings,
        decoders=graph.decoders,
    )


def _activations(model: onnx.ModelProto, taken: set[str]) -> tuple[list[Tensor], list[str]]:
    """The 8-bit values between the kernels that run for a model, and warnings."""
    values, left_out = activations.find(model.SerializeToString())
    for value in values:
        if value.name in taken:
            raise UnsupportedModel(
                f"{value.name!r} is an initializer of the file and a value of the optimized graph; "
                "rename one of them"
            )
    tensors = [
        Tensor(
            name=value.name,
            dtype=value.dtype,
            shape=value.shape,
            op_type=value.op_type,
            node=value.node,
            absorbed=False,
            target=ACTIVATION,
        )
        for value in values
    ]
    if not left_out:
        return tensors, []
    return tensors, [
        f"{len(left_out)} 8-bit values between kernels (first: {left_out[0]}) do not belong to "
        "single images and are not in the fault space"
    ]


def _target(proto: onnx.TensorProto, use: _Use) -> str | None:
    """Which target an initializer is; None for what no target covers."""
    if "data" in use.places and proto.data_type in (set(SMALL) | UNHANDLED):
        return "weight"
    if "bias" in use.places or ("data" in use.places and proto.data_type in INT32):
        return "bias" if proto.data_type in INT32 else None
    if "float" in use.places and proto.data_type in FLOATS:
        return "float"
    return next((role for role in ("scale", "zero-point") if role in use.places), None)


def _tensor(proto: onnx.TensorProto, use: _Use, target: str) -> tuple[int, Tensor]:
    """The entry of an initializer in the space, with its place; its data moves to `raw_data`."""
    place = use.places[target if target in use.places else "data"]
    if proto.data_type not in TYPES[target]:
        name = TensorProto.DataType.Name(proto.data_type).lower()
        raise UnsupportedModel(
            f"{target} {proto.name!r} of {place.op_type} {place.node} has the type {name}; only "
            f"{', '.join(TYPES[target].values())} are handled"
        )
    dtype = TYPES[target][proto.data_type]
    values = np.ascontiguousarray(numpy_helper.to_array(proto))
    if dtype in bits.PACKED:
        values = bits.pack(values.astype(np.int8 if dtype == "int4" else np.uint8).reshape(-1))
    for kind in ("int32_data", "float_data"):
        proto.ClearField(kind)
    proto.raw_data = values.tobytes()
    return place.order, Tensor(
        name=proto.name,
        dtype=dtype,
        shape=tuple(proto.dims),
        op_type=place.op_type,
        node=place.node,
        absorbed=place.absorbed,
        target=target,
        axis=place.axis,
    )


def _refuse_without(model: onnx.ModelProto, target: str) -> NoReturn:
    if target == ACTIVATION:
        raise UnsupportedModel(
            "no 8-bit values pass between the kernels that onnxruntime runs for this model "
            "(`resq-deploy inspect` lists them); ask for other targets"
        )
    if target != "weight":
        kinds = ", ".join(TYPES[target].values())
        raise UnsupportedModel(f"the model stores no {target} ({kinds}); ask for other targets")
    floats = _float_weights(model)
    raise UnsupportedModel(
        f"the model has no 8-bit or 4-bit weights ({len(floats)} float weights"
        + (f", first: {floats[0]}" if floats else "")
        + "); faults go into quantized weights: quantize it first"
    )


def inspect(
    raw: bytes, name: str = "the model", targets: Sequence[str] = TARGETS[:1]
) -> dict[str, Any]:
    """What `resq-deploy inspect` shows of the bytes of an ONNX file.

    Keys: tensors (list of Tensor.to_json), n_tensors, n_bytes, n_bits, excluded, warnings,
    kernels (node types that onnxruntime runs, with their numbers).
    """
    found = discover(runtime.parse_model(raw, name), targets)
    return {
        "n_tensors": len(found.space.tensors),
        "n_bytes": sum(tensor.n_bytes for tensor in found.space.tensors),
        "n_bits": found.space.n_bits,
        "tensors": found.space.to_json(),
        "excluded": found.excluded,
        "kernels": runtime.kernels(raw),
        "warnings": found.warnings,
    }
