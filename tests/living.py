"""Networks and images for tests of exported files, in which no activation fades away.

Fresh networks map noise to one and the same output; here batch norms know the images, and the
images differ on a large scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from resq_deploy.nets import build
from resq_deploy.nets.quantized import calibrate, quantize


def images(n: int) -> np.ndarray:
    """uint8 (n, 3, 32, 32) of 4x4 coloured squares."""
    squares = np.random.default_rng(0).integers(0, 256, (n, 3, 4, 4)).astype(np.uint8)
    return squares.repeat(8, axis=2).repeat(8, axis=3)


def network(name: str, width: float, **options: Any) -> nn.Module:
    """A calibrated int8 network for them; `options` are those of `quantize`."""
    net = build(name, n_classes=10, in_channels=3, width=width, seed=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain averages
    x = torch.from_numpy(images(8)).float() / 255
    with torch.no_grad():
        net.train()(x)
    net = quantize(net.eval(), **options)
    calibrate(net, x)
    return net.eval()
