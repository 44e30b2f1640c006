"""A float ONNX file made to bear faults: how its weights are stored, how activations are bounded.

A float that loses a bit of its exponent can become 1e38. Nothing here trains. Weights may be read
through a saturated activation function (Fuengfusin and Tamukoh, arXiv 2411.19027): a file that
stores v and computes with w = bound tau(v) cannot read more than the bound of a tensor, whatever
is flipped short of a NaN, and v = tau^-1(w / bound) keeps the network as it is (the paper also
trains with tau in place). Or they are multiplied before they are stored and divided when they are
read (weight scaling, the same authors, arXiv 2411.18993). Activations may be bounded behind every
ReLU (`bounds`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import artifacts, bounds, progress, runtime, static
from resq_deploy.bounds.search import search
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.inject import discovery

Real = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Tau:
    """A saturated activation function: the operator `op` of `slope` v, which ends at `bound`."""

    op: str
    inverse: Callable[[Real], Real]
    """Of the operator."""
    bound: float = 1.0
    slope: float = 1.0
    attributes: tuple[float, ...] = ()
    """More inputs of the operator."""
    finite: bool = False
    """The operator makes NaN of infinity, which must be cut off before it."""


TAUS = {
    "tanh": Tau(op="Tanh", inverse=np.arctanh),
    "arctan": Tau(op="Atan", inverse=np.tan, bound=np.pi / 2),
    "softsign": Tau(op="Softsign", inverse=lambda y: y / (1 - np.abs(y)), finite=True),
    "hardtanh": Tau(op="Clip", inverse=lambda y: y, attributes=(-1.0, 1.0)),
    "lecun-tanh": Tau(op="Tanh", inverse=np.arctanh, slope=2 / 3),
}
"""The functions of `encoding.saf`; the factor in front of the last is part of the tensor's own."""

READINGS = ("plain", "scaled", *TAUS)
FORMAT = re.compile(r"float32|float16|q(?P<m>[0-7])\.(?P<n>[0-7])")

ROOM = 1.02
"""The bound of a tensor, relative to max|w|: the inverse of tau at its bound is infinite."""
TOP = {"float32": 126, "float16": 14}
"""Scaled weights lie below 2 to this power, unless told: next to the end of the format, so that
what is finite is read as 8 max|w| at most."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A number format, and what stands between the stored numbers and the weights."""

    format: str
    """float32, float16, or qM.N: int8 codes of 2^-N, of which M bits lie before the point."""
    reading: str = "plain"
    """plain; scaled; or a key of TAUS."""
    top: int | None = None
    """Scaled floats lie below 2 to this power."""

    @property
    def fraction_bits(self) -> int | None:
        """N of qM.N; None for floats."""
        found = FORMAT.fullmatch(self.format)
        return int(found["n"]) if found and found["n"] else None


def parse(name: str) -> Storage:
    """`FORMAT`, `FORMAT:READING` or `FORMAT:scaled:K`, such as float16:tanh; scaled weights then
    lie below 2 to the power of K. InputError says what there is."""
    kind, _, reading = name.partition(":")
    found = FORMAT.fullmatch(kind)
    fixed = found is not None and found["n"] is not None
    if found is None or (fixed and int(found["m"]) + int(found["n"]) != 7):
        raise InputError(
            f"format {kind!r} is unknown; expected float32, float16, or qM.N with M + N = 7, such "
            "as q2.5"
        )
    scaled = re.fullmatch(r"scaled:(-?\d{1,3})", reading)
    if scaled and not fixed and int(scaled[1]) <= {"float32": 128, "float16": 16}[kind]:
        return Storage(format=kind, reading="scaled", top=int(scaled[1]))
    if (reading or "plain") not in READINGS or (fixed and reading in TAUS):
        known = ", ".join(READINGS[:2] if fixed else (*READINGS, "scaled:K"))
        raise InputError(f"reading {reading!r} is unknown for {kind}; expected one of {known}")
    return Storage(format=kind, reading=reading or "plain", top=TOP.get(kind))


def _factor(w: Real, storage: Storage) -> float:
    """What scaled weights are multiplied by: the greatest power of two that keeps their range, and
    whose reciprocal float32 holds."""
    n = storage.fraction_bits
    top = np.log2(127 / 2**n) if n is not None else storage.top
    return float(2.0 ** min(np.floor(top - np.log2(max(np.abs(w).max(), 1e-30))), 126))


