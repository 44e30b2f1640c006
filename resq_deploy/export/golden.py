"""Golden vectors: images with the outputs that a client of the exported file must give.

Clients differ where a value lies exactly between two codes (ties: to even, or away from zero) and
where it lies outside of the range. So the images are chosen among test images and extreme patterns
such that as many quantizers of the network as possible meet a tie or saturate, and beside them
stands a table of single roundings with ties and saturation for every quantizer.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy import quantize, runtime
from resq_deploy.errors import ExportError

VECTORS = 16
"""Images, where they are small ..."""
INPUT_BYTES = 2**16
"""... and so many bytes of them, but at least FEWEST images, where they are not."""
FEWEST = 4
CANDIDATES = 64
"""Test images to choose from."""
CHUNK = 8
"""Images whose values at all quantizers are in memory together."""

TOLERANCES = {
    "float-channel": {"onnxruntime": 2, "onnx ReferenceEvaluator": 2, "qonnx": 2, "LiteRT": 2},
    # not 0: the exp and erf of softmax and GELU are a client's own
    "po2-channel": {"onnxruntime": 2, "onnx ReferenceEvaluator": 2, "qonnx": 2, "LiteRT": 2},
    "asymmetric-tensor": {"onnxruntime": 2, "onnx ReferenceEvaluator": 2, "qonnx": 2},
    "po2-tensor": {
        "onnxruntime": 0, "onnx ReferenceEvaluator": 0, "qonnx": 0, "LiteRT": 2, "hls4ml": 0,
    },
}  # fmt: skip
"""By profile and client: by how many steps of the output code it may be off on any vector."""

EVENTS = ("tie", "saturated_low", "saturated_high")
"""What may happen to a value at a quantizer."""
STEPS = (-1000.0, -1.0, -0.5, 0.5, 1.5, 2.5, 3.5, 126.5, 127.5, 253.5, 254.5, 255.5, 256.0, 1000.0)
"""Codes, before rounding and saturation, of the table of roundings."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Roundings:
    """Values (n,) and the codes that quantizers of the model must make of them."""

    value: Float32
    scale: Float32
    zero_point: NDArray[np.int32]
    code: NDArray[np.uint8]

    def events(self) -> NDArray[np.bool_]:
        """(n, 3): which of EVENTS each is."""
        return events(self.value / self.scale, self.zero_point)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Images and outputs, in onnxruntime with all optimizations, of the exported file."""

    x: NDArray[np.uint8]
    """(N, C, H, W) pixels."""
    outputs: Float32
    """(N, n_classes) logits = (code - zero point) * scale, exactly."""
    codes: NDArray[np.uint8]
    """(N, n_classes)."""
    scale: float
    zero_point: int
    provoked: NDArray[np.bool_]
    """(n_quantizers, 3): which of EVENTS some image causes at which quantizer."""
    roundings: Roundings
    tolerances: dict[str, int]
    """By client, in output steps."""

    @property
    def tolerance(self) -> int:
        """Output steps that no client may exceed."""
        return max(self.tolerances.values())

    def facts(self) -> dict[str, Any]:
        """What the manifest says of them."""
        table = self.roundings.events()
        return {
            "n_vectors": len(self.x),
            "n_quantizers": len(self.provoked),
            "quantizers_with": dict(zip(EVENTS, self.provoked.sum(axis=0).tolist(), strict=True)),
            "n_roundings": len(table),
            "roundings_with": dict(zip(EVENTS, table.sum(axis=0).tolist(), strict=True)),
            "tolerance_steps": self.tolerances,
        }

    def npz(self) -> bytes:
        """The vectors as a NumPy archive; the same vectors give the same bytes."""
        file = io.BytesIO()
        table = {f"rounding_{name}": values for name, values in vars(self.roundings).items()}
        np.savez(
            file, x=self.x, codes=self.codes, outputs=self.outputs,
            scale=np.float32(self.scale), zero_point=np.int32(self.zero_point), **table,
        )  # fmt: skip
        return file.getvalue()

    def steps(self, outputs: NDArray[Any]) -> int:
        """How many output steps other outputs (N, n_classes) are off at most."""
        distance = np.abs(outputs.astype(np.float64) - self.outputs) / self.scale
        return int(np.rint(distance).max())


def events(steps: Float32, zero_point: Any) -> NDArray[np.bool_]:
    """(..., 3): which of EVENTS happen to values that are `steps` scales large, in uint8."""
    code = np.rint(steps) + zero_point
    tie = np.abs(steps - np.trunc(steps)) == 0.5
    return np.stack([tie, code < 0, code > 255], axis=-1)


@dataclass(frozen=True, kw_only=True)
class _Quantizer:
    """A QuantizeLinear of the network: one scale, uint8 codes."""

    value: str
    scale: np.float32
    zero_point: int


def _quantizers(model: onnx.ModelProto) -> list[_Quantizer]:
    """Those of values that depend on the image, in the order of the graph."""
    stored = {t.name: t for t in model.graph.initializer}
    reached = {value.name for value in model.graph.input}
    found = []
    for node in model.graph.node:
        if reached.isdisjoint(node.input):
            continue
        reached.update(node.output)
        if node.op_type == "QuantizeLinear":
            scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            if zero.dtype != np.uint8 or scale.size != 1:
                raise ExportError(f"{node.name} does not quantize to uint8 with one scale")
            found.append(
                _Quantizer(value=node.input[0], scale=np.float32(scale), zero_point=int(zero))
            )
    return found


def _provoked(
    model: onnx.ModelProto, quantizers: list[_Quantizer], x: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """(N, n_quantizers, 3): which of EVENTS each image causes, as the file defines the network."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = list(dict.fromkeys(q.value for q in quantizers))
    inputs = {value.name for value in model.graph.input}
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in inputs)
    session = runtime.build(probe.SerializeToString(), level="off")
    asked = [output.name for output in session.get_outputs()]
    found = []
    for start in range(0, len(x), CHUNK):
        fed = runtime.adapt(x[start : start + CHUNK], session)
        source = session.get_inputs()[0].name
        values = dict(zip(asked, session.run(asked, {source: fed}), strict=True)) | {source: fed}
        found.append(
            np.stack(
                [
                    events(values[q.value] / q.scale, q.zero_point)
                    .reshape(len(fed), -1, len(EVENTS))
                    .any(axis=1)
                    for q in quantizers
                ],
                axis=1,
            )
        )
    return np.concatenate(found)


