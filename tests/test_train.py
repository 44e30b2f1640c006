"""Objectives, criticality, clipping, and the loop's exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resq_deploy import artifacts, recipe
from resq_deploy.data.augment import AUGMENTATIONS
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.nets import build
from resq_deploy.nets.quantized import calibrate, quantize
from resq_deploy.train.loop import fit, learning_rate
from resq_deploy.train.objectives import (
    Criticality,
    CrossEntropy,
    FeatureConsistency,
    RandBET,
    clip_per_channel,
    feature_distance,
    layer_rates,
)

FAULT = {"epochs": 1, "lr": 0.01, "start_loss": 9.0}
ATTACK = {"epochs": 1, "lr": 0.01, "epsilon": 0.1}


def int8() -> nn.Module:
    net = quantize(build("resnet8", n_classes=10, in_channels=1, seed=3))
    calibrate(net, torch.rand(32, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    return net.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(8)


@given(st.integers(2, 6), st.floats(0.5, 4.0), st.integers(0, 99))
def test_clipping_bounds_every_channel_and_never_grows_a_weight(
    channels: int, rms: float, seed: int
) -> None:
    w = torch.randn(channels, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    before = w.clone()
    bound = rms * before.square().mean(dim=(1, 2, 3)).sqrt()
    clip_per_channel(w, rms)
    assert (w.abs().amax(dim=(1, 2, 3)) <= bound * (1 + 1e-6)).all()
    assert (w.abs() <= before.abs()).all()
    inside = before.abs() <= bound.reshape(-1, 1, 1, 1) * (1 - 1e-6)
    assert torch.equal(w[inside], before[inside])


def test_criticality_is_the_moving_average_of_gradient_norms() -> None:
    """s <- 0.9 s + 0.1 ||g||, started at the first norm; by hand for two steps."""
    net = int8()
    ranking = Criticality(0.9)
    layer = net.get_submodule("fc")
    for value in (1.0, 3.0):
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        ranking.update(net)
    n = layer.weight.numel()  # type: ignore[union-attr, operator]
    expected = (0.9 * 1.0 + 0.1 * 3.0) * n**0.5
    assert ranking.norm["fc"] == pytest.approx(expected)
    assert ranking.scores(net)["fc"] == pytest.approx(expected / n**0.5)
    scores = [float(row["score"]) for row in ranking.ranking(net)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("guided", ["proportional", "top-k", "none"])
def test_layer_rates_keep_the_expected_number_of_errors(guided: str) -> None:
    config = recipe.Fault(**FAULT, guided=guided, top_k=2, rate=0.01)
    sizes = {"a": 100, "b": 1000, "c": 5000}
    rates = layer_rates({"a": 3.0, "b": 1.0, "c": 0.5}, sizes, config)
    assert sum(rates[n] * sizes[n] for n in sizes) == pytest.approx(0.01 * sum(sizes.values()))
    assert rates["a"] >= rates["b"] >= rates["c"]
    if guided == "top-k":
        assert rates["c"] == 0
    if guided == "none":
        assert set(rates.values()) == {0.01}


def test_feature_distance_is_zero_for_equal_and_as_defined() -> None:
    h = torch.tensor([[3.0, 4.0]])
    assert float(feature_distance(h, h, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(feature_distance(h, torch.tensor([[-4.0, 3.0]]), "cosine")) == pytest.approx(1)
    assert float(feature_distance(h, h + torch.tensor([[0.0, 5.0]]), "mse")) == pytest.approx(1)


def test_feature_consistency_is_the_sum_of_its_three_terms() -> None:
    net, (x, y) = int8(), batch()

    def loss(**weights: float) -> float:
        objective = FeatureConsistency(recipe.Attack(**ATTACK, **weights))
        return float(objective.loss(net, x, y, torch.Generator().manual_seed(0)))

    clean = loss(adversarial_weight=0, feature_weight=0)
    assert clean == pytest.approx(float(CrossEntropy().loss(net, x, y, torch.Generator())))
    adversarial = loss(adversarial_weight=1, feature_weight=0) - clean
    feature = loss(adversarial_weight=0, feature_weight=1) - clean
    assert adversarial > clean and feature > 0
    assert loss(adversarial_weight=2, feature_weight=3) == pytest.approx(
        clean + 2 * adversarial + 3 * feature, rel=1e-4
    )


def test_bit_errors_begin_below_the_start_loss_and_then_stay() -> None:
    net, (x, y) = int8(), batch()
    late = RandBET(recipe.Fault(**(FAULT | {"start_loss": 0.01})), CrossEntropy(), seed=0)
    plain = float(CrossEntropy().loss(net, x, y, torch.Generator()))
    assert float(late.loss(net, x, y, torch.Generator())) == pytest.approx(plain)
    late.unfaulted.clean_loss, late.running = 0.0, 0.0
    now = RandBET(recipe.Fault(**FAULT, rate=0.05), CrossEntropy(), seed=0)
    assert float(now.loss(net, x, y, torch.Generator())) > plain
    now.running = 100.0
    assert float(now.loss(net, x, y, torch.Generator())) > plain


def test_randbet_state_survives_a_restart() -> None:
    net, (x, y) = int8(), batch()
    first = RandBET(recipe.Fault(**FAULT), CrossEntropy(), seed=0)
    first.loss(net, x, y, torch.Generator()).backward()
    first.after_backward(net)
    second = RandBET(recipe.Fault(**FAULT), CrossEntropy(), seed=0)
    second.load_state(first.state())
    assert second.criticality.norm == first.criticality.norm
    assert (second.steps, second.running, second.started) == (1, first.running, True)
    losses = [float(o.loss(net, x, y, torch.Generator())) for o in (first, second)]
    assert losses[0] == losses[1]


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
