"""One pass over memory for what quantizes activations.

Brevitas quantizes in several operations, and so does its gradient; each reads and writes the whole
tensor. Here either is one loop; docs/training-cost.md says what that saves. The values are those of
Brevitas bit for bit in float32; in bfloat16, where it rounds after every operation, here only the
result is rounded.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from brevitas.core.quant import IntQuant
from numpy.typing import NDArray
from torch import Tensor

from resq_deploy.nets import loops

FUSED = (torch.float32, torch.bfloat16)


def _flat(x: Tensor) -> NDArray[Any]:
    """The values of a dense tensor in the order of memory; those of bfloat16 as their bits."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    if x.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x with its values in the order in which `other` has them."""
    same = x.stride() == other.stride() and x.dtype == other.dtype
    return x if same else torch.empty_like(other).copy_(x)


class _FakeQuantize(torch.autograd.Function):
    """s clamp(round(x / s), low, high), the gradients straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        out = torch.empty_like(x)  # dense, and as x where x is
        x = _like(x, out)
        ctx.save_for_backward(x, scale)
        ctx.limits = np.float32(low), np.float32(high)
        quantize, _ = loops.threads(torch.get_num_threads())
        quantize(_flat(x), np.float32(scale.item()), *ctx.limits, _flat(out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        out = torch.empty_like(x)
        _, gradient_of = loops.threads(torch.get_num_threads())
        slope = gradient_of(
            _flat(x), _flat(_like(gradient, x)), np.float32(scale.item()), *ctx.limits, _flat(out)
        )
        return out, torch.full_like(scale, slope), None, None


class FusedIntQuant(IntQuant):
    """Brevitas' integer quantizer for activations: one scale, no zero point, nearest code.

    What else it is asked for (another device, another type, a scale for each channel) it leaves to
    Brevitas.
    """

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """x, any shape, rounded to multiples of `scale` (one value) within the codes.

        Gradients: that of x is 0 where the code saturates, that of the scale is the sum of
        g (q - x / s), without x / s where it saturates.
        """
        if x.device.type != "cpu" or x.dtype not in FUSED or scale.numel() != 1:
            return cast(Tensor, super().forward(scale, zero_point, bit_width, x))
        low, high = float(self.min_int(bit_width)), float(self.max_int(bit_width))
        return cast(Tensor, _FakeQuantize.apply(x, scale, low, high))
