"""What is done to a network without training it, around its quantization."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import torch
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.equalize import EqualizeGraph
from torch import Tensor, fx, nn

from resq_deploy.nets.quantized import MarkerTracer, fold, value, weight_layers


def equalize(net: nn.Module, iterations: int) -> nn.Module:
    """A folded copy of a float network whose neighbouring layers have weights of like size.

    Cross-layer equalization (Nagel et al., arXiv 1906.04721, section 4.1): channels are scaled
    between layers that only ReLUs, poolings and the like separate; the function stays the same
    up to float rounding.
    """
    net = fold(net)
    # The graph shares its modules with `net`: their weights are changed in place.
    graph = fx.GraphModule(net, MarkerTracer().trace(net))
    EqualizeGraph(iterations=iterations, merge_bias=False).apply(graph)
    return net


@torch.no_grad()
def correct_biases(net: nn.Module, x: Tensor, *, batch: int = 128) -> None:
    """Shift the biases of a calibrated int8 network, in place, so that every layer's mean output
    per channel on images x (N, C, H, W) is that of its float weights (Brevitas' algorithm)."""
    net.eval()
    with bias_correction_mode(net):
        for start in range(0, len(x), batch):
            net(x[start : start + batch])


@torch.no_grad()
def output_means(net: nn.Module, x: Tensor, *, batch: int = 250) -> dict[str, Tensor]:
    """What every weight layer returns for images x (N, C, H, W): its mean over images and positions
    (pixels, tokens), per channel, by layer name, in the order in which layers run."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            y = value(out).transpose(0, 1).flatten(1).double()  # (channels, images x positions)
            sums[name] = sums.get(name, torch.zeros(())) + y.sum(dim=1)
            counts[name] = counts.get(name, 0) + y.shape[1]

        return hook

    net.eval()
    with ExitStack() as stack:
        for name, layer in weight_layers(net).items():
            stack.callback(layer.register_forward_hook(keep(name)).remove)
        for start in range(0, len(x), batch):
            net(x[start : start + batch])
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def match_mean(net: nn.Module, name: str, target: Tensor, x: Tensor) -> None:
    """Shift the bias of the layer `name` in place so that its mean output per channel on images x
    is `target`, one of `output_means`."""
    bias = cast(Tensor, weight_layers(net)[name].bias)
    bias += (target - output_means(net, x)[name]).to(bias.dtype)
