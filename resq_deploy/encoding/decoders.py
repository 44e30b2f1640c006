"""Decoders in the file: standard operators between a stored weight and its DequantizeLinear.

They compute with constants alone, so onnxruntime folds them when it loads the file, and runs the
same integer kernels as without. Gather counts negative indices from the end, so that a stored code
is its own index into a table by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.encoding import ByByte, Checked, Encoding, InPlaceSecded, secded
from resq_deploy.errors import InputError

BITWISE_OPSET = 18
"""The first with BitwiseAnd, BitwiseXor, and ReduceSum and Split as they are used here."""


class _Decoder:
    """The nodes that read one weight, and the tables that all decoders of a file share."""

    def __init__(self, weight: str, tables: dict[str, NDArray[Any]]) -> None:
        self.weight = weight
        self.tables = tables
        self.nodes: list[onnx.NodeProto] = []

    def table(self, name: str, values: NDArray[Any]) -> str:
        self.tables[f"decoder.{name}"] = values
        return f"decoder.{name}"

    def add(self, op: str, *inputs: str, n: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or of its n outputs."""
        prefix = f"{self.weight}.decoder{len(self.nodes)}"
        outputs = [prefix] if n == 1 else [f"{prefix}.{i}" for i in range(n)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=prefix, **attributes))
        return outputs[0] if n == 1 else outputs

    def cast(self, value: str, to: int) -> str:
        return str(self.add("Cast", value, to=to))

    def finish(self) -> None:
        """The last node makes what the network computes with."""
        self.nodes[-1].output[:] = [f"{self.weight}.read"]


def _table(d: _Decoder, table: NDArray[np.int8]) -> None:
    index = d.cast(d.weight, TensorProto.INT32)
    d.add("Gather", d.table("table", table), index)
    d.finish()


def _mean(d: _Decoder, encoding: Checked, rank: int) -> None:
    """Bad codes become the mean of the good ones of their channel, as `Checked.decode` says."""
    index = d.cast(d.weight, TensorProto.INT32)
    good = d.add("Gather", d.table("good", encoding.good), index)
    # A float table: bad codes are 0 in it.
    code = d.add("Gather", d.table("table", encoding.table.astype(np.float32)), index)
    axes = d.table(f"axes{rank}", np.arange(1, rank, dtype=np.int64))
    total = d.add("ReduceSum", code, axes, keepdims=1)
    count = d.add("ReduceSum", d.cast(good, TensorProto.FLOAT), axes, keepdims=1)
    count = d.add("Max", count, d.table("one", np.array(1, np.float32)))
    mean = d.add("Round", d.add("Div", total, count))
    d.cast(d.add("Where", good, code, mean), TensorProto.INT8)
    d.finish()


def _secded(d: _Decoder, encoding: InPlaceSecded, shape: tuple[int, ...]) -> None:
    """What `InPlaceSecded.decode` does, word by word."""
    size = int(np.prod(shape))
    flat = d.add("Reshape", d.cast(d.weight, TensorProto.INT32), d.table("flat", np.array([-1])))
    whole, tail = flat, None
    if size % secded.WORD:
        parts = np.array([size - size % secded.WORD, size % secded.WORD])
        whole, tail = d.add("Split", flat, d.table(f"parts{size}", parts), n=2)
    words = d.add("Reshape", whole, d.table("words", np.array([-1, secded.WORD])))
    unsigned = d.add("BitwiseAnd", words, d.table("byte", np.array(255, np.int32)))
    starts = d.table("starts", 256 * np.arange(secded.WORD, dtype=np.int32))
    checks = d.table("checks", secded.CHECKS.reshape(-1))
    syndrome = d.add("Gather", checks, d.add("Add", unsigned, starts))
    for _ in range(3):  # exclusive or of 8 columns
        halves = d.add("Split", syndrome, n=2, axis=1, num_outputs=2)
        syndrome = d.add("BitwiseXor", *halves)
    syndrome = d.add("Reshape", d.cast(syndrome, TensorProto.INT32), "decoder.flat")
    inverted = d.add("Gather", d.table("correction", secded.CORRECTION), syndrome)
    fixed = d.add("BitwiseXor", d.cast(unsigned, TensorProto.UINT8), inverted)
    index = d.add("Add", d.cast(fixed, TensorProto.INT32), starts)
    code = d.add("Gather", d.table("read", secded.READ.reshape(-1)), index)
    if encoding.zero:
        keep = np.where(secded.DOUBLE, 0, -1).astype(np.int8)[:, None]
        code = d.add("BitwiseAnd", code, d.add("Gather", d.table("keep", keep), syndrome))
    code = d.add("Reshape", code, "decoder.flat")
    if tail is not None:
        code = d.add("Concat", code, d.cast(tail, TensorProto.INT8), axis=0)
    dims = "x".join(map(str, shape))
    d.add("Reshape", code, d.table(f"shape{dims}", np.array(shape)))
    d.finish()


def attach(
    model: onnx.ModelProto, encoding: Encoding, weights: Mapping[str, NDArray[np.int8]]
) -> None:
    """Store the weights of a QDQ model, which holds their codes, as `encoding` does, in place.

    `weights` are their codes by name of the initializer. A decoder stands behind each; what it
    makes is called NAME.read. Nothing is done for the encoding plain. InputError for an opset that
    lacks an operator.
    """
    if encoding.name == "plain":
        return
    opset = next(o.version for o in model.opset_import if o.domain == "")
    if isinstance(encoding, InPlaceSecded) and opset < BITWISE_OPSET:
        raise InputError(
            f"encoding {encoding.name} needs opset {BITWISE_OPSET} or later; opset {opset} given"
        )
    for node in model.graph.node:
        node.input[:] = [f"{name}.read" if name in weights else name for name in node.input]
    stored = {t.name: t for t in model.graph.initializer}
    tables: dict[str, NDArray[Any]] = {}
    nodes: list[onnx.NodeProto] = []
    for name, codes in weights.items():
        stored[name].CopyFrom(numpy_helper.from_array(encoding.encode(codes), name))
        decoder = _Decoder(name, tables)
        if isinstance(encoding, InPlaceSecded):
            _secded(decoder, encoding, codes.shape)
        elif isinstance(encoding, Checked) and encoding.policy == "mean":
            _mean(decoder, encoding, codes.ndim)
        else:
            assert isinstance(encoding, ByByte)
            _table(decoder, encoding.table)
        nodes += decoder.nodes
    network = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *network])
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in tables.items())
    onnx.checker.check_model(model, full_check=False)
