"""Attacks stay in their ball; flips during training are the flips of bits.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_deploy import bits, evaluate, seeds
from resq_deploy.data.base import Dataset
from resq_deploy.nets import build
from resq_deploy.nets.quantized import calibrate, codes, quantize, value, weight_layers
from resq_deploy.perturb.inputs import on_pixel_grid, pgd
from resq_deploy.perturb.weights import bit_errors, random_masks


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    """A calibrated int8 ResNet-8 with random weights, one input channel."""
    net = quantize(build("resnet8", n_classes=10, in_channels=1, seed=3))
    calibrate(net, torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    return net.eval()


def images(n: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 1, 32, 32), generator=generator).float() / 255


def attack(
    net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, **options: object
) -> torch.Tensor:
    defaults = {"epsilon": 0.1, "steps": 3, "step_size": 1.25, "early_stop": False}
    generator = torch.Generator().manual_seed(0)
    return pgd(net, x, y, generator=generator, **(defaults | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [0.0, 1 / 255, 0.1, 1.0])
@pytest.mark.parametrize("early_stop", [False, True])
def test_pgd_stays_in_the_ball_and_in_the_pixel_range(
    net: torch.nn.Module, epsilon: float, early_stop: bool
) -> None:
    x, y = images(), torch.arange(8)
    adv = attack(net, x, y, epsilon=epsilon, early_stop=early_stop)
    assert adv.min() >= 0 and adv.max() <= 1
    assert (adv - x).abs().max() <= epsilon + 1e-6
    grid = on_pixel_grid(adv, x, epsilon=epsilon)
    assert grid.dtype == torch.uint8
    assert (grid.int() - torch.round(x * 255).int()).abs().max() <= int(epsilon * 255 + 1e-6)


def test_pgd_raises_the_loss(net: torch.nn.Module) -> None:
    x = images()
    y = value(net(x)).argmax(1)
    before = torch.nn.functional.cross_entropy(value(net(x)), y)
    after = torch.nn.functional.cross_entropy(value(net(attack(net, x, y, steps=5))), y)
    assert after > before


def test_early_stop_leaves_misclassified_images_where_they_are(net: torch.nn.Module) -> None:
    """Labels are all wrong, so nothing is left to attack: only the random start remains."""
    x = images()
    y = (value(net(x)).argmax(1) + 5) % 10
    start = attack(net, x, y, steps=1, step_size=1e-9)
    assert (attack(net, x, y, early_stop=True) - start).abs().max() < 1e-6


def test_attack_with_a_large_radius_breaks_every_image(net: torch.nn.Module) -> None:
    """Sanity check against masked gradients: epsilon = 1 must reach chance or below."""
    x = np.round(images(32).numpy() * 255).astype(np.uint8)
    y = evaluate.logits(net, x).argmax(1).numpy()
    data = Dataset(name="own labels", x=x, y=y)
    adv = evaluate.adversarial(net, data, epsilon=1.0, steps=20, restarts=2)
    assert evaluate.count(evaluate.logits(net, adv), y).rate <= 0.1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(1e-4, 0.5))
def test_training_flips_are_those_of_bits(net: torch.nn.Module, seed: int, rate: float) -> None:
    """The faulty weight is exactly the dequantized xor of bits.py, for every layer."""
    masks = random_masks(net, rate, seeds.stream(seed, "test"))
    for name, layer in weight_layers(net).items():
        q = layer.quant_weight()  # type: ignore[operator]
        stored = codes(layer).numpy()
        mask = masks[name].numpy() if name in masks else np.zeros_like(stored)
        unpacked = np.unpackbits(mask.view(np.uint8).reshape(-1, 1), axis=1, bitorder="little")
        offsets, positions = np.nonzero(unpacked)
        expected = bits.flip_sites(stored, offsets, positions)
        with bit_errors(net, masks):
            faulty = layer.quant_weight()  # type: ignore[operator]
        actual = torch.round(faulty.value / q.scale).to(torch.int16).detach().numpy()
        assert np.array_equal(actual, expected)


def test_faults_end_with_the_context_and_gradients_pass_straight_through(
    net: torch.nn.Module,
) -> None:
    x = images()
    clean = value(net(x)).detach()
    layer = weight_layers(net)["fc"]
    masks = {"fc": torch.full_like(layer.weight, -128, dtype=torch.int8)}
    with bit_errors(net, masks):
        assert not torch.equal(value(net(x)), clean)
        weight = layer.quant_weight().value  # type: ignore[operator]
    assert torch.equal(value(net(x)), clean)
    (gradient,) = torch.autograd.grad(weight.sum(), layer.weight)
    assert (gradient != 0).float().mean() > 0.8  # the maximum per channel also moves the scale


def test_masks_keep_to_the_rate_and_to_the_named_layers(net: torch.nn.Module) -> None:
    masks = random_masks(net, {"layer3.0.conv2": 0.05}, seeds.stream(0, "test"))
    assert list(masks) == ["layer3.0.conv2"]
    flips = int(np.bitwise_count(masks["layer3.0.conv2"].numpy().view(np.uint8)).sum())
    n = 8 * masks["layer3.0.conv2"].numel()
    assert abs(flips - 0.05 * n) < 5 * (n * 0.05 * 0.95) ** 0.5  # five standard deviations
