"""The wheel: only the package inside, and fault campaigns without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    # hatchling comes with [dev], so that nothing is fetched here
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (t for t in tops if t.endswith(".dist-info"))
    assert tops == {"resq_deploy", info}
    here = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "resq_deploy").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {n for n in names if n.startswith("resq_deploy/")} == here
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {n.rpartition("/")[2]: n for n in archive.namelist() if ".dist-info/" in n}
    meta = Parser().parsestr(archive.read(read["METADATA"]).decode())
    assert meta["Name"] == "resq-deploy" and meta["Requires-Python"] == ">=3.11"
    wanted = meta.get_all("Requires-Dist") or []
    core = [line for line in wanted if "extra ==" not in line]
    for heavy in ("torch", "brevitas", "qonnx", "scikit-learn", "matplotlib"):
        assert not any(line.startswith(heavy) for line in core)
        assert any(line.startswith(heavy) for line in wanted)
    assert {"train", "report", "attack", "dask", "dev"} <= set(meta.get_all("Provides-Extra") or [])
    entry = archive.read(read["entry_points.txt"]).decode()
    assert "resq-deploy = resq_deploy.cli:main" in entry


def test_sdist_holds_the_workspace(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for name in (
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "models/digits-resnet8.toml",
        "models/README.md",
        "calibration/digits.toml",
        "docs/cli.md",
        "tests/test_wheel.py",
    ):
        assert name in names
    assert not [n for n in names if n.startswith((".venv", "runs", "dist")) or ".pyc" in n]


# --------------------------------------------------------------------- an empty environment


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that holds the wheel without extras."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", wheel, "-c", ROOT / "constraints.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


class Reader(quantization.CalibrationDataReader):
    def __init__(self, x: np.ndarray) -> None:
        self.batches = iter([{"x": x}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.onnx` (one convolution and one linear layer, int8 QDQ) and `images.npz`."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    tensors = {
        "w1": rng.normal(0, 0.3, (4, 1, 3, 3)),
        "b1": rng.normal(0, 0.1, 4),
        "w2": rng.normal(0, 0.3, (3, 64)),
        "b2": rng.normal(0, 0.1, 3),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]),
            helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, folder / "float.onnx")
    pixels = rng.integers(0, 256, (30, 1, 8, 8), np.uint8)
    quantization.quantize_static(
        folder / "float.onnx",
        folder / "model.onnx",
        Reader(pixels.astype(np.float32) / 255),
        quant_format=quantization.QuantFormat.QDQ,
        weight_type=quantization.QuantType.QInt8,
    )
    np.savez(folder / "images.npz", x=pixels, y=rng.integers(0, 3, 30))
    return folder


@pytest.mark.slow
def test_a_campaign_runs_without_extras(empty: Path, files: Path, tmp_path: Path) -> None:
    done = run(
        empty / "resq-deploy",
        "inject",
        files / "model.onnx",
        *("--data", files / "images.npz", "--trials", "20", "--seed", "1"),
        *("--out", tmp_path / "flips.store", "--json", tmp_path / "flips.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "flips.json").read_text())
    assert result["n_trials"] == 20 and result["n_images"] == 30
    assert sum(result["outcomes"].values()) == 20
    assert "torch" not in result["versions"]
    table = run(
        *(empty / "resq-deploy", "results", tmp_path / "flips.store", "--csv", tmp_path / "t.csv")
    )
    assert table.returncode == 0, table.stderr
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0].startswith("trial,tensor,offset,bit,n_flips,n_total,n_correct,n_sdc,n_changed,")
    assert len(lines) == 21


@pytest.mark.slow
def test_torch_is_absent_and_what_needs_it_says_so(empty: Path, tmp_path: Path) -> None:
    assert run(empty / "python", "-c", "import torch").returncode == 1
    recipe = ROOT / "models" / "digits-resnet8.toml"
    done = run(
        *(empty / "resq-deploy", "train", recipe, "--stage", "baseline", "--out", tmp_path / "t")
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert 'pip install "resq-deploy[train]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_help_needs_no_extras(empty: Path) -> None:
    for command in ("run", "train", "adjust", "export", "inject", "report"):
        done = run(empty / "resq-deploy", command, "--help")
        assert done.returncode == 0 and "Usage:" in done.stdout, done.stderr
