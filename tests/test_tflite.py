"""The TFLite file: the codes of the QDQ file in another layout, and the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import living
import numpy as np
import onnx
import pytest
from living import images
from onnx import TensorProto, helper, numpy_helper
from tflite_numpy import OPERATORS, Interpreter

from resq_deploy import artifacts, data, runtime
from resq_deploy.errors import ExportError
from resq_deploy.export import TFLITE, checks, export
from resq_deploy.export.qdq import qdq
from resq_deploy.export.tflite import Unsupported, codes, tflite
from resq_deploy.recipe import Export

OPTIONS = {"opset": 19, "ir_version": 10}
SUPPORTED: dict[str, tuple[float, str]] = {
    "resnet8": (0.5, "float-channel"),
    "resnet20": (0.5, "float-channel"),
    "resnet18": (0.125, "float-channel"),
    "vgg16": (0.125, "float-channel"),
    "mobilenetv2": (0.125, "po2-channel"),
}
"""Networks, a width at which they are small, and the profile of their recipes."""


@pytest.fixture(scope="module", params=SUPPORTED)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    width, profile = SUPPORTED[request.param]
    net = living.network(request.param, width, profile=profile)
    return qdq(net, (3, 32, 32), **OPTIONS)


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def output_codes(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """int8 output codes of the QDQ model in onnxruntime."""
    last = next(n for n in model.graph.node if n.output[0] == "logits")
    session = runtime.session(model.SerializeToString(), level="off")
    logits = runtime.run(session, runtime.adapt(x, session))
    return np.rint(logits / float(stored(model)[last.input[1]])).astype(int)


def int8_nhwc(x: np.ndarray) -> np.ndarray:
    return (x.transpose(0, 2, 3, 1).astype(np.int16) - 128).astype(np.int8)


def test_codes_are_those_of_the_qdq_file(model: onnx.ModelProto) -> None:
    raw, expected = tflite(model), stored(model)
    assert raw == tflite(model)
    wanted = {name for name in expected if name.endswith((".weight", ".bias"))}
    found = codes(raw)
    assert set(found) == wanted
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and np.array_equal(array, expected[name])


def test_it_computes_the_same_network(model: onnx.ModelProto) -> None:
    """Layouts, paddings, scales and options, by the second reading in tflite_numpy.

    One step: float64 here, float32 in onnxruntime, so near-ties may round otherwise. In a deep
    network (MobileNetV2) one such code moves others; with powers of two there are none.
    """
    x = images(2)
    first = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    pixels = np.rint(x / 255 / float(stored(model)[first.input[1]])).clip(0, 255).astype(np.uint8)
    difference = Interpreter(tflite(model)).run(int8_nhwc(pixels)) - output_codes(model, x)
    assert np.abs(difference).max() <= 1
    assert (difference == 0).mean() > 0.9


# --------------------------------------------------------------------------- small graphs


def graph(nodes: list, tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> onnx.ModelProto:
    """A QDQ graph: pixels -> `q`, then `nodes`, which end in the float tensor `y`."""
    constants = {"one": np.float32(1 / 255), "zero": np.uint8(0), "half": np.float32(0.02),
                 "mid": np.uint8(128), **tensors}  # fmt: skip
    all_nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        *nodes,
        helper.make_node("QuantizeLinear", ["y", "half", "mid"], ["out"]),
        helper.make_node("DequantizeLinear", ["out", "half", "mid"], ["logits"]),
    ]
    made = helper.make_graph(
        all_nodes, "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def dq(x: str, out: str, scale: str = "one", zero: str = "zero") -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [x, scale, zero], [out])


def conv(x: str, out: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [
        dq("w", "wf", "ws", "wz"), dq("b", "bf", "bs", "bz"),
        helper.make_node("Conv", [x, "wf", "bf"], [out], "conv", **attributes),
    ]  # fmt: skip


def weights(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng, scale = np.random.default_rng(2), np.float32(0.01)
    return {
        "w": rng.integers(-127, 128, shape).astype(np.int8), "ws": scale, "wz": np.int8(0),
        "b": rng.integers(-9, 9, shape[0]).astype(np.int32), "bs": np.float32(scale / 255),
        "bz": np.int32(0),
    }  # fmt: skip


def signed(pads: list[int]) -> list[onnx.NodeProto]:
    """A convolution whose signed result, 128 in the middle, goes through max pooling."""
    return [
        dq("q", "f"), *conv("f", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "half", "mid"], ["cq"]),
        helper.make_node("MaxPool", ["cq"], ["m"], "pool", kernel_shape=[3, 3], strides=[2, 2],
                         pads=pads),
        helper.make_node("Flatten", ["m"], ["flat"], "flatten", axis=1),
        dq("flat", "y1", "half", "mid"), dq("v", "vf", "ws", "wz"), dq("d", "df", "ds", "bz"),
        helper.make_node("Gemm", ["y1", "vf", "df"], ["y"], "fc", transB=1),
    ]  # fmt: skip


PLANE = {"CONV_2D", "MAX_POOL_2D", "TRANSPOSE", "RESHAPE", "FULLY_CONNECTED"}


@pytest.mark.parametrize(
    ("pads", "operators"),
    [([1, 1, 1, 1], {*PLANE, "PADV2"}), ([0, 0, 0, 0], PLANE)],
    ids=["padded with the lowest code", "not padded"],
)
def test_signed_max_pooling_and_flattening_of_a_plane(pads: list[int], operators: set[str]) -> None:
    side = 4 if any(pads) else 3
    tensors = weights((2, 1, 3, 3)) | {
        "v": np.random.default_rng(3).integers(-9, 9, (3, 2 * side**2)).astype(np.int8),
        "d": np.array([5, -5, 0], np.int32), "ds": np.float32(0.01 * 0.02),
    }  # fmt: skip
    tensors["b"] = tensors["b"] - 40_000  # everything is negative: a pad of 0 would win
    model = graph(signed(pads), tensors, (1, 8, 8))
    x = images(2)[:, :1, :8, :8]
    interpreter = Interpreter(tflite(model))
    expected = output_codes(model, x)
    assert np.array_equal(interpreter.run(int8_nhwc(x)), expected) and np.ptp(expected) > 9
    model_codes = interpreter.model.OperatorCodes
    used = map(model_codes, range(interpreter.model.OperatorCodesLength()))
    assert {OPERATORS[code.BuiltinCode()] for code in used} == operators


@pytest.mark.parametrize(
    ("nodes", "tensors", "message"),
    [
        ([dq("q", "f"), helper.make_node("Sigmoid", ["f"], ["y"], "gate")], {},
         "cannot hold Sigmoid 'gate': supported are Add, Conv"),
        ([dq("q", "f"), *conv("f", "y", group=2)], weights((4, 2, 3, 3)), "2 groups of 4 channels"),
        ([dq("q", "f"), *conv("f", "y", auto_pad="SAME_UPPER")], weights((4, 4, 3, 3)), "auto_pad"),
        ([dq("q", "f"), *conv("f", "y")], weights((4, 4, 3, 3)) | {"wz": np.int8(1)},
         "'w' has a zero point that is not 0"),
        ([dq("q", "f"), *conv("f", "y")], weights((4, 4, 3, 3)) | {"mid": np.int8(0)},
         "one uint8 zero point expected, got 1 int8"),
        ([helper.make_node("Identity", ["w"], ["w2"], "decode"), dq("q", "f"), dq("w2", "wf", "ws",
          "wz"), dq("b", "bf", "bs", "bz"), helper.make_node("Conv", ["f", "wf", "bf"], ["y"])],
         weights((4, 4, 3, 3)), "Identity 'decode': its output would have to be computed when"),
        ([dq("q", "f"), dq("q", "g"), helper.make_node("Add", ["f", "input"], ["y"], "add")], {},
         "Add 'add': its input 'input' is not quantized"),
    ],
    ids=["operator", "groups", "auto_pad", "zero point", "int8", "decoder", "float input"],
)  # fmt: skip
def test_what_has_no_exact_form_is_refused_by_name(
    nodes: list, tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(Unsupported, match=r"^model.tflite cannot hold") as caught:
        tflite(graph(nodes, tensors, (4, 8, 8)))
    assert message in str(caught.value)


def test_other_codes_are_refused(model: onnx.ModelProto) -> None:
    raw = tflite(model)
    weight = next(t for t in model.graph.initializer if t.name.endswith(".weight"))
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    target = next(t for t in changed.graph.initializer if t.name == weight.name)
    array = numpy_helper.to_array(target).copy()
    array.flat[0] ^= 1
    target.CopyFrom(numpy_helper.from_array(array, target.name))
    with pytest.raises(ExportError, match=f"codes of the network: {weight.name}"):
        checks.tflite_codes(raw, changed)


def test_export_writes_it_where_possible_and_refuses_where_it_is_required(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = artifacts.read_json(tiny_run / "export/adjust/manifest.json")
    assert manifest["tflite"]["written"] is True
    assert artifacts.sha256(tiny_run / "export/adjust" / TFLITE) == manifest["files"][TFLITE]

    def refuse(model: onnx.ModelProto) -> bytes:
        raise Unsupported("model.tflite cannot hold Sigmoid")

    monkeypatch.setattr("resq_deploy.export.tflite", refuse)
    source, digits = tiny_run / "fault/checkpoint.safetensors", data.load("digits").test
    with pytest.raises(Unsupported):
        export(source, out=tmp_path / "o", images=digits,
               config=Export(parity_images=10, tflite="required"))  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    export(source, out=tmp_path / "o", images=digits, config=Export(parity_images=10))
    assert not (tmp_path / "o" / TFLITE).exists()
    manifest = artifacts.read_json(tmp_path / "o/manifest.json")
    assert manifest["tflite"]["reason"] == "model.tflite cannot hold Sigmoid"
