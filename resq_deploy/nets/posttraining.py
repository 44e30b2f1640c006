"""What is done to a network without training it, around its quantization (Brevitas' algorithms)."""

from __future__ import annotations

import torch
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.equalize import EqualizeGraph
from torch import Tensor, fx, nn

from resq_deploy.nets.quantized import MarkerTracer, fold


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
    per channel on images x (N, C, H, W) is that of its float weights."""
    net.eval()
    with bias_correction_mode(net):
        for start in range(0, len(x), batch):
            net(x[start : start + batch])
