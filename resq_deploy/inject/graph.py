"""The graph that onnxruntime really runs, cut into units that can be run alone.

The optimized graph of a file names the kernels: the fast engine runs the same kernels, a few
images at a time, only where a fault reaches. A value is *kept* when it has rows for every image,
in the order of the images; everything else (shapes, scales taken from a batch, unpacked
constants) is computed again inside of each unit that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import runtime
from resq_deploy.errors import InputError

Array = NDArray[Any]

LAYOUT = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
NOTHING: Mapping[str, TensorProto] = {}
FLOATS = (np.float32, np.float64, np.float16)
HEAVY = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} | {
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvTranspose", "QAttention", "Attention",
}  # fmt: skip
"""Where the arithmetic is: a unit holds one of them, so that the others need not run again."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A kept value: `rows` rows for every image."""

    name: str
    dtype: np.dtype[Any]
    rows: int
    tail: tuple[int, ...]
    """Shape behind the first axis."""

    @property
    def bytes_per_image(self) -> int:
        return self.rows * int(np.prod(self.tail, dtype=np.int64)) * self.dtype.itemsize


@dataclass(kw_only=True)
class Unit:
    """Nodes that run together: kept values in, kept values out."""

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    initializers: set[str]

    @property
    def label(self) -> str:
        """Operators and the first output, for people."""
        return f"{'+'.join(node.op_type for node in self.nodes)} {self.outputs[0]}"

    @property
    def heavy(self) -> bool:
        return any(node.op_type in HEAVY for node in self.nodes)


@dataclass(kw_only=True)
class Cut:
    """An optimized model in units, in the order in which they run."""

    model: onnx.ModelProto
    units: list[Unit]
    values: dict[str, Value]
    """Kept values that a unit reads or writes, the input among them."""
    input: str
    output: str
    initializers: dict[str, onnx.TensorProto]
    consumers: dict[str, list[int]] = field(default_factory=dict)
    """Units that read a value."""

    def unit_model(self, unit: Unit, changed: Mapping[str, TensorProto] = NOTHING) -> bytes:
        """The unit as a model of its own, with some initializers changed."""
        tensors = [changed.get(n, self.initializers[n]) for n in sorted(unit.initializers)]
        graph = helper.make_graph(
            unit.nodes,
            "unit",
            [self._info(name) for name in unit.inputs],
            [self._info(name) for name in unit.outputs],
            tensors,
        )
        return _model(graph, self.model)

    def joined(self, indexes: Iterable[int]) -> Unit | None:
        """The units `indexes`, up to the one that makes the output, as one unit.

        None when two of them make the same value for themselves.
        """
        nodes = list({id(node): node for i in indexes for node in self.units[i].nodes}.values())
        made = [name for node in nodes for name in node.output if name]
        return _unit(nodes, [self.output], self.values) if len(made) == len(set(made)) else None

    def whole_model(
        self, outputs: Iterable[str], changed: Mapping[str, TensorProto] = NOTHING
    ) -> bytes:
        """The whole optimized graph with other outputs and some initializers changed."""
        source = self.model.graph
        graph = helper.make_graph(
            list(source.node),
            "whole",
            list(source.input),
            [self._info(name) for name in outputs],
            [changed.get(tensor.name, tensor) for tensor in source.initializer],
        )
        return _model(graph, self.model)

    def holding(self, changed: Mapping[str, TensorProto]) -> Cut:
        """The same units where some initializers are other ones."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in changed:
                tensor.CopyFrom(changed[tensor.name])
        return replace(self, model=model, initializers=self.initializers | {**changed})

    def _info(self, name: str) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(self.values[name].dtype)
        return helper.make_tensor_value_info(name, kind, None)


def _model(graph: onnx.GraphProto, like: onnx.ModelProto) -> bytes:
    model = helper.make_model(
        graph, opset_imports=list(like.opset_import), ir_version=like.ir_version
    )
    return bytes(model.SerializeToString())


def _all_values(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output if name]


def _shapes(
    model: onnx.ModelProto, x: Array, sizes: Sequence[int]
) -> dict[str, list[tuple[np.dtype[Any], tuple[int, ...]]]]:
    """Type and shape of every value of the graph when fed the first n images, n in `sizes`."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = _all_values(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.build(probe.SerializeToString(), level="off")
    (source,) = session.get_inputs()
    found: dict[str, list[tuple[np.dtype[Any], tuple[int, ...]]]] = {name: [] for name in names}
    for n in sizes:
        outputs = session.run(names, {source.name: x[:n]})
        for name, output in zip(names, outputs, strict=True):
            if not isinstance(output, np.ndarray):
                raise InputError(f"value {name!r} is not a tensor")
            found[name].append((output.dtype, output.shape))
    return found


