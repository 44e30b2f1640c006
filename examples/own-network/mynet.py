"""A small classifier in the manner of MobileNetV3, as its owner would write it.

Nothing in here knows resq_deploy; models/digits-own.toml names it.
"""

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, shortcut."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
        )
        self.squeeze = nn.Conv2d(hidden, hidden // 4, 1)
        self.excite = nn.Conv2d(hidden // 4, hidden, 1)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return x + self.project(y * F.hardsigmoid(gate))


def make_net(n_classes=10, channels=16, blocks=2):
    """Takes images (N, 1, H, W) with pixels in [0, 1], returns logits (N, n_classes)."""
    stem = nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(
        stem,
        nn.BatchNorm2d(channels),
        nn.Hardswish(),
        *(Block(channels, 2 * channels) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, n_classes),
    )
