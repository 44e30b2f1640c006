"""A float ONNX file as the start: static quantization by onnxruntime, without PyTorch.

The file goes on to `inject`, `report` and `gate`. Stages 1 to 3 need the network in PyTorch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import version_converter

from resq_deploy import artifacts, runtime, seeds
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.metrics import top1

OPSET, IR_VERSION = 19, 10
"""Older files are converted to this opset: per-channel scales came with 13."""
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
             "MatMulInteger", "DynamicQuantizeLinear")  # fmt: skip
FLOAT_KERNELS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul",
                 "FusedMatMul")  # fmt: skip
"""Kernels with weights that should have become integer ones."""


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime.quantization advises through the root logger; the advice is followed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def read(path: Path) -> onnx.ModelProto:
    """A float ONNX file, at opset 13 or newer, weights as constants; InputError for another."""
    model = runtime.parse_model(runtime.read_model(path), str(path))
    found = {node.op_type for node in model.graph.node}.intersection(QUANTIZED)
    if found:
        raise InputError(f"{path} is quantized already ({', '.join(sorted(found))}); a float model "
                         "expected. `resq-deploy inject` takes the file as it is")  # fmt: skip
    stored = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    del model.graph.input[:]  # of old files: weights among the inputs are no constants
    model.graph.input.extend(inputs)
    opset = {o.domain: o.version for o in model.opset_import}.get("", 0)
    if opset < 13:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:  # onnx's exceptions share no base class
            raise InputError(
                f"{path} has opset {opset} and cannot be converted to {OPSET}: "
                f"{str(error).splitlines()[0]}; export it again with opset 13 or newer"
            ) from None
    model.ir_version = IR_VERSION
    return model


def _batches(x: NDArray[Any], session: Any) -> Iterator[dict[str, NDArray[Any]]]:
    want = session.get_inputs()[0]
    fixed = want.shape[0] if isinstance(want.shape[0], int) else None
    size = fixed or runtime.CHUNK
    for start in range(0, len(x) - (fixed or 1) + 1, size):
        yield {want.name: x[start : start + size]}


def choose(images: Dataset, n: int) -> Dataset:
    """`n` images drawn without replacement, always the same; all when there are fewer."""
    order = seeds.stream(0, "calibration").permutation(len(images))
    return images.take(order[:n])


def quantize(model: Path, images: Dataset, *, out: Path) -> dict[str, Any]:
    """Write OUT, an int8 QDQ file, with a JSON sidecar; returns what the sidecar holds.

    Weights become int8, symmetric, per channel, biases int32; activations uint8, with the range
    that they have on `images`. The same model and images give the same bytes. Raises InputError
    when `model` is not a float classifier for such images, or quantized already.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, batches: Iterator[dict[str, NDArray[Any]]]) -> None:
            self.batches = batches

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.batches, None)

    source = read(model)
    before = runtime.session(source.SerializeToString(), threads=0)
    x = runtime.adapt(images.x, before)
    if x.dtype.kind != "f":
        raise InputError(f"the input of {model} takes {x.dtype}; a float model expected")
    scores = runtime.run(before, x)
    with TemporaryDirectory() as folder, _quiet():
        folded, made = Path(folder) / "folded.onnx", Path(folder) / "made.onnx"
        try:
            # Batch norm goes into the convolutions here. Symbolic shapes would need sympy.
            quant_pre_process(source, folded, skip_symbolic_shape=True)
            quantization.quantize_static(
                folded, made, Reader(_batches(x, before)),
                quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        except Exception as error:  # onnxruntime's exceptions share no base class
            line = " ".join(str(error).split())[:300]
            raise InputError(f"onnxruntime cannot quantize {model}: {line}") from None
        result = onnx.load(made)
    result.ir_version, result.producer_name, result.producer_version = IR_VERSION, "resq-deploy", ""
    del result.metadata_props[:]
    for node in result.graph.node:
        node.doc_string = ""
    raw = result.SerializeToString(deterministic=True)
    kernels = runtime.kernels(raw)
    right = top1(scores) == images.y
    after = top1(runtime.run(runtime.session(raw, threads=0), x))
    artifacts.write(out, lambda path: path.write_bytes(raw))
    return artifacts.seal(
        out,
        {"model_sha256": artifacts.sha256(model), "calibration_sha256": images.sha256},
        n_images=len(images),
        n_correct={"float": int(right.sum()), "int8": int((after == images.y).sum())},
        n_top1_equal=int((after == top1(scores)).sum()),
        kernels=kernels,
        float_kernels={op: n for op, n in kernels.items() if op in FLOAT_KERNELS},
    )
