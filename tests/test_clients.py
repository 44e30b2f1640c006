"""Tools of others on an exported folder: LiteRT, Arm Vela, onnxruntime's own format.

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

ROOT = Path(__file__).parents[1]
N_IMAGES = 200


@pytest.fixture(scope="module")
def found(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What benchmarks/clients.py says about the ResNet-8 of the tiny run on real digits."""
    folder = tmp_path_factory.mktemp("clients")
    digits = data.load("digits").test.first(N_IMAGES)
    np.savez(folder / "digits.npz", x=digits.x, y=digits.y)
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/clients.py", tiny_run / "export/adjust",
         "--data", folder / "digits.npz", "--environments", folder / "environments",
         "--json", folder / "clients.json"],
        check=True,
    )  # fmt: skip
    return json.loads((folder / "clients.json").read_text())


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kernels", ["XNNPACK", "reference kernels"])
def test_litert_answers_within_two_steps(found: dict[str, Any], kernels: str) -> None:
    """Reference kernels round twice, half up: most images move by a step, none far."""
    row = found[f"LiteRT, {kernels}"]
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
