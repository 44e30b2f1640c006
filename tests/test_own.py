"""A network of the user's own: traced, quantized, hardened, exported; refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from resq_deploy import artifacts, data, pipeline, recipe
from resq_deploy.cli import main
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject import inject
from resq_deploy.nets import checkpoint, own, steps
from resq_deploy.nets.posttraining import correct_biases, equalize
from resq_deploy.nets.quantized import calibrate, quantize, value, weight_layers
from resq_deploy.nets.traced import trace
from resq_deploy.train import train

OWN = Path(__file__).parent / "own"
SOURCES = {"plain": f"{OWN / 'plain_cnn.py'}:make_net", "concat": f"{OWN / 'concat_net.py'}:Net"}
SHAPE = (1, 16, 16)
X = torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few digits of 16x16 pixels, as a user keeps images of his own."""
    folder = tmp_path_factory.mktemp("digits")
    found = data.load("digits")
    assert found.train is not None
    for name, split, n in (("train", found.train, 256), ("test", found.test, 64)):
        np.savez(folder / f"{name}.npz", x=split.x[:n, :, ::2, ::2], y=split.y[:n])
    return folder


SECTIONS: dict[str, dict[str, Any]] = {
    "float": {"epochs": 1, "batch": 32, "lr": 0.05},
    "baseline": {"epochs": 1, "batch": 64, "lr": 0.01},
    "attack": {"epochs": 1, "batch": 64, "lr": 0.01, "epsilon": 0.05},
    "fault": {"epochs": 1, "batch": 64, "lr": 0.01, "start_loss": 10.0},
    "adjust": {"epsilon": 0.05, "ratios": [0.8], "patterns": 2, "steps": 1},
    "export": {"parity_images": 64},
    "prove": {"images": 20, "rates": [1e-2], "draws": 2, "margin": 0.4, "single_images": 5,
              "epsilons": [0.05], "steps": 1},
}  # fmt: skip


def write(folder: Path, images: Path, *, train_set: bool = True, **sections: Any) -> Path:
    """models/own.toml and its calibration manifest under `folder`."""
    given = {"name": str(images / "test.npz")} | (
        {"train": str(images / "train.npz")} if train_set else {}
    )
    content = {"data": given | {"calibration": "own"}, **sections}
    lines = ['name = "own"']
    for section, fields in content.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in fields.items())]
    path = folder / "models" / "own.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    (folder / "calibration").mkdir(exist_ok=True)
    split = "train" if train_set else "test"
    (folder / "calibration/own.toml").write_text(f'data = "test"\nsplit = "{split}"\nimages = 32\n')
    return path


@pytest.fixture(scope="module", params=sorted(SOURCES))
def run(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: Any) -> Path:
    """A finished run of every stage on a network that is not ours."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write(folder, digits, model={"source": SOURCES[request.param]}, **SECTIONS)
    pipeline.run(recipe.load(path), out=folder / "run", workers=1)
    return folder / "run"


class TestEndToEnd:
    def test_every_stage_trains_and_is_exported(self, run: Path) -> None:
        digests = {artifacts.sha256(p) for p in run.glob("*/checkpoint.safetensors")}
        assert len(digests) >= 4  # stage 3 may leave everything alone
        kernels = artifacts.read_json(run / "export/adjust/manifest.json")["kernels"]
        assert kernels["QLinearConv"] == {"plain": 2, "concat": 7}[run.parent.name[:-1]]
        assert not {"Conv", "Gemm", "MatMul", "Add", "BatchNormalization"} & set(kernels)
        assert artifacts.read_json(run / "table.json")["missing"] == []

    def test_both_engines_give_the_same_campaign(self, run: Path, tmp_path: Path) -> None:
        images = Dataset(name="x", x=(X[:8].numpy() * 255).astype(np.uint8), y=np.arange(8))
        found = [
            inject(run / "export/adjust/model.qdq.onnx", images, out=tmp_path / f"{engine}.store",
                   trials=20, engine=engine)
            for engine in ("fast", "reload")
        ]  # fmt: skip
        for summary in found:
            for key in ("engine", "reloaded", "seconds"):
                summary.pop(key, None)
        assert found[0] == found[1]

    def test_loading_a_checkpoint_needs_no_source(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(own, "call", None)
        net, facts = checkpoint.load(run / "adjust/checkpoint.safetensors")
        assert value(net(X)).shape == (32, 10)
        assert facts["net"]["source"] in ("plain_cnn.py:make_net", "concat_net.py:Net")
        assert len(facts["net"]["source_sha256"]) == 64
