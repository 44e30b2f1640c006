"""ResNets of basic blocks: He et al. (arXiv 1512.03385) and MLPerf Tiny.

Parameter names follow torchvision's ResNet (`conv1`, `layer1.0.conv1`, `downsample.0`,
`fc`). Shortcuts that change the shape are 1x1 convolutions (option B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from resq_deploy.nets.blocks import Add, Boundary


def _conv(c_in: int, c_out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and c_in == c_out
        self.conv1 = _conv(c_in, c_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(c_out, c_out, 3, 1)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if not same:
            self.downsample = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
        self.add = Add(skip_is_quantized=same)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        main = self.relu1(self.bn1(self.conv1(x)))
        main = self.bn2(self.conv2(main))
        return cast(Tensor, self.relu2(self.add(main, self.downsample(x))))


class ResNet(nn.Module):
    """Stem, one stack of `blocks` residual blocks per entry of `channels`, pool, classifier.

    Input (N, in_channels, image_size, image_size) pixels in [0, 1]; output (N, n_classes)
    logits. Every stack but the first halves the resolution. The stem for 32x32 images is a 3x3
    convolution of stride 1 without max pooling (section 4.2 of the paper); for 224x224 it is
    the 7x7 convolution of stride 2 and the max pooling of its table 1.
    """

    def __init__(
        self,
        *,
        blocks: int,
        channels: Sequence[int],
        n_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        small = image_size == 32
        self.input = Boundary("unit")
        self.conv1 = _conv(in_channels, channels[0], 3 if small else 7, 1 if small else 2)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        c_in = channels[0]
        self.stacks = [f"layer{i + 1}" for i in range(len(channels))]
        for name, c_out in zip(self.stacks, channels, strict=True):
            stride = 1 if name == "layer1" else 2
            first = BasicBlock(c_in, c_out, stride)
            rest = (BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1))
            self.add_module(name, nn.Sequential(first, *rest))
            c_in = c_out
        self.pool = nn.AdaptiveAvgPool2d(1)
        # Flatten comes before the quantizer: behind it, onnxruntime keeps the Gemm in float.
        self.flatten = nn.Flatten()
        self.pooled = Boundary("unsigned")
        self.fc = nn.Linear(c_in, n_classes)
        self.output = Boundary("signed", plain=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.input(x)))))
        for name in self.stacks:
            x = self.get_submodule(name)(x)
        x = self.fc(self.pooled(self.flatten(self.pool(x))))
        return cast(Tensor, self.output(x))