def _kept(name: str, seen: list[tuple[Any, tuple[int, ...]]], sizes: Sequence[int]) -> Value | None:
    """The value, when it has the same number of rows for every image."""
    dtype, first = seen[0]
    if not first or first[0] == 0 or first[0] % sizes[0]:
        return None
    rows = first[0] // sizes[0]
    same = all(
        shape[:1] == (rows * n,) and shape[1:] == first[1:]
        for (_, shape), n in zip(seen, sizes, strict=True)
    )
    return Value(name=name, dtype=dtype, rows=rows, tail=first[1:]) if same else None


def _closure(
    node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], kept: Mapping[str, Value]
) -> list[onnx.NodeProto]:
    """The node behind those that make the values it needs and nobody keeps."""
    found: list[onnx.NodeProto] = []
    for name in node.input:
        if name in producer and name not in kept:
            for other in _closure(producer[name], producer, kept):
                if not any(other is one for one in found):
                    found.append(other)
    return [*found, node]


def _unit(nodes: list[onnx.NodeProto], outputs: list[str], cut_values: Mapping[str, Value]) -> Unit:
    made = {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    inputs = [n for n in read if n in cut_values and (n not in made or n not in outputs)]
    inputs = [n for n in inputs if n not in made]
    return Unit(
        nodes=nodes,
        inputs=inputs,
        outputs=outputs,
        initializers={n for n in read if n not in made and n not in inputs},
    )


def values_of_images(
    best: onnx.ModelProto, x: Array, *, fixed: int | None
) -> tuple[dict[str, Value], dict[str, np.dtype[Any]]]:
    """The values of an optimized graph that have rows for every image, the input among them.

    Second, the types of the others that depend on the input. Arguments as of `cut`.
    """
    sizes = [fixed] if fixed else [2, 3]
    seen = _shapes(best, np.resize(x, (max(sizes), *x.shape[1:])), sizes)
    kept = {n: v for n, s in seen.items() if (v := _kept(n, s, sizes)) is not None}
    constant = {t.name for t in best.graph.initializer}
    for node in best.graph.node:  # what depends on constants alone has no rows of images
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            for name in node.output:
                kept.pop(name, None)
    others = {n: s[0][0] for n, s in seen.items() if n not in kept and n not in constant}
    source = best.graph.input[0].name
    kept[source] = Value(name=source, dtype=x.dtype, rows=1, tail=tuple(x.shape[1:]))
    return kept, others


def cut(model: bytes, x: Array, *, fixed: int | None, apart: Collection[str] = frozenset()) -> Cut:
    """Cut the optimized graph of `model`.

    `x` are adapted images, of which a few are run; `fixed` is the batch size of a model that has
    one. The values `apart` are made by one unit only and all others read them from there.
    InputError, saying why, for a graph that cannot be cut.
    """
    best = runtime.optimized(model)
    inner = [n.op_type for n in best.graph.node for a in n.attribute if a.HasField("g")]
    if inner:
        raise InputError(f"the graph has subgraphs ({inner[0]})")
    source, output = best.graph.input[0].name, best.graph.output[0].name
    kept, _ = values_of_images(best, x, fixed=fixed)
    if output not in kept:
        raise InputError(f"output {output!r} has no rows of images")
    producer = {name: node for node in best.graph.node for name in node.output if name}
    units = [
        _unit(_closure(node, producer, kept), [n for n in node.output if n in kept], kept)
        for node in best.graph.node
        if any(name in kept for name in node.output)
    ]
    units = _merged(units, kept, {output, *apart})
    for unit in units:
        _read_from_outside(unit, kept, apart)
    units = _needed(units, output)
    consumers: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        for name in unit.inputs:
            consumers.setdefault(name, []).append(index)
    used = {source, *(name for unit in units for name in (*unit.inputs, *unit.outputs))}
    return Cut(
        model=best,
        units=units,
        values={name: value for name, value in kept.items() if name in used},
        input=source,
        output=output,
        initializers={t.name: t for t in best.graph.initializer},
        consumers=consumers,
    )


def _read_from_outside(unit: Unit, kept: Mapping[str, Value], apart: Collection[str]) -> None:
    """Let a unit read what it would make for itself beside something else that nobody keeps."""
    made = {name for node in unit.nodes for name in node.output}
    again = made.intersection(apart).difference(unit.outputs)
    if not again:
        return
    nodes = []
    for node in unit.nodes:
        nodes.append(onnx.NodeProto())
        nodes[-1].CopyFrom(node)
        nodes[-1].output[:] = [f"{n}#again" if n in again else n for n in node.output]
    joined = _unit(nodes, unit.outputs, kept)
    unit.nodes, unit.inputs, unit.initializers = nodes, joined.inputs, joined.initializers


def _merged(units: list[Unit], kept: Mapping[str, Value], apart: Collection[str]) -> list[Unit]:
    """Float or merely rearranged values with one reader are rarely worth keeping.

    The two units become one, unless the value is one of `apart`.
    """
    readers: dict[str, list[Unit]] = {}
    for unit in units:
        for name in unit.inputs:
            readers.setdefault(name, []).append(unit)
    merged: list[Unit] = []
    for unit in units:
        (name, *more) = unit.outputs
        alone = not more and name not in apart and len(readers.get(name, [])) == 1
        if alone and _worth_merging(unit, readers[name][0], kept[name]):
            (reader,) = readers[name]
            nodes = [*unit.nodes]
            nodes += [n for n in reader.nodes if not any(n is other for other in unit.nodes)]
            joined = _unit(nodes, reader.outputs, {k: v for k, v in kept.items() if k != name})
            reader.nodes, reader.inputs = joined.nodes, joined.inputs
            reader.initializers = joined.initializers
            for other in joined.inputs:
                readers[other] = [u for u in readers.get(other, []) if u is not unit]
                if not any(u is reader for u in readers[other]):
                    readers[other].append(reader)
        else:
            merged.append(unit)
    return merged


def _worth_merging(unit: Unit, reader: Unit, between: Value) -> bool:
    if unit.heavy or reader.heavy:
        # layers stay alone: they are updated in parts
        return between.dtype in FLOATS and not (unit.heavy and reader.heavy)
    return between.dtype in FLOATS or all(n.op_type in LAYOUT for n in unit.nodes)


def _needed(units: list[Unit], output: str) -> list[Unit]:
    wanted, found = {output}, []
    for unit in reversed(units):
        outputs = [name for name in unit.outputs if name in wanted]
        if outputs:
            unit.outputs = outputs
            wanted.update(unit.inputs)
            found.append(unit)
    return found[::-1]


def users(model: onnx.ModelProto, name: str) -> int:
    """How many operators compute with a tensor, behind those that only unpack or rearrange it."""
    found = 0
    for node in model.graph.node:
        if name in node.input:
            on = node.op_type in LAYOUT or node.op_type == "DequantizeLinear"
            found += users(model, node.output[0]) if on else list(node.input).count(name)
    return found


def array(tensor: onnx.TensorProto) -> Array:
    """The contents of an initializer."""
    return np.asarray(numpy_helper.to_array(tensor))


class Runner:
    """Runs units on rows of images; sessions are built when first needed and kept."""

    def __init__(self, cut: Cut, *, precise: bool | None = None) -> None:
        self.cut = cut
        self._precise = precise
        self._sessions: dict[int, tuple[Unit, ort.InferenceSession]] = {}

    def session(self, unit: Unit, changed: Mapping[str, TensorProto] = NOTHING) -> Any:
        """The session of a unit; with changed initializers a new one that is not kept."""
        if changed:
            return self._build(self.cut.unit_model(unit, changed))
        if id(unit) not in self._sessions:  # which keeps the unit, and so its number, alive
            self._sessions[id(unit)] = unit, self._build(self.cut.unit_model(unit))
        return self._sessions[id(unit)][1]

    def holding(self, cut: Cut, changed: Collection[str]) -> Runner:
        """The runner of `cut`, which differs from the own in the initializers `changed`."""
        other = Runner(cut, precise=self._precise)
        for key, (unit, session) in self._sessions.items():
            if unit.initializers.isdisjoint(changed):
                other._sessions[key] = unit, session
        return other

    def has(self, unit: Unit) -> bool:
        """Has the unit been needed before?"""
        return id(unit) in self._sessions

    def _build(self, model: bytes) -> ort.InferenceSession:
        return runtime.build(model, level="off", precise=self._precise)

    def run(self, session: Any, unit: Unit, inputs: Sequence[Array]) -> list[Array]:
        """Outputs (K, rows, ...) of a unit for inputs (K, rows, ...), in one call."""
        feeds = {
            name: array.reshape(-1, *self.cut.values[name].tail)
            for name, array in zip(unit.inputs, inputs, strict=True)
        }
        outputs = session.run(unit.outputs, feeds)
        return [
            output.reshape(-1, self.cut.values[name].rows, *self.cut.values[name].tail)
            for name, output in zip(unit.outputs, outputs, strict=True)
        ]

    def attempt(self, unit: Unit, feeds: Mapping[str, Array]) -> Array | None:
        """The first output for inputs of another shape; None when the unit does not take them."""
        try:
            return np.asarray(self.session(unit).run(unit.outputs, feeds)[0])
        except Exception:  # onnxruntime's exceptions share no base class
            return None
