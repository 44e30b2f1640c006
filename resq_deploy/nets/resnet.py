"""ResNets for 32x32 images: He et al. (arXiv 1512.03385, section 4.2) and MLPerf Tiny.

Parameter names follow torchvision's ResNet (`conv1`, `layer1.0.conv1`, `downsample.0`,
`fc`). Shortcuts that change the shape are 1x1 convolutions (option B).
"""

from __future__ import annotations

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
    """Stem, three stacks of `blocks` residual blocks (16, 32, 64 channels), pool, classifier.

    Input (N, in_channels, 32, 32) pixels in [0, 1]; output (N, n_classes) logits.
    """

    def __init__(self, *, blocks: int, n_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.input = Boundary("input")
        self.conv1 = _conv(in_channels, 16, 3, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stack(16, 16, blocks, 1)
        self.layer2 = self._stack(16, 32, blocks, 2)
        self.layer3 = self._stack(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        # Flatten comes before the quantizer: behind it, onnxruntime keeps the Gemm in float.
        self.flatten = nn.Flatten()
        self.pooled = Boundary("unsigned")
        self.fc = nn.Linear(64, n_classes)
        self.output = Boundary("signed")

    @staticmethod
    def _stack(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(c_in, c_out, stride)
        return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.input(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.fc(self.pooled(self.flatten(self.pool(x))))
        return cast(Tensor, self.output(x))
