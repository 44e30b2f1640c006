"""A float ONNX file as the start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from models import data as images
from models import float_resnet
from resq_deploy import artifacts, static
from resq_deploy.cli import main
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject import inject


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "float.onnx"
    path.write_bytes(float_resnet().SerializeToString())
    return path


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    found = images(dtype=np.uint8)
    np.savez(tmp_path / "pixels.npz", x=found.x, y=found.y)
    return tmp_path / "pixels.npz"


def test_every_layer_is_integer_and_the_answers_stay(source: Path, tmp_path: Path) -> None:
    found = static.quantize(source, images(), out=tmp_path / "q.onnx")
    assert [found["kernels"].get(k) for k in ("QLinearConv", "QGemm", "QLinearAdd")] == [2, 1, 1]
    assert found["float_kernels"] == {}
    assert found["n_images"] == 23 and found["n_top1_equal"] >= 20
    stored = {t.name: t for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    weights = [t for t in stored.values() if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert sorted(int(np.prod(t.dims)) for t in weights) == [16, 36, 144]
    for weight in weights:
        scale = stored[weight.name.removesuffix("_quantized") + "_scale"]
        assert list(scale.dims) == [weight.dims[0]], "a scale per channel"


def test_batch_norm_of_an_old_file_is_folded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(0, 1, (3, 1, 3, 3)), "g": [2.0, 1, 3], "b": [0.1, 0, 0.3],
               "m": [0.0, 1, 2], "v": [1.0, 2, 3]}  # fmt: skip
    stored = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in tensors.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        helper.make_node("GlobalAveragePool", ["n"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 6, 6])]
    # an old exporter's file: weights among the inputs, too old for scales per channel
    given += [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.dims) for t in stored]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph(nodes, "bn", given, result, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    (tmp_path / "bn.onnx").write_bytes(model.SerializeToString())
    found = static.quantize(tmp_path / "bn.onnx", images(), out=tmp_path / "q.onnx")
    assert found["kernels"]["QLinearConv"] == 1 and "BatchNormalization" not in found["kernels"]


def test_both_engines_give_the_same_campaign(source: Path, tmp_path: Path) -> None:
    static.quantize(source, images(), out=tmp_path / "q.onnx")
    found = [
        inject(tmp_path / "q.onnx", images(), out=tmp_path / f"{e}.store", trials=30, engine=e)
        for e in ("fast", "reload")
    ]
    assert found[0]["outcomes"] == found[1]["outcomes"]
    assert found[0]["fault_accuracy"] == found[1]["fault_accuracy"]


def test_the_same_bytes_in_another_process_without_torch(
    source: Path, pixels: Path, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    arguments = ["quantize", str(source), "--data", str(pixels), "--images", "20", "--out"]
    result = CliRunner().invoke(main, [*arguments, str(a), "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert "QLinearConv" in result.output and "/20 in int8" in result.output
    code = (
        "import sys\nfrom importlib.abc import MetaPathFinder\n"
        "class Absent(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'sympy'): raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from resq_deploy.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", code, *arguments, str(b)], check=True)
    assert artifacts.sha256(a) == artifacts.sha256(b)
    assert json.loads((tmp_path / "a.json").read_text())["sha256"] == artifacts.sha256(a)


def test_what_cannot_be_quantized_is_named_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    static.quantize(source, images(), out=tmp_path / "q.onnx")
    cases = [
        (tmp_path / "q.onnx", images(), "quantized already .*inject"),
        (source, Dataset(name="x", x=np.zeros((4, 3, 6, 6), np.uint8), y=np.arange(4)), "takes"),
        (tmp_path / "none.onnx", images(), "cannot be read"),
    ]
    for model, given, message in cases:
        with pytest.raises(InputError, match=message):
            static.quantize(model, given, out=tmp_path / "out" / "bad.onnx")
    assert not (tmp_path / "out").exists()
