"""Networks by name. A new network is one module here and one row in `NETS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resq_deploy.errors import InputError
from resq_deploy.nets.blocks import channels
from resq_deploy.nets.efficientnet import EfficientNetB0
from resq_deploy.nets.mobilenet import MobileNetV2
from resq_deploy.nets.resnet import ResNet
from resq_deploy.nets.swin import SwinTiny
from resq_deploy.nets.vgg import VGG16


@dataclass(frozen=True, kw_only=True)
class Net:
    """One row of `NETS`."""

    make: Callable[..., nn.Module]
    """Takes n_classes, in_channels, image_size and width by keyword."""
    sizes: tuple[int, ...] = (32, 224)
    """Heights (= widths) of the images that the network has a form for."""


def _resnet(blocks: int, *stacks: int) -> Callable[..., nn.Module]:
    def make(*, width: float, **options: Any) -> nn.Module:
        return ResNet(blocks=blocks, channels=[channels(c, width) for c in stacks], **options)

    return make


NETS = {
    "resnet8": Net(make=_resnet(1, 16, 32, 64), sizes=(32,)),
    "resnet20": Net(make=_resnet(3, 16, 32, 64), sizes=(32,)),
    "resnet18": Net(make=_resnet(2, 64, 128, 256, 512)),
    "vgg16": Net(make=VGG16),
    "mobilenetv2": Net(make=MobileNetV2),
    "efficientnet_b0": Net(make=EfficientNetB0),
    "swin_tiny": Net(make=SwinTiny),
}


def build(
    name: str,
    *,
    n_classes: int,
    in_channels: int,
    image_size: int = 32,
    width: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """A float network with fresh weights (PyTorch's default initialization under `seed`).

    It takes images (N, in_channels, image_size, image_size) with pixels in [0, 1] and returns
    logits (N, n_classes); `width` multiplies the number of channels (see `blocks.channels`).
    InputError for an unknown name or an image size that the network has no form for.
    """
    if name not in NETS:
        raise InputError(f"net {name!r} is unknown; expected one of {', '.join(sorted(NETS))}")
    if image_size not in NETS[name].sizes:
        sizes = " or ".join(f"{size}x{size}" for size in NETS[name].sizes)
        raise InputError(f"net {name!r} takes {sizes} images; got image_size {image_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name].make(
            n_classes=n_classes, in_channels=in_channels, image_size=image_size, width=width
        )


__all__ = ["NETS", "Net", "build"]
