"""The fused quantizer of activations against the one that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brevitas.core.quant import IntQuant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resq_deploy.nets import loops
from resq_deploy.nets.fused import FusedIntQuant

ZERO, BITS = torch.tensor(0.0), torch.tensor(8.0)


def both(
    signed: bool, x: Tensor, scale: float, gradient: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(result, gradient of x, gradient of the scale) of Brevitas' quantizer and of ours."""
    found = []
    for kind in (IntQuant, FusedIntQuant):
        value, step = x.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
        out = kind(False, signed, nn.Identity())(step, ZERO, BITS, value)
        out.backward(gradient)
        assert value.grad is not None and step.grad is not None
        found.append((out.detach(), value.grad, step.grad))
    return found[0], found[1]


def slope(signed: bool, x: Tensor, scale: float, gradient: Tensor) -> tuple[float, float]:
    """The gradient of the scale in float64, and the magnitudes whose rounding it suffers."""
    low, high = (-128, 127) if signed else (0, 255)
    steps = x.double() / torch.tensor(scale).double()
    codes = (x.float() / torch.tensor(scale)).round().double()
    inside = (codes >= low) & (codes <= high)
    kept, passed = codes.clamp(low, high), torch.where(inside, steps, 0.0)
    exact = (gradient.double() * (kept - passed)).sum()
    return float(exact), float((gradient.double().abs() * (kept.abs() + passed.abs())).sum())


@settings(deadline=None)  # the first call compiles
@given(
    signed=st.booleans(),
    shape=st.sampled_from([(1,), (3, 5), (2, 3, 5, 7), (1, 1, 130, 131)]),
    scale=st.floats(2.0**-20, 2.0**10, width=32),
    spread=st.floats(0.1, 400),
    seed=st.integers(0, 2**32 - 1),
)
def test_float32_is_brevitas_bit_for_bit(signed, shape, scale, spread, seed):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=stream) * (spread * scale)
    x.view(-1)[:1] = scale * 0.5  # a tie
    gradient = torch.randn(shape, generator=stream)
    theirs, ours = both(signed, x, scale, gradient)
    assert torch.equal(theirs[0], ours[0])
    # theirs multiplies by the scale and divides by it again
    torch.testing.assert_close(ours[1], theirs[1], rtol=3e-7, atol=0)
    assert torch.equal(ours[1], torch.where(ours[1] != 0, gradient, 0.0))
    exact, size = slope(signed, x, scale, gradient)
    assert abs(float(ours[2]) - exact) <= 1e-6 * size


@pytest.mark.parametrize("signed", [False, True])
def test_bfloat16_rounds_once(signed):
    """The result is that of float32 on the same values, rounded; gradients likewise."""
    stream = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 3, 40, 40, generator=stream) * 3).bfloat16()
    gradient = torch.randn(x.shape, generator=stream).bfloat16()
    exact, _ = both(signed, x.float(), 0.0173, gradient.float())
    _, ours = both(signed, x, 0.0173, gradient)
    assert ours[0].dtype == torch.bfloat16
    assert torch.equal(ours[0], exact[0].bfloat16())
    assert torch.equal(ours[1], torch.where(ours[1] != 0, gradient, torch.zeros_like(gradient)))
    assert torch.equal(ours[1] != 0, exact[1] != 0)
    torch.testing.assert_close(ours[2], exact[2], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_change_nothing(dtype):
    """channels_last, a slice with gaps, an expanded value; gradients in another order."""
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 8, 10, generator=stream).to(dtype)
    gradient = torch.randn(x.shape, generator=stream).to(dtype)
    _, plain = both(True, x, 0.02, gradient)
    last = torch.channels_last
    for given_x in (x.to(memory_format=last), torch.cat([x, x], 1)[:, :6], x[..., None][..., 0]):
        for above in (gradient, gradient.to(memory_format=last), torch.cat([gradient] * 2)[:4]):
            _, other = both(True, given_x, 0.02, above)
            assert torch.equal(other[0], plain[0]) and torch.equal(other[1], plain[1])
            torch.testing.assert_close(other[2], plain[2], rtol=1e-4, atol=1e-3)
    _, expanded = both(True, torch.tensor([0.5], dtype=dtype).expand(1000), 0.02, torch.ones(1000))
    assert torch.equal(expanded[0], torch.full((1000,), 0.5).div(0.02).round().mul(0.02).to(dtype))


def test_not_a_number_stays_one():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    for dtype in (torch.float32, torch.bfloat16):
        _, ours = both(False, x.to(dtype), 1.0, torch.ones(4, dtype=dtype))
        assert ours[0].isnan().tolist() == [True, False, False, False]
        assert ours[0][1:].tolist() == [255.0, 0.0, 1.0]


def test_threads_change_nothing():
    """One thread and several: the same bits, the gradient of the scale too."""
    stream = np.random.default_rng(0)
    x, above = (stream.normal(size=100_003).astype(np.float32) for _ in range(2))
    limits = np.float32(0.01), np.float32(-128), np.float32(127)
    found = []
    for n in (1, 2):
        quantize, gradient = loops.threads(n)
        out, below = np.empty_like(x), np.empty_like(x)
        quantize(x, *limits, out)
        found.append((out, below, gradient(x, above, *limits, below)))
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_a_scale_for_each_channel_is_left_to_brevitas():
    x = torch.randn(2, 3, 4, 4)
    scale = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    kinds = [kind(False, True, nn.Identity()) for kind in (IntQuant, FusedIntQuant)]
    theirs, ours = (kind(scale, ZERO, BITS, x) for kind in kinds)
    assert torch.equal(theirs, ours)
