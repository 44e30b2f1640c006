"""What an import pulls in: campaigns without torch, `--help` without anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINING = {"torch", "brevitas", "qonnx"}
HEAVY = {*TRAINING, "numpy", "scipy", "onnx", "onnxruntime", "pydantic", "matplotlib", "sklearn"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("resq_deploy", HEAVY),
        ("resq_deploy.cli", HEAVY),
        ("resq_deploy.data", TRAINING),
        ("resq_deploy.recipe", TRAINING),
        ("resq_deploy.artifacts", TRAINING),
        ("resq_deploy.runtime", TRAINING),
        ("resq_deploy.store", TRAINING),
        ("resq_deploy.inject", TRAINING),
        ("resq_deploy.report", TRAINING),
    ],
)
def test_import_does_not_pull_in(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(run.stdout.split())
