"""The guarantees of an exported file, checked after every export."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy import runtime
from resq_deploy.encoding import Encoding
from resq_deploy.errors import ExportError
from resq_deploy.export import tflite

PLAIN = Encoding()

# What may stand in the graph that onnxruntime runs; everything else is refused by name.
INTEGER = {
    "QLinearConv", "QGemm", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
    "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearConcat",
    "QLinearLeakyRelu",
}  # fmt: skip
MOVING = {
    "QuantizeLinear", "DequantizeLinear", "MaxPool", "NhwcMaxPool", "Transpose", "Reshape",
    "Flatten", "Squeeze", "Unsqueeze", "Gather", "Slice", "Split", "Concat", "Pad", "Identity",
    "Where", "Relu", "Clip",
}  # fmt: skip
"""Operators that convert, move, select or bound elements, whatever their type."""
FLOAT = {"Gelu", "Sigmoid", "GlobalAveragePool", "ReduceMean"}
"""Operators that are allowed to compute in float."""
ISLANDS = {
    "Sqrt": Counter(Mul=3, Sub=2, Sqrt=1, Div=1, Add=1),
    "Exp": Counter(ReduceMax=1, Sub=1, Exp=1, Mul=1, Round=1, ReduceSum=1, Div=1),
}
"""The operators that one LayerNorm, and one softmax, of `nets.islands` is made of (not those of
FLOAT and MOVING), by the one that tells them. They may stand together, and nowhere else."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far two executions of the same network are apart, in steps of the output quantizer."""

    a: str
    b: str
    n_images: int
    within_one_step: int
    """Images on which no logit differs by more than one step."""
    max_steps: int
    argmax_equal: int
    argmax_decided: int
    """Images whose two best logits are more than two steps apart: arg max must be equal."""
    argmax_decided_equal: int

    @property
    def holds(self) -> bool:
        """One step on 99.9 % of the images, two on every one, decided arg maxes equal."""
        return (
            self.within_one_step >= 0.999 * self.n_images
            and self.max_steps <= 2
            and self.argmax_decided_equal == self.argmax_decided
        )


def parity(names: tuple[str, str], a: NDArray[Any], b: NDArray[Any], *, step: float) -> Parity:
    """Compare logits (N, n_classes) of two executions; `step` is the output scale."""
    distance = np.rint(np.abs(a.astype(np.float64) - b) / step).max(axis=1)
    best = np.sort(a, axis=1)[:, -2:]
    decided = best[:, 1] - best[:, 0] > 2.5 * step  # on the grid: three steps or more
    same = a.argmax(axis=1) == b.argmax(axis=1)
    return Parity(
        a=names[0],
        b=names[1],
        n_images=len(a),
        within_one_step=int((distance <= 1).sum()),
        max_steps=int(distance.max()),
        argmax_equal=int(same.sum()),
        argmax_decided=int(decided.sum()),
        argmax_decided_equal=int((same & decided).sum()),
    )


def require(results: list[Parity]) -> list[dict[str, Any]]:
    """The results as plain values; ExportError names the first that does not hold."""
    for result in results:
        if not result.holds:
            raise ExportError(
                f"{result.a} and {result.b} disagree: {result.within_one_step} of "
                f"{result.n_images} images within one output step (99.9 % needed), at most "
                f"{result.max_steps} steps (2 allowed), {result.argmax_decided_equal} of "
                f"{result.argmax_decided} decided arg maxes equal"
            )
    return [asdict(result) for result in results]


