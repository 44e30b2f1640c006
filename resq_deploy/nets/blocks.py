"""What the networks are built from: modules that mark, in a float network, where the quantized
one has a quantizer, and the rule for widths.

In float the markers do nothing special; `nets.quantized.quantize` replaces them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, cast

import torch
from torch import Tensor, nn

Kind = Literal["unit", "probability", "unsigned", "signed"]


class Boundary(nn.Identity):
    """A point where activations are quantized although no ReLU stands there.

    `unit` (uint8, fixed scale 1/255, values in [0, 1]: pixels, sigmoids), `probability` (uint8,
    fixed scale 1/256: softmax), `unsigned` (uint8, values known to be >= 0, such as a pooled
    ReLU) or `signed` (int8, symmetric).
    Convolutions and linear layers need what they read to be a QuantTensor, whose scale sets
    that of their bias; `plain` passes a plain tensor on, for everything else.
    """

    def __init__(self, kind: Kind, *, plain: bool = False) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.plain = plain


class Add(nn.Module):
    """Addition; a quantizer stands on each input that is not quantized yet."""

    def __init__(self, *, skip_is_quantized: bool, main_is_quantized: bool = False) -> None:
        super().__init__()
        self.skip_is_quantized = skip_is_quantized
        self.main_is_quantized = main_is_quantized

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        return main + skip


class Foldable(nn.Module):
    """A module with constants that its own weights can take over before quantization."""

    def fold(self) -> None:
        """Do so, in place; the module computes the same function up to float rounding."""
        raise NotImplementedError


class UnitClip(nn.Hardtanh):
    """Values clipped to [0, 1]; quantized it is nothing but a `unit` quantizer, which saturates
    there."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)


class SiLU(nn.Module):
    """x * sigmoid(x), same shape; quantized: input, sigmoid and product."""

    def __init__(self) -> None:
        super().__init__()
        self.input = Boundary("signed", plain=True)
        self.gate = Boundary("unit", plain=True)
        self.out = Boundary("signed")

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return cast(Tensor, self.out(torch.mul(x, self.gate(torch.sigmoid(x)))))


def channels(n: int, width: float) -> int:
    """`n` channels times `width`, as the nearest multiple of 8 that is at least 90 % of it.

    The rule of MobileNetV2 and EfficientNet, used by every network; n itself at width 1.
    """
    if width == 1:
        return n
    rounded = max(8, int(n * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * n * width else rounded


def dropout_and_linear(c_in: int, n_classes: int, *, kind: Kind) -> nn.Sequential:
    """Classifier of pooled features (N, c_in), named like torchvision's: the layer is `1`."""
    layers = {"0": nn.Dropout(0.2), "pooled": Boundary(kind), "1": nn.Linear(c_in, n_classes)}
    return nn.Sequential(OrderedDict(layers))
