"""LayerNorm, softmax and GELU of int8 networks: the same function, and the same bits everywhere."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resq_deploy import runtime
from resq_deploy.nets import islands

STEP = 1 / 16
_random = torch.Generator().manual_seed(0)
CODES = torch.randn(512, 96, generator=_random).mul(30).add(3).round().clamp(-128, 127)
X = CODES * STEP


def _norm() -> islands.LayerNorm:
    norm = islands.LayerNorm(96)
    nn.init.uniform_(norm.weight, 0.5, 2.0, generator=_random)
    nn.init.uniform_(norm.bias, -1, 1, generator=_random)
    return norm


ISLANDS = {
    "norm": _norm(),
    "softmax": islands.Softmax(-1),
    "gelu": islands.GELU(nn.Identity()),
}
USUAL = {"norm": nn.LayerNorm(96), "softmax": nn.Softmax(-1), "gelu": nn.GELU()}
USUAL["norm"].load_state_dict(ISLANDS["norm"].state_dict())
TOLERANCE = {"norm": 1e-5, "softmax": 1 / islands.EXP_STEPS, "gelu": 1e-6}


@pytest.mark.parametrize("name", sorted(ISLANDS))
def test_function_and_gradient_are_the_usual_ones(name: str) -> None:
    weights = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    found: list[tuple[Tensor, Tensor]] = []
    for module in (ISLANDS[name].eval(), USUAL[name]):
        x = X.clone().requires_grad_()
        y = module(x)
        (y * weights).sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * TOLERANCE[name])


@pytest.mark.parametrize("name", ["norm", "softmax"])
@pytest.mark.parametrize("level", sorted(runtime.LEVELS))
def test_onnxruntime_gives_the_same_bits(name: str, level: str) -> None:
    """The usual kernels do not."""
    for module, same in ((ISLANDS[name], True), (USUAL[name], False)):
        file = io.BytesIO()
        torch.onnx.export(
            copy.deepcopy(module).eval(),
            (X,),
            file,
            dynamo=False,
            opset_version=19,
            input_names=["x"],
        )
        theirs = runtime.build(file.getvalue(), level=level).run(None, {"x": X.numpy()})[0]
        with torch.no_grad():
            assert np.array_equal(module.eval()(X).numpy(), theirs) == same


def test_equal_values_are_normalised_to_the_shift() -> None:
    """Their variance is 0, not less by a rounding."""
    norm = ISLANDS["norm"].eval()
    with torch.no_grad():
        assert torch.equal(norm(torch.full((1, 96), 127 * STEP)), norm.bias[None])


@pytest.mark.parametrize("step", [2.0**k for k in range(-6, 7)])
def test_variance_that_rounds_below_zero(step: float) -> None:
    """All codes at one end of the range but few: as a difference of two sums -1e-3 steps squared,
    where n is that of Swin-Tiny's widest norm."""
    n = 1536
    rows = 127.0 - torch.arange(n).lt(torch.tensor([[n - 1], [n - 2], [1], [2]])).float()
    with torch.no_grad():
        found = islands.LayerNorm(n, elementwise_affine=False).eval()(rows * step)
    assert found.isfinite().all()


def test_rows_in_more_dimensions() -> None:
    """Values that are no matrix are read by another operator."""
    for name in ISLANDS:
        with torch.no_grad():
            same = ISLANDS[name].eval()(X.view(8, 64, 96))
            assert torch.equal(same.view(512, 96), ISLANDS[name](X))


def test_training_takes_the_usual_kernels() -> None:
    for name in ISLANDS:
        with torch.no_grad():
            assert torch.equal(ISLANDS[name].train()(X), USUAL[name](X))
            ISLANDS[name].eval()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(ISLANDS))
def test_half_precision(name: str, training: bool) -> None:
    """What training runs on, and what a validation in its midst gets."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = ISLANDS[name].train(training)(X.bfloat16()).float()
        ISLANDS[name].eval()
    torch.testing.assert_close(found, USUAL[name](X), rtol=0.02, atol=0.02)
