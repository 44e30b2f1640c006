"""Linearity grafting: which channels, and what becomes of them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import write_recipe
from torch import Tensor, nn

from resq_deploy import artifacts, evaluate, recipe
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.export.qdq import qdq
from resq_deploy.nets import build
from resq_deploy.nets.blocks import Boundary
from resq_deploy.nets.posttraining import output_means
from resq_deploy.nets.quantized import calibrate, quantize, ranges, value, weight_layers
from resq_deploy.train import train
from resq_deploy.train.grafting import choose, clipped, graft, sensitivity, sites

IMAGES = Dataset(
    name="noise",
    x=np.random.default_rng(0).integers(0, 256, (24, 1, 32, 32)).astype(np.uint8),
    y=np.arange(24) % 10,
)
PAIRS = {"conv1": "relu"} | {f"layer{i}.0.conv1": f"layer{i}.0.relu1" for i in (1, 2, 3)}


def int8(net: nn.Module) -> nn.Module:
    net = quantize(net)
    calibrate(net, evaluate.tensor(IMAGES.x))
    return net


@cache
def _resnet8() -> nn.Module:
    return int8(build("resnet8", n_classes=10, in_channels=1, width=0.5, seed=3))


def resnet8() -> nn.Module:
    return copy.deepcopy(_resnet8())


def around(net: nn.Module, layer: str, relu: str) -> tuple[Tensor, Tensor]:
    """What a ReLU of the int8 network reads and returns."""
    seen: list[Tensor] = []
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(value(out)))
        for name in (layer, relu)
    ]
    evaluate.logits(net, IMAGES.x)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_grafted_channels_are_linear_and_the_means_behind_stay(share: float) -> None:
    """Half a step is what rounding costs; a mean moves by less than a tenth of a deviation."""
    net, before = resnet8(), resnet8()
    chosen = graft(net, IMAGES, share)
    total = sum(len(weight_layers(net)[name].bias) for name in PAIRS)  # type: ignore[arg-type]
    assert sum(map(len, chosen.values())) == max(1, round(share * total))
    for name, channels in chosen.items():
        x, y = around(net, name, PAIRS[name])
        step = float(ranges(net)[PAIRS[name]].detach()) / 255
        assert float((x - y)[:, channels].abs().max()) <= 0.501 * step, name
        assert float(x[:, channels].min()) > -0.01 * step, name
    x = evaluate.tensor(IMAGES.x)
    for name, mean in output_means(before, x).items():
        left = [c for c in range(len(mean)) if c not in chosen.get(name, [])]
        spread = around(before, name, name)[0].std()
        assert float((output_means(net, x)[name] - mean)[left].abs().sum()) < 0.1 * spread, name


def test_only_relus_that_alone_read_a_layer_are_sites() -> None:
    """Not those behind an addition, nor what an addition reads too, nor a ReLU6."""
    assert sites(_resnet8()) == PAIRS

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = Boundary("unit")
            self.one, self.two, self.three = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
            self.relu1, self.relu2, self.relu6 = nn.ReLU(), nn.ReLU(), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(self.input(x))
            x = self.relu1(x) + x
            return self.relu6(self.three(self.relu2(self.two(x))))

    assert sites(quantize(Shared())) == {"two": "relu2"}


class Plain(nn.Module):
    """A float network whose loss is smooth behind its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Linear(256, 10)

    def tail(self, y: Tensor) -> Tensor:
        return self.fc(y.flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.relu(self.conv(x)))


def test_sensitivity_is_the_derivative_of_the_loss_towards_the_linear_channel() -> None:
    torch.manual_seed(0)
    net = Plain()
    found = sensitivity(net, {"conv": "relu"}, IMAGES)["conv"]
    double = copy.deepcopy(net).double()
    with torch.no_grad():
        x = double.conv(evaluate.tensor(IMAGES.x).double())
        below = x.clamp_max(0) - x.clamp_max(0).mean(dim=(0, 2, 3), keepdim=True)
        for channel in range(4):
            only = torch.zeros_like(x)
            only[:, channel] = below[:, channel]
            losses = [
                F.cross_entropy(
                    double.tail(double.relu(x) + t * only), torch.from_numpy(IMAGES.y),
                    reduction="none",
                )
                for t in (-1e-4, 1e-4)
            ]  # fmt: skip
            expected = (losses[1] - losses[0]).abs().mean() / 2e-4
            assert float(found[channel]) == pytest.approx(float(expected), rel=1e-4)


def test_the_least_scores_of_all_layers_are_chosen() -> None:
    scores = {
        "a": torch.tensor([3.0, 1.0]),
        "b": torch.tensor([2.0, 4.0]),
        "c": torch.tensor([9.0]),
    }
    assert choose(scores, 0.4) == {"a": [1], "b": [0]}
    assert choose(scores, 0.01) == {"a": [1]}
    assert choose(scores, 1) == {"a": [0, 1], "b": [0, 1], "c": [0]}


def test_the_file_has_the_operators_that_it_had() -> None:
    net = resnet8()
    files = [qdq(net, (1, 32, 32), opset=19, ir_version=10)]
    graft(net, IMAGES, 0.5)
    files.append(qdq(net, (1, 32, 32), opset=19, ir_version=10))
    first, second = ([node.op_type for node in file.graph.node] for file in files)
    assert first == second


def test_a_network_without_sites_is_refused() -> None:
    net = quantize(nn.Sequential(Boundary("unit"), nn.Conv2d(1, 2, 3), Boundary("signed")))
    calibrate(net, evaluate.tensor(IMAGES.x))
    with pytest.raises(InputError, match="no ReLU is the only reader of a convolution or a linear"):
        graft(net, IMAGES, 0.5)


def test_a_recipe_reaches_it_and_the_sidecar_says_which(tmp_path: Path) -> None:
    changes = {
        "data": {"validation": 0.9}, "float": {"epochs": 0}, "baseline": {"epochs": 0},
        "attack": {"epochs": 1, "batch": 40, "graft": 0.25},
    }  # fmt: skip
    loaded, last = recipe.load(write_recipe(tmp_path, **changes)), None
    for stage in ("float", "baseline", "attack"):
        last = train(loaded, stage, out=tmp_path / stage, start=last)
    assert last is not None
    facts = artifacts.read_json(artifacts.sidecar(last))["graft"]
    assert sum(map(len, facts["channels"].values())) == 16 and 0 <= facts["clipped"] < 0.5


def test_what_training_took_below_zero_is_counted() -> None:
    net = resnet8()
    chosen = graft(net, IMAGES, 0.1)
    assert clipped(net, chosen, IMAGES) < 1e-4
    with torch.no_grad():
        for name, channels in chosen.items():
            weight_layers(net)[name].bias[channels] -= 1e3  # type: ignore[index, operator]
    assert clipped(net, chosen, IMAGES) == 1
