"""The training loop: learning rate, augmentation, exact resume. Methods: test_methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resq_deploy import artifacts, recipe
from resq_deploy.data.augment import AUGMENTATIONS
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.nets import build
from resq_deploy.nets.quantized import calibrate, quantize
from resq_deploy.train.loop import fit, learning_rate
from resq_deploy.train.objectives import CrossEntropy


def int8() -> nn.Module:
    net = quantize(build("resnet8", n_classes=10, in_channels=1, seed=3))
    calibrate(net, torch.rand(32, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    return net.train()


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate(0.1, step, 100) for step in range(100)]
    assert rates[9] == pytest.approx(0.1) and max(rates) == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-4


class Stop(Exception):
    """Stands for a killed process."""


class StopsAt(CrossEntropy):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def after_step(self, net: nn.Module) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def digits() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 1, 32, 32)).astype(np.uint8)
    return Dataset(name="noise", x=x, y=rng.integers(0, 10, 64))


def train(net: nn.Module, objective: CrossEntropy, folder: Path, **changes: Any) -> Any:
    options = {"stage": "float", "seed": 1, "augment": "crop", "inputs": {"a": 1}} | changes
    config = recipe.Training(epochs=3, lr=options.pop("lr", 0.05), batch=32)
    resume = folder / "resume.safetensors"
    return fit(net, digits(), objective, config, resume=resume, **options)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_resume_ends_with_the_same_bytes(quantized: bool, tmp_path: Path) -> None:
    """Stopped in the second epoch, continued: weights and history as if nothing happened.

    int8 too: Brevitas replaces parameters while it loads a state.
    """

    def fresh() -> nn.Module:
        return int8() if quantized else build("resnet8", n_classes=10, in_channels=1, seed=1)

    whole, resumed = fresh(), fresh()
    history = train(whole, CrossEntropy(), tmp_path / "a")
    with pytest.raises(Stop):
        train(fresh(), StopsAt(3), tmp_path / "b")
    with torch.no_grad():
        resumed.get_submodule("conv1").weight.zero_()  # type: ignore[union-attr, operator]
    assert train(resumed, CrossEntropy(), tmp_path / "b") == history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_state_of_other_inputs_is_not_resumed(tmp_path: Path) -> None:
    net = build("resnet8", n_classes=10, in_channels=1, seed=1)
    with pytest.raises(Stop):
        train(net, StopsAt(3), tmp_path)
    assert artifacts.is_current(tmp_path / "resume.safetensors", {"a": 1})
    history = train(net, CrossEntropy(), tmp_path, inputs={"a": 2})
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_diverging_training_is_one_clear_error(tmp_path: Path) -> None:
    class Explodes(CrossEntropy):
        def loss(self, net: Any, x: Any, y: Any, generator: Any) -> torch.Tensor:
            return super().loss(net, x, y, generator) * float("nan")

    with pytest.raises(InputError, match=r"loss became nan in epoch 1; lower lr"):
        train(build("resnet8", n_classes=10, in_channels=1), Explodes(), tmp_path)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_augmentation_keeps_shape_type_and_stream(name: str) -> None:
    x = digits().x
    out = [AUGMENTATIONS[name](x.copy(), np.random.default_rng(5)) for _ in range(2)]
    assert out[0].shape == x.shape and out[0].dtype == np.uint8
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], x) == (name == "none")
