"""Tools of others on an exported folder: LiteRT, TFLite Micro, Arm Vela, FINN, hls4ml, ORT format.

Each in an environment that the benchmark makes with pip: minutes, and a network connection.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resq_deploy import data
from resq_deploy.export import export

ROOT = Path(__file__).parents[1]
N_IMAGES = 200
N_COMPILED = 40
"""Images for hls4ml's C++ model, which takes a fifth of a second each."""


def clients(folder: Path, export: Path, *options: str) -> dict[str, Any]:
    """What benchmarks/clients.py says about an exported folder on real digits."""
    digits = data.load("digits").test.first(N_IMAGES)
    np.savez(folder / "digits.npz", x=digits.x, y=digits.y)
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/clients.py", export,
         "--data", folder / "digits.npz", "--environments", folder / "environments",
         "--json", folder / "clients.json", *options],
        check=True,
    )  # fmt: skip
    return json.loads((folder / "clients.json").read_text())


@pytest.fixture(scope="module")
def found(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All clients that take the ResNet-8 of the tiny run."""
    return clients(tmp_path_factory.mktemp("clients"), tiny_run / "export/adjust")


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("client", ["LiteRT, XNNPACK", "LiteRT, reference kernels", "TFLite Micro"])
def test_tflite_answers_within_two_steps(found: dict[str, Any], client: str) -> None:
    """Reference kernels round twice, half up: most images move by a step, none far."""
    row = found[client]
    assert row["n_images"] == N_IMAGES and row["max_steps"] <= 2
    assert row["n_within_one_step"] >= 0.99 * N_IMAGES
    assert row["n_top1_equal"] >= 0.98 * N_IMAGES


def test_vela_puts_every_operator_on_the_npu(found: dict[str, Any]) -> None:
    row = found["Arm Vela, Ethos-U55-128"]
    assert row["cpu_operators"] == 0 and row["npu_operators"] > 10


def test_the_ort_format_answers_the_same(found: dict[str, Any]) -> None:
    row = found["onnxruntime, ORT format"]
    assert row["n_equal"] == row["n_images"] == N_IMAGES
    operators = ";".join(row["required_operators"])
    assert "QLinearConv" in operators and "DequantizeLinear" in operators


def test_the_front_end_of_finn_keeps_the_function(found: dict[str, Any]) -> None:
    """Every quantizer is a MultiThreshold, which rounds half up: ties move by a step."""
    row = found["FINN+, front end"]
    assert row["n_within_one_step"] == row["n_images"] == N_IMAGES
    assert row["operators"]["MultiThreshold"] > 10 and "Quant" not in row["operators"]


def test_hls4ml_is_exactly_equal_with_powers_of_two(tiny_run: Path, tmp_path: Path) -> None:
    twin = tiny_run / "adjust/checkpoint.safetensors"
    images = data.load("digits").test
    model = export(twin, out=tmp_path / "export", images=images, profile="po2-tensor")
    options = ("--client", "hls4ml, C++", "--images", str(N_COMPILED))
    row = clients(tmp_path, model.parent, *options)["hls4ml, C++"]
    assert row["n_equal"] == row["n_images"] == N_COMPILED