def _through(w: Real, storage: Storage) -> tuple[NDArray[Any], list[tuple[str, list[Any], Any]]]:
    """What is stored for weights, and the operators that read it: type, more inputs, attributes."""
    half, n, name = storage.format == "float16", storage.fraction_bits, storage.reading
    factor = _factor(w, storage) if name == "scaled" else 1.0
    if n is not None:
        codes = np.clip(np.rint(w * factor * 2**n), -127, 127).astype(np.int8)
        return codes, [("DequantizeLinear", [2.0**-n / factor], {})]
    steps: list[tuple[str, list[Any], Any]] = []
    if half:
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
    if name == "scaled":
        w = w * factor
        steps.append(("Mul", [1 / factor], {}))
    elif name != "plain":
        tau = TAUS[name]
        gain = max(float(np.abs(w).max()), 1e-30) * ROOM / tau.bound
        w = tau.inverse(w / gain) / tau.slope
        if tau.slope != 1:
            steps.append(("Mul", [tau.slope], {}))
        if tau.finite:
            largest = float(np.finfo(np.float32).max)
            steps.append(("Clip", [-largest, largest], {}))
        steps += [(tau.op, list(tau.attributes), {}), ("Mul", [gain], {})]
    return np.asarray(w, np.float16 if half else np.float32), steps


def store_as(model: onnx.ModelProto, storage: Storage) -> None:
    """Store the weights of a float model otherwise, in place: those that campaigns strike as the
    target `float`.

    InputError for a model without float weights.
    """
    try:
        read = {tensor.name for tensor in discovery.discover(model, ["float"]).space.tensors}
    except UnsupportedModel as error:
        raise InputError(f"no float weights to store ({error}); a float32 model expected") from None
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    if any(tensor.data_type != TensorProto.FLOAT for tensor in weights):
        raise InputError("the model has weights of float16; a float32 model expected")
    nodes: list[onnx.NodeProto] = []
    for tensor in weights:
        name = tensor.name
        stored, steps = _through(numpy_helper.to_array(tensor).astype(np.float64), storage)
        tensor.CopyFrom(numpy_helper.from_array(stored, name))
        last = name
        for i, (op, more, attributes) in enumerate(steps):
            inputs = [last]
            for j, value in enumerate(more):
                inputs.append(f"{name}.read{i}.{j}")
                constant = numpy_helper.from_array(np.array(value, np.float32), inputs[-1])
                model.graph.initializer.append(constant)
            last = f"{name}.read{i}"
            nodes.append(helper.make_node(op, inputs, [last], **attributes))
        for node in model.graph.node:
            node.input[:] = [last if x == name else x for x in node.input]
    network = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *network])
    onnx.checker.check_model(model)


def store(
    source: Path,
    *,
    out: Path,
    storage: str,
    how: str | None = None,
    images: Dataset | None = None,
    twin: Path | None = None,
    show: progress.Progress = progress.silent,
) -> dict[str, Any]:
    """Write OUT, the float ONNX file SOURCE with its weights stored as `storage` (see `parse`) and,
    with `how`, its activations bounded by their values on `images`; a JSON sidecar beside it, which
    is returned. Bounds that are `learned` need the float checkpoint of SOURCE as its `twin`.

    InputError when SOURCE is not a float classifier, and for unknown names.
    """
    made = parse(storage)
    target = "float" if made.fraction_bits is None else "weight"
    model = static.read(source)
    if how is not None and images is None:
        raise InputError("bounds of activations need images, none given; add --data DATA")
    if (how == "learned") != (twin is not None):
        raise InputError(
            "--bound learned goes with --twin CHECKPOINT, the float checkpoint that the model was "
            f"exported from; got --bound {how} and --twin {twin}"
        )
    learned = searched = None
    if how is not None and images is not None:
        bounds.bound(model, how, images)
        if twin is not None:
            from resq_deploy.bounds.learned import learn  # nothing else here needs torch

            learned = learn(model, images, twin, show=show)
    store_as(model, made)
    if how == "searched" and images is not None:
        searched = search(model, images, target)
    raw = model.SerializeToString(deterministic=True)
    artifacts.write(out, lambda path: path.write_bytes(raw))
    return artifacts.seal(
        out,
        {
            "model_sha256": artifacts.sha256(source),
            "storage": storage,
            "bound": how,
            "calibration_sha256": None if images is None else images.sha256,
            "twin_sha256": None if twin is None else artifacts.sha256(twin),
        },
        target=target,
        learned=learned,
        search=searched,
        kernels=runtime.kernels(raw),
    )
