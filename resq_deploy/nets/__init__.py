"""Networks by name. A new network is one module here and one row in `NETS`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from resq_deploy.errors import InputError
from resq_deploy.nets.resnet import ResNet

NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda n_classes, c: ResNet(blocks=1, n_classes=n_classes, in_channels=c),
    "resnet20": lambda n_classes, c: ResNet(blocks=3, n_classes=n_classes, in_channels=c),
}


def build(name: str, *, n_classes: int, in_channels: int, seed: int = 0) -> nn.Module:
    """A float network with fresh weights (PyTorch's default initialization under `seed`)."""
    if name not in NETS:
        raise InputError(f"net {name!r} is unknown; expected one of {', '.join(sorted(NETS))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name](n_classes, in_channels)


__all__ = ["NETS", "build"]
