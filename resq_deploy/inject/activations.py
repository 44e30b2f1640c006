"""Values between the kernels: where they are in the optimized graph, and how they are struck.

Integer kernels hand 8-bit values to each other. Which ones there are is decided by onnxruntime when
it optimizes a file, so they are found, and struck, in the graph that it really runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import runtime
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.inject import graph

Array = NDArray[Any]

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
"""Operators whose output is the memory of their input."""

BYTES = (np.dtype(np.int8), np.dtype(np.uint8))

WRITTEN = "#written"
"""Behind the name of a struck value: what its kernel made."""

INPUT = "input"
"""In place of an operator: an 8-bit input of the file."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An 8-bit value that is made once for every image."""

    name: str
    dtype: str
    """`int8` or `uint8`."""
    shape: tuple[int, ...]
    """Of the value of one image: (rows, ...)."""
    op_type: str
    """Operator that makes it, or INPUT."""
    node: str
    """Name of that node, or of its first output where it has none."""


def find(model: bytes) -> tuple[list[Activation], list[str]]:
    """The 8-bit values on which the first output depends, in the order in which they are made.

    An 8-bit input of the file counts; what only views another value in other dimensions does not,
    because it is the same memory. Second, the names of values that do not belong to single images.
    UnsupportedModel when the sizes of the input are open, or when the optimized graph, stored and
    loaded again, answers otherwise.
    """
    session = runtime.session(model)
    batch = session.get_inputs()[0].shape[0]
    fixed = batch if isinstance(batch, int) else None
    x = _noise(session, fixed or 3)
    best = runtime.optimized(model)
    again = runtime.session(best.SerializeToString(), level="off")
    if runtime.run(again, x).tobytes() != runtime.run(session, x).tobytes():
        raise UnsupportedModel(
            "the graph that onnxruntime runs, stored and loaded again, answers otherwise, so that "
            "its values cannot be struck; ask for other targets"
        )
    values, others = graph.values_of_images(best, x, fixed=fixed)
    needed = _needed(best.graph)
    source = best.graph.input[0].name
    places = {source: (INPUT, source)}
    for node in best.graph.node:
        if node.op_type not in VIEWS:
            label = node.op_type, node.name or node.output[0]
            places.update({name: label for name in node.output if name in needed})
    found = []
    for name, (op_type, node_name) in places.items():
        value = values.get(name)
        if value is not None and value.dtype in BYTES:
            shape = (value.rows, *value.tail)
            found.append(
                Activation(
                    name=name, dtype=value.dtype.name, shape=shape, op_type=op_type, node=node_name
                )
            )
    return found, [name for name in places if name in others and others[name] in BYTES]


def _noise(session: Any, n: int) -> Array:
    """`n` images as the file takes them; UnsupportedModel where it does not say how."""
    want = session.get_inputs()[0]
    sizes, dtype = want.shape[1:], runtime.input_type(want)
    if not all(isinstance(size, int) for size in sizes) or dtype is None:
        raise UnsupportedModel(
            f"the model's input {want.name} takes {want.type} with the sizes {want.shape}; values "
            "between kernels have a size only if those behind the batch are fixed: fix them"
        )
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        return rng.random((n, *sizes)).astype(dtype)
    low = -128 if dtype == np.int8 else 0
    return rng.integers(low, low + 256, (n, *sizes)).astype(dtype)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for other in inner.node:
                yield from _reads(other)


def _needed(of: onnx.GraphProto) -> set[str]:
    """The values on which the first output depends, itself included."""
    needed = {of.output[0].name}
    for node in reversed(of.node):
        if needed.intersection(node.output):
            needed.update(_reads(node))
    return needed


def strike(model: onnx.ModelProto, masks: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with values that all their readers see exclusive-or a constant.

    `masks` by value: (rows, ...) of one image in the type of the value, for every image the same.
    A table of all pairs of codes does it, because BitwiseXor came with opset 18 only.
    InputError for a value that the model does not make.
    """
    struck = onnx.ModelProto()
    struck.CopyFrom(model)
    g = struck.graph
    made = {g.input[0].name, *(name for node in g.node for name in node.output)}
    for name in masks.keys() - made:
        raise InputError(
            f"the optimized graph has no value {name!r} under this change; strike it apart from "
            "weights"
        )
    nodes: list[onnx.NodeProto] = []
    if g.input[0].name in masks:
        nodes += _exclusive_or(g, g.input[0].name, masks[g.input[0].name])
        g.input[0].name += WRITTEN
    for node in g.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in masks:
                nodes += _exclusive_or(g, name, masks[name])
                node.output[i] += WRITTEN
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del g.node[:]
    g.node.extend(copies)
    return struck


def _exclusive_or(g: onnx.GraphProto, name: str, mask: Array) -> list[onnx.NodeProto]:
    """Nodes that make `name` from what was written under another name; their constants go to `g`.

    The code c and the mask m are looked up at 256 * m + c.
    """
    codes = np.arange(256, dtype=np.uint8)
    table = (codes[:, None] ^ codes).reshape(-1)
    above = 256 * mask.view(np.uint8).astype(np.int32)
    if mask.dtype == np.int8:  # codes are from -128 on
        above, table = above + 128, np.roll(table.reshape(256, 256), 128, 1).reshape(-1)
    constants: dict[str, Array] = {
        "apart": np.array([-1, *mask.shape], np.int64),
        "together": np.array([-1, *mask.shape[1:]], np.int64),
        "above": above,
        "table": table.view(mask.dtype),
    }
    g.initializer.extend(
        numpy_helper.from_array(value, f"{name}#{key}") for key, value in constants.items()
    )
    return [
        helper.make_node("Reshape", [name + WRITTEN, f"{name}#apart"], [f"{name}#images"]),
        helper.make_node("Cast", [f"{name}#images"], [f"{name}#codes"], to=TensorProto.INT32),
        helper.make_node("Add", [f"{name}#codes", f"{name}#above"], [f"{name}#places"]),
        helper.make_node("Gather", [f"{name}#table", f"{name}#places"], [f"{name}#struck"]),
        helper.make_node("Reshape", [f"{name}#struck", f"{name}#together"], [name]),
    ]