def _candidates(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Test images, then patterns that drive the network to its limits."""
    shape = images.shape[1:]
    board = np.indices(shape).sum(axis=0) % 2 * 255
    ramp = np.broadcast_to(np.linspace(0, 255, shape[-1]), shape)
    noise = np.random.default_rng(0).choice(np.array([0, 255]), (4, *shape))
    extreme = [np.zeros(shape), np.full(shape, 255), board, 255 - board, ramp, 255 - ramp, *noise]
    return np.concatenate([images[:CANDIDATES], np.stack(extreme).astype(np.uint8)])


def choose(provoked: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
    """Numbers of n images, ascending, that cause as many events as possible (greedily); the first
    images where that needs fewer."""
    left, chosen = provoked.reshape(len(provoked), -1).copy(), list[int]()
    while len(chosen) < n:
        gain = left.sum(axis=1)
        best = int(gain.argmax())
        if not gain[best]:
            break
        chosen.append(best)
        left &= ~left[best]
    rest = [i for i in range(len(provoked)) if i not in chosen]
    return np.sort(np.array(chosen + rest[: n - len(chosen)], np.int64))


def _roundings(quantizers: list[_Quantizer]) -> Roundings:
    """STEPS at every quantizer, without those that are not exact in float32."""
    values, scales, zeros, codes = [], [], [], []
    for scale, zero in dict.fromkeys((q.scale, q.zero_point) for q in quantizers):
        steps = np.array(STEPS, np.float32) - np.float32(zero)
        value = steps * scale
        value = value[value / scale == steps]
        values.append(value)
        scales.append(np.full(len(value), scale))
        zeros.append(np.full(len(value), zero, np.int32))
        codes.append(quantize.quantize(value, scale, zero, dtype=np.uint8))
    return Roundings(
        value=np.concatenate(values),
        scale=np.concatenate(scales),
        zero_point=np.concatenate(zeros),
        code=np.concatenate(codes),
    )


def make(model: onnx.ModelProto, images: NDArray[np.uint8], *, profile: str) -> Golden:
    """Vectors of a QDQ model, chosen from `images` (N, C, H, W) and extreme patterns.

    ExportError when an output is not exactly (code - zero point) * scale.
    """
    quantizers = _quantizers(model)
    candidates = _candidates(images)
    n = min(VECTORS, max(FEWEST, INPUT_BYTES // candidates[0].size))
    provoked = _provoked(model, quantizers, candidates)
    chosen = choose(provoked, n)
    x = candidates[chosen]
    session = runtime.session(model.SerializeToString())
    outputs = runtime.run(session, runtime.adapt(x, session))
    last = quantizers[-1]
    codes = quantize.quantize(outputs, last.scale, last.zero_point, dtype=np.uint8)
    if not np.array_equal(quantize.dequantize(codes, last.scale, last.zero_point), outputs):
        raise ExportError("the outputs of the file are not on the grid of its last quantizer")
    return Golden(
        x=x,
        outputs=outputs,
        codes=codes,
        scale=float(last.scale),
        zero_point=last.zero_point,
        provoked=np.asarray(provoked[chosen].any(axis=0)),
        roundings=_roundings(quantizers),
        tolerances=TOLERANCES[profile],
    )
