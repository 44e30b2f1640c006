"""What the networks are built from: modules that mark, in a float network, where the quantized
one has a quantizer, and the rule for widths.

In float the markers do nothing special; `nets.quantized.quantize` replaces them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Kind = Literal["input", "unsigned", "signed", "logits"]


class Boundary(nn.Identity):
    """A point where activations are quantized although no ReLU stands there.

    `input` (uint8, fixed scale 1/255), `unsigned` (uint8, values known to be >= 0, such as
    a pooled ReLU), `signed` (int8) or `logits` (int8, the output of the network).
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind: Kind = kind


class Add(nn.Module):
    """Residual addition; a quantizer stands on each input that is not quantized yet."""

    def __init__(self, *, skip_is_quantized: bool) -> None:
        super().__init__()
        self.skip_is_quantized = skip_is_quantized

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        return main + skip


def channels(n: int, width: float) -> int:
    """`n` channels times `width`, as the nearest multiple of 8 that is at least 90 % of it.

    The rule of MobileNetV2 and EfficientNet, used by every network; n itself at width 1.
    """
    if width == 1:
        return n
    rounded = max(8, int(n * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * n * width else rounded