def structure(
    model: onnx.ModelProto,
    weights: dict[str, NDArray[np.int8]],
    encoding: Encoding = PLAIN,
) -> None:
    """Weights are int8 initializers that hold exactly these codes as `encoding` stores them, behind
    nothing but its decoder and a DequantizeLinear, and not graph inputs; the batch dimension is
    dynamic. Else ExportError."""
    stored = {t.name: t for t in model.graph.initializer}
    inputs = {i.name for i in model.graph.input}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    decoded = encoding.name != "plain"
    for layer, expected in weights.items():
        name = f"{layer}.weight"
        if name not in stored or name in inputs:
            raise ExportError(f"weight {name!r} is not a constant initializer of the file")
        actual = numpy_helper.to_array(stored[name])
        if actual.dtype != np.int8 or not np.array_equal(actual, encoding.encode(expected)):
            raise ExportError(f"weight {name!r} does not hold the int8 codes of the network")
        first = "Cast" if decoded else "DequantizeLinear"
        if readers[name] != [first]:
            raise ExportError(f"weight {name!r} is read by {readers[name]}, not {first}")
    if model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise ExportError("the batch dimension is not dynamic")
    if decoded:
        _decoders(model, weights, readers)


def _decoders(
    model: onnx.ModelProto, weights: dict[str, NDArray[np.int8]], readers: dict[str, list[str]]
) -> None:
    names = [f"{layer}.weight.read" for layer in weights]
    found = runtime.build(runtime.constant_part(model, [], names)).run(names, {})
    for name, expected, actual in zip(names, weights.values(), found, strict=True):
        if readers[name] != ["DequantizeLinear"]:
            raise ExportError(f"{name!r} is read by {readers[name]}, not DequantizeLinear")
        if actual.dtype != np.int8 or not np.array_equal(actual, expected):
            raise ExportError(f"the decoder of {name!r} does not read the codes of the network")


def tflite_codes(raw: bytes, model: onnx.ModelProto) -> None:
    """A TFLite file has the weights and biases of the QDQ file, code by code; else ExportError."""
    stored = {t.name: t for t in model.graph.initializer}
    found = tflite.codes(raw)
    missing = {name for name in stored if name.endswith((".weight", ".bias"))} - found.keys()
    wrong = [n for n, a in found.items() if not np.array_equal(a, numpy_helper.to_array(stored[n]))]
    if missing or wrong:
        raise ExportError(
            f"model.tflite does not hold the codes of the network: {', '.join([*missing, *wrong])}"
        )


def _islands(graph: onnx.GraphProto) -> list[Counter[str]]:
    """The kinds of the nodes of each connected part of a graph that lies between integer operators
    and conversions."""
    part: dict[str, Counter[str]] = {}  # by the name of a tensor
    for node in graph.node:
        if node.op_type in INTEGER | {"QuantizeLinear", "DequantizeLinear"}:
            continue
        met = {id(part[name]): part[name] for name in node.input if name in part}
        joined = sum([*met.values(), Counter([node.op_type])], Counter())
        part |= {name: joined for name, old in part.items() if id(old) in met}
        part |= dict.fromkeys(node.output, joined)
    return list({id(nodes): nodes for nodes in part.values()}.values())


def integer_kernels(model: bytes) -> dict[str, int]:
    """Kernels of the graph that onnxruntime runs; ExportError names every one that is neither
    integer nor in `MOVING` or `FLOAT`, nor belongs to one of `ISLANDS`."""
    optimized = runtime.optimized(model)
    kernels = runtime.count(optimized)
    wrong: Counter[str] = Counter()
    for nodes in _islands(optimized.graph):
        computing = Counter({op: n for op, n in nodes.items() if op not in MOVING | FLOAT})
        if not any(op in computing and computing <= whole for op, whole in ISLANDS.items()):
            wrong += computing
    if wrong:
        named = ", ".join(f"{n} x {op}" for op, n in wrong.items())
        raise ExportError(f"onnxruntime keeps float kernels where integer ones must stand: {named}")
    return kernels


def same_kernels(model: bytes, expected: dict[str, int]) -> None:
    """ExportError unless onnxruntime folds all decoders, so that just these kernels are left."""
    kernels = runtime.kernels(model)
    if kernels != expected:
        more = {op: n - expected.get(op, 0) for op, n in kernels.items()}
        named = ", ".join(f"{n:+} x {op}" for op, n in more.items() if n)
        raise ExportError(f"onnxruntime does not fold the decoders of the weights: {named}")
