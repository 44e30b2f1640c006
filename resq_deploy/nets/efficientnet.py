"""EfficientNet-B0: Tan and Le (arXiv 1905.11946).

Parameter names follow torchvision's `efficientnet_b0` (`features.0.0`,
`features.1.0.block.0.0`, `features.1.0.block.1.fc1`, `classifier.1`). Stochastic depth, which
only regularises long training, is left out.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from resq_deploy.nets.blocks import Add, Boundary, SiLU, channels, dropout_and_linear

# expansion, kernel, stride of the first block, channels, blocks: table 1 of the paper
STACKS = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip


def _convolution(
    c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class SqueezeExcitation(nn.Module):
    """Channels weighted by what their means say (Hu et al., arXiv 1709.01507): (N, C, H, W)."""

    def __init__(self, c: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pooled = Boundary("signed")
        self.fc1 = nn.Conv2d(c, squeezed, 1)
        self.activation = SiLU()
        self.fc2 = nn.Conv2d(squeezed, c, 1)
        self.excitation = Boundary("signed", plain=True)
        self.gate = Boundary("unit", plain=True)
        self.out = Boundary("signed")

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.activation(self.fc1(self.pooled(self.pool(x)))))
        gate = self.gate(torch.sigmoid(self.excitation(y)))
        return cast(Tensor, self.out(torch.mul(x, gate)))


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, linear projection, shortcut
    where the shape stays: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels(c_in, expansion)
        expand = [nn.Sequential(*_convolution(c_in, hidden, 1), SiLU())] if hidden > c_in else []
        self.block = nn.Sequential(
            *expand,
            nn.Sequential(*_convolution(hidden, hidden, size, stride, groups=hidden), SiLU()),
            SqueezeExcitation(hidden, max(1, c_in // 4)),
            nn.Sequential(*_convolution(hidden, c_out, 1)),
        )
        self.add = Add(skip_is_quantized=True) if stride == 1 and c_in == c_out else None
        self.out = Boundary("signed")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return cast(Tensor, self.out(y if self.add is None else self.add(y, x)))


class EfficientNetB0(nn.Module):
    """Stem, sixteen MBConv blocks, 1x1 convolution, pool, classifier.

    Input (N, in_channels, image_size, image_size) pixels in [0, 1]; output (N, n_classes)
    logits. For 32x32 images the stem and the first stack of stride 2 have stride 1, as in
    `mobilenet.MobileNetV2`, so that the last features are 4x4.
    """

    def __init__(
        self, *, n_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        small = image_size == 32
        self.input = Boundary("unit")
        c_in = channels(32, width)
        stem = _convolution(in_channels, c_in, 3, 1 if small else 2)
        stacks: list[nn.Module] = [nn.Sequential(*stem, SiLU())]
        for i, (expansion, size, stride, c, blocks) in enumerate(STACKS):
            c_out = channels(c, width)
            first = 1 if small and i == 1 else stride
            stack = [MBConv(c_in, c_out, size, first, expansion)]
            stack += [MBConv(c_out, c_out, size, 1, expansion) for _ in range(blocks - 1)]
            stacks.append(nn.Sequential(*stack))
            c_in = c_out
        stacks.append(nn.Sequential(*_convolution(c_in, 4 * c_in, 1), SiLU()))
        self.features = nn.Sequential(*stacks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = dropout_and_linear(4 * c_in, n_classes, kind="signed")
        self.output = Boundary("signed", plain=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.pool(self.features(self.input(x))))
        return cast(Tensor, self.output(self.classifier(x)))
