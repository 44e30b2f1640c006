"""What an int8 network computes in float, so that every runtime gets the same codes.

The exp, erf and square root of two libraries differ in their last bits, and so do sums in another
order. Where a result then stands at a rounding boundary, one code flips, and a deep network spreads
that. With power-of-two scales, everything that is summed here is exact in float32 in any order;
what follows is correctly rounded operations in a fixed order; and exp and erf are functions of one
of 256 codes, of which hardly ever one is at a boundary.

In training LayerNorm and softmax run the usual kernels: faster, and the same but for the last bits
of the one, the fixed point of the other.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from brevitas.function import round_ste
from torch import Tensor, nn

EXP_STEPS = 4096
"""Exponentials are whole multiples of 1 / EXP_STEPS: their sums are exact, and 16 steps of it are
one of the 8-bit probability behind."""
LOWEST = torch.finfo(torch.float32).min


def _read_once(x: Tensor) -> Tensor:
    """The same values, as float32, behind an operator that is their quantizer's only reader.

    For several readers onnxruntime converts the codes once each, and then does not see that they
    belong to one GELU. Rows are flattened to rows, which costs nothing.
    """
    x = x.float()
    return x.flatten(1) if x.dim() == 2 else x.clamp(min=LOWEST)


def _square_root(x: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt is not on every CPU; exported as one Sqrt."""
    if torch.onnx.is_in_onnx_export():
        return x.sqrt()
    return x.double().sqrt().float()


class LayerNorm(nn.LayerNorm):
    """Layer norm with mean and variance from the sums of x and x * x.

    These are exact where the scale of x is a power of two and n * 128 ** 2 < 2 ** 24 for n values,
    and in practice above: what is normalised is seldom at the end of its range. A variance below
    eps counts as eps, which is one operator instead of a bound at 0 and an addition.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        x = _read_once(x)
        axes = tuple(range(-len(self.normalized_shape), 0))
        mean = x.mean(axes, keepdim=True)
        variance = x.pow(2).mean(axes, keepdim=True) - mean.pow(2)
        x = (x - mean) / _square_root(variance.clamp(min=self.eps))
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


class Softmax(nn.Softmax):
    """Softmax of exponentials in fixed point."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        x, dim = x.float(), cast(int, self.dim)
        x = torch.exp(x - x.detach().amax(dim, keepdim=True))
        x = cast(Tensor, round_ste(x * EXP_STEPS))
        return x / x.sum(dim, keepdim=True)


class GELU(nn.Module):
    """The exact GELU of a quantized value, which onnxruntime runs as one operator."""

    def __init__(self, quantizer: nn.Module) -> None:
        """`quantizer` returns plain tensors."""
        super().__init__()
        self.input = quantizer

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return F.gelu(x if self.training else _read_once(x))
