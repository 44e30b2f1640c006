"""The guarantees of DESIGN: integer kernels, exact codes, deterministic bytes, parity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import artifacts, data, runtime
from resq_deploy.errors import ExportError, InputError
from resq_deploy.export import QDQ, QONNX, checks, export
from resq_deploy.export.qdq import qdq
from resq_deploy.export.qonnx import execute, qonnx
from resq_deploy.nets import build, checkpoint
from resq_deploy.nets.quantized import (
    calibrate,
    codes,
    encoding_of,
    quantize,
    value,
    weight_layers,
)
from resq_deploy.recipe import Export

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"opset": 19, "ir_version": 10}
CONVOLUTIONS = {"resnet8": 9, "resnet20": 21}
ADDITIONS = {"resnet8": 3, "resnet20": 9}


@pytest.fixture(scope="module", params=sorted(CONVOLUTIONS))
def net(request: pytest.FixtureRequest) -> Any:
    """Two networks for CIFAR-shaped images, calibrated, random weights."""
    net = quantize(build(request.param, n_classes=10, in_channels=3, seed=1))
    calibrate(net, torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    net.eval().resq_name = request.param
    return net


def test_every_convolution_linear_layer_and_addition_is_integer(net: Any) -> None:
    kernels = checks.integer_kernels(qdq(net, (3, 32, 32), **OPTIONS).SerializeToString())
    assert kernels["QLinearConv"] == CONVOLUTIONS[net.resq_name]
    assert kernels["QLinearAdd"] == ADDITIONS[net.resq_name]
    assert kernels["QGemm"] == 1


def test_weights_are_named_int8_initializers_behind_no_clip(net: Any) -> None:
    model = qdq(net, (3, 32, 32), **OPTIONS)
    expected = {name: codes(layer).numpy() for name, layer in weight_layers(net).items()}
    checks.structure(model, expected)
    assert not [n for n in model.graph.node if n.op_type in ("Clip", "BatchNormalization")]
    assert [i.name for i in model.graph.input] == ["input"]
    int8 = {t.name for t in model.graph.initializer
            if t.data_type == TensorProto.INT8 and len(t.dims) > 1}  # fmt: skip
    assert int8 == {f"{name}.weight" for name in expected}
    biases = [t for t in model.graph.initializer if t.name.endswith(".bias")]
    assert len(biases) == len(expected) and {t.data_type for t in biases} == {TensorProto.INT32}
    assert model.ir_version == 10 and model.opset_import[0].version == 19


def test_qonnx_has_the_same_codes_bit_widths_and_no_bias_quantizer(net: Any) -> None:
    model = qonnx(net, (3, 32, 32), **OPTIONS)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Quant":
            continue
        signed = {a.name: a.i for a in node.attribute}["signed"]
        assert int(stored[node.input[3]]) == 8  # also: no 32-bit Quant of a bias is left
        if node.input[0] in stored:
            q = np.rint(stored[node.input[0]] / stored[node.input[1]])
            assert signed == 1
            found.append(q.astype(np.int8))
    expected = [codes(layer).numpy() for layer in weight_layers(net).values()]
    assert len(found) == len(expected)
    assert all(any(np.array_equal(f, e) for f in found) for e in expected)


def test_torch_onnxruntime_and_qonnx_agree(net: Any) -> None:
    """Random weights are the hard case: logits are close together."""
    x = np.random.default_rng(0).integers(0, 256, (100, 3, 32, 32)).astype(np.uint8)
    model = qdq(net, (3, 32, 32), **OPTIONS)
    pixels = x.astype(np.float32) / 255
    with torch.no_grad():
        torch_logits = value(net(torch.from_numpy(pixels))).numpy()
    step = float(net.get_submodule("output.act_quant").scale())
    outputs = {"qonnx": execute(qonnx(net, (3, 32, 32), **OPTIONS), pixels)}
    for level in runtime.LEVELS:
        session = runtime.session(model.SerializeToString(), level=level)
        outputs[level] = runtime.run(session, runtime.adapt(x, session))
    for name, other in outputs.items():
        assert checks.parity(("torch", name), torch_logits, other, step=step).holds, name


def test_exporting_twice_from_two_folders_gives_the_same_bytes(
    tiny_run: Path, tmp_path: Path
) -> None:
    """In another process, another working directory, another hash seed."""
    code = (
        "import sys; from pathlib import Path; from resq_deploy import data; "
        "from resq_deploy.export import export; from resq_deploy.recipe import Export; "
        "export(Path(sys.argv[1]), out=Path('out'), images=data.load('digits').test, "
        "config=Export(parity_images=100))"
    )
    source = (tiny_run / "fault/checkpoint.safetensors").resolve()
    subprocess.run(
        [sys.executable, "-c", code, str(source)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
    )
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {QDQ, QONNX, "manifest.json", "weights.c", "golden.npz", "sbom.cdx.json"} <= set(made)
    for path in (tiny_run / "export/fault").iterdir():
        assert made.pop(path.name) == path.read_bytes(), path.name
    assert not made


def test_manifest_says_what_was_checked(tiny_run: Path) -> None:
    manifest = artifacts.read_json(tiny_run / "export/adjust/manifest.json")
    pairs = {(p["a"], p["b"]) for p in manifest["parity"]}
    assert pairs == {
        ("torch", "onnxruntime off"), ("torch", "onnxruntime all"), ("torch", "qonnx"),
        ("onnxruntime all", "qonnx"),
    }  # fmt: skip
    assert all(p["n_images"] == 100 for p in manifest["parity"])
    assert manifest["seed"] == 1
    assert manifest["weights"]["n_bytes"] == 19_464  # half as wide, one input channel
    assert manifest["weights"]["code_min"] >= -127


# What the checks must refuse: each case breaks one guarantee of a good file.


def _clip_behind_weight(model: onnx.ModelProto) -> None:
    reader = next(n for n in model.graph.node if "conv1.weight" in n.input)
    clip = helper.make_node("Clip", ["conv1.weight"], ["clipped"])
    reader.input[0] = "clipped"
    model.graph.node.insert(0, clip)


def _other_code(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "conv1.weight")
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] ^= 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def _weight_as_input(model: onnx.ModelProto) -> None:
    shape = next(t for t in model.graph.initializer if t.name == "conv1.weight").dims
    info = helper.make_tensor_value_info("conv1.weight", TensorProto.INT8, list(shape))
    model.graph.input.append(info)


def _fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_clip_behind_weight, r"is read by \['Clip'\]"),
        (_other_code, "does not hold the int8 codes"),
        (_weight_as_input, "is not a constant initializer"),
        (_fixed_batch, "batch dimension is not dynamic"),
    ],
)
def test_broken_structure_is_refused(net: Any, change: Any, message: str) -> None:
    model = qdq(net, (3, 32, 32), **OPTIONS)
    change(model)
    expected = {name: codes(layer).numpy() for name, layer in weight_layers(net).items()}
    with pytest.raises(ExportError, match=message):
        checks.structure(model, expected)


def test_what_brevitas_refuses_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("QuantTensor not valid\nand many more lines")

    monkeypatch.setattr("brevitas.export.export_qonnx", refuse)
    net = quantize(build("resnet8", n_classes=10, in_channels=3, seed=1))
    with pytest.raises(ExportError, match="cannot export this network: QuantTensor not valid$"):
        qdq(net, (3, 32, 32), **OPTIONS)


def test_float_kernels_are_refused_by_name() -> None:
    """A quantized input in front of a float convolution stays a float convolution."""
    weight = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    with pytest.raises(ExportError, match="1 x Conv"):
        checks.integer_kernels(model.SerializeToString())


@pytest.mark.parametrize(
    ("operators", "refused"),
    [
        (["Sqrt", "Relu"], None),
        (["Exp"], None),
        (["Neg"], "1 x Neg"),
        (["Sqrt", "Exp"], "1 x Sqrt, 1 x Exp"),
        (["Sqrt", "Sqrt"], "2 x Sqrt"),
    ],
)
def test_parts_of_a_norm_stand_together_only(operators: list[str], refused: str | None) -> None:
    """What LayerNorm and softmax are made of is no licence for other float operators."""
    names = ["q", *"abcdefg"[: len(operators)], "r"]
    nodes = [helper.make_node("DequantizeLinear", ["x", "scale"], ["q"])]
    nodes += [
        helper.make_node(op, [i], [o])
        for op, i, o in zip(operators, names, names[1:-1], strict=False)
    ]
    nodes.append(helper.make_node("QuantizeLinear", [names[-2], "scale", "zero"], ["r"]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", 8])],
        [helper.make_tensor_value_info("r", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.float32(0.5), "scale"),
         numpy_helper.from_array(np.uint8(0), "zero")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    if refused is None:
        checks.integer_kernels(model.SerializeToString())
    else:
        with pytest.raises(ExportError, match=f"{refused}$"):
            checks.integer_kernels(model.SerializeToString())


@pytest.mark.parametrize(
    ("a", "b", "holds"),
    [
        ([[0.0, 5.0]], [[0.0, 5.0]], True),
        ([[0.0, 5.0]], [[0.0, 6.0]], False),  # one step, but on 1 of 1 images: see below
        ([[0.0, 5.0]], [[0.0, 8.0]], False),
        ([[0.0, 3.0]], [[3.0, 0.0]], False),
    ],
    ids=["equal", "two steps everywhere", "three steps", "decided arg max differs"],
)
def test_parity_limits(a: list[list[float]], b: list[list[float]], holds: bool) -> None:
    scale = 0.5  # so that 1.0 is two steps
    result = checks.parity(("a", "b"), np.array(a), np.array(b), step=scale)
    assert result.holds is holds
    if not holds:
        with pytest.raises(ExportError, match="a and b disagree"):
            checks.require([result])


def test_one_step_is_allowed_and_undecided_arg_maxes_may_differ() -> None:
    a, b = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    result = checks.parity(("a", "b"), a, b, step=1.0)
    assert result.holds and result.argmax_equal == 0 and result.argmax_decided == 0


def test_failing_export_leaves_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, save: Any, real: Any = artifacts.write) -> Path:
        if path.name == "weights.c":
            path.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        return Path(real(path, save))

    monkeypatch.setattr(artifacts, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export(
            tiny_run / "fault/checkpoint.safetensors", out=tmp_path / "out",
            images=data.load("digits").test, config=Export(parity_images=100),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind"), [("baseline", "plain"), ("hardened", "cosq:0.02")], ids=lambda v: v
)
def test_the_reference_checkpoints_of_the_workspace_can_be_exported(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Their sidecars belong to them, and their codes are levels of their encoding."""
    path = ROOT / f"models/cifar10-resnet20-cosq.{name}.safetensors"
    assert artifacts.read_json(artifacts.sidecar(path))["sha256"] == artifacts.sha256(path)
    net, _ = checkpoint.load(path)
    encoding = encoding_of(net)
    assert encoding.name == kind
    for layer in weight_layers(net).values():
        assert np.isin(codes(layer).numpy(), encoding.levels).all()
    noise = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32)).astype(np.uint8)
    images = data.Dataset(name="noise", x=noise, y=np.zeros(50, np.int64))
    model = export(path, out=tmp_path / "bundle", images=images)
    assert checks.integer_kernels(model.read_bytes())["QLinearConv"] == CONVOLUTIONS["resnet20"]


def test_float_checkpoint_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a float checkpoint; export needs an int8 one"):
        export(tiny_run / "float/checkpoint.safetensors", out=tmp_path / "o",
               images=data.load("digits").test)  # fmt: skip
    assert checkpoint.load(tiny_run / "float/checkpoint.safetensors")[1]["quantized"] is False
