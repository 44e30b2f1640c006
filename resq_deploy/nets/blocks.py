"""Two modules that mark, in a float network, where the quantized one has a quantizer.

In float both do nothing special; `nets.quantized.quantize` replaces them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Kind = Literal["input", "unsigned", "signed"]


class Boundary(nn.Identity):
    """A point where activations are quantized although no ReLU stands there.

    `input` (uint8, fixed scale 1/255), `unsigned` (uint8, values known to be >= 0, such as
    a pooled ReLU) or `signed` (int8, the logits).
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
