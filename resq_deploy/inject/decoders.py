"""Decoders: constant operators between a stored weight and the operators that compute with it.

A file may store its weights encoded and decode them by Cast, Gather from a table, exclusive or and
the like (`encoding` writes such files, and others may). onnxruntime folds all of that when it loads
the file. Faults strike what is stored; the network computes with what the decoder then reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy import runtime
from resq_deploy.inject import graph


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """What of a graph decodes weights."""

    values: Set[str]
    """Every value on the way from a stored weight to what is read of it."""
    tables: Set[str]
    """Initializers in which codes are looked up, or that are one operand for all codes: part of the
    decoder, not weights."""
    read: Mapping[str, tuple[str, ...]]
    """By stored weight: the values that other operators than those of a decoder then take."""


NONE = Decoders(values=frozenset(), tables=frozenset(), read={})


def find(network: onnx.GraphProto, small: Set[str], moving: Set[str], ends: Set[str]) -> Decoders:
    """The decoders of a graph.

    `small` are the initializers that may be weights. Operators of the types `moving` only change
    the layout, and are a decoder's only behind another operator; those of the types `ends` compute
    with codes.
    """
    constant = {tensor.name for tensor in network.initializer}
    weights = {name: {name} for name in small}
    """By constant value: the weights that it is made from."""
    scalars = {t.name for t in network.initializer if t.name in small and math.prod(t.dims) == 1}
    decoded: set[str] = set()
    tables: set[str] = set()
    for node in network.node:
        inputs = [name for name in node.input if name]
        inner = any(a.HasField("g") for a in node.attribute)  # may read other values
        if node.op_type in ends or inner or not constant.issuperset(inputs):
            continue
        constant.update(node.output)
        lookup = node.op_type == "Gather" and bool(weights.get(inputs[1]))
        computes = lookup or node.op_type not in moving
        operands = {inputs[0]} if lookup else scalars.intersection(inputs)
        codes = [name for name in inputs if name not in operands]
        if computes and any(weights.get(name) for name in codes):
            tables.update(*(weights.get(name, ()) for name in operands))
            inputs = codes
        sources = {weight for name in inputs for weight in weights.get(name, ())}
        weights.update(dict.fromkeys(node.output, sources))
        if sources and (computes or decoded & set(inputs)):
            decoded.update(node.output)
    read: dict[str, tuple[str, ...]] = {}
    for node in network.node:
        if not decoded.issuperset(node.output):
            for name in decoded.intersection(node.input):
                for source in weights[name]:
                    read[source] = tuple(dict.fromkeys((*read.get(source, ()), name)))
    return Decoders(values=decoded, tables=tables, read=read)


class Reader:
    """Reads a stored weight through its decoder, as onnxruntime does when it loads the file."""

    def __init__(self, model: onnx.ModelProto, stored: str, read: str) -> None:
        """`model` holds the contents of `stored`, 8-bit codes; `read` is what is made of them."""
        proto = next(t for t in model.graph.initializer if t.name == stored)
        self._stored, self._name, self.read = graph.array(proto), stored, read
        self._part = runtime.constant_part(model, [stored], [read])
        self.golden = self._run(self._stored)
        """What is read without faults."""

    @cached_property
    def _session(self) -> Any:
        return runtime.build(self._part)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_session"}

    def _run(self, stored: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(self._session.run([self.read], {self._name: stored})[0])

    def changed(
        self, offsets: NDArray[np.int64], values: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Elements (C order) that are read differently where stored elements have other values."""
        stored = self._stored.copy()
        stored.reshape(-1)[offsets] = values
        found = self._run(stored).reshape(-1)
        where = np.flatnonzero(found != self.golden.reshape(-1))
        return where, found[where]
