"""MobileNetV2: Sandler et al. (arXiv 1801.04381).

Parameter names follow torchvision's `mobilenet_v2` (`features.0.0`, `features.1.conv.0.0`,
`classifier.1`).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from resq_deploy.nets.blocks import Add, Boundary, channels, dropout_and_linear

# expansion, channels, blocks, stride of the first block: table 2 of the paper
BLOCKS = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def _convolution(c_in: int, c_out: int, size: int, stride: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection, shortcut where the shape stays:
    (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        layers = [_convolution(c_in, hidden, 1, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *layers,
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.add = Add(skip_is_quantized=True) if stride == 1 and c_in == c_out else None
        self.out = Boundary("signed")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return cast(Tensor, self.out(y if self.add is None else self.add(y, x)))


class MobileNetV2(nn.Module):
    """Stem, seventeen inverted residual blocks, 1x1 convolution, pool, classifier.

    Input (N, in_channels, image_size, image_size) pixels in [0, 1]; output (N, n_classes)
    logits. For 32x32 images the stem and the first stack of stride 2 have stride 1, so that
    the last features are 4x4 (the CIFAR form of kuangliu/pytorch-cifar).
    """

    def __init__(
        self, *, n_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        small = image_size == 32
        self.input = Boundary("unit")
        c_in = channels(32, width)
        layers: list[nn.Module] = [_convolution(in_channels, c_in, 3, 1 if small else 2)]
        for i, (expansion, c, blocks, stride) in enumerate(BLOCKS):
            c_out = channels(c, width)
            for block in range(blocks):
                first = stride if block == 0 and not (small and i == 1) else 1
                layers.append(InvertedResidual(c_in, c_out, first, expansion))
                c_in = c_out
        last = channels(1280, max(1.0, width))
        layers.append(_convolution(c_in, last, 1, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = dropout_and_linear(last, n_classes, kind="unsigned")
        self.output = Boundary("signed", plain=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.pool(self.features(self.input(x))))
        return cast(Tensor, self.output(self.classifier(x)))
