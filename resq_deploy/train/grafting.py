"""Linearity grafting: the channels whose ReLU matters least become linear before stage 1.

Grafting (Chen et al., arXiv 2206.07839) puts linear pieces gamma x + beta in the place of ReLUs. In
an int8 network gamma is part of the weights before, and so can beta be: with a bias that keeps a
channel above zero its ReLU passes everything, and the file has no other operators than it had.
What is paid is resolution: the layer's activations have a wider range. Channels instead of single
neurons (the same place of the image) because a convolution has one bias per channel; which ones is
decided by the loss alone, where the paper looks at the stability under attack too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resq_deploy import evaluate
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.nets.posttraining import match_mean, output_means
from resq_deploy.nets.quantized import QuantTracer, ranges, value, weight_layers

Channels = dict[str, list[int]]
"""Numbers of output channels by the name of their layer."""


def sites(net: nn.Module) -> dict[str, str]:
    """Layer -> ReLU, for every weight layer whose output nothing but that ReLU reads."""
    layers, relus = weight_layers(net), ranges(net)

    def readers(node: fx.Node) -> list[str]:
        """What reads a node, behind what was a batch norm."""
        names = []
        for user in node.users:
            name = str(user.target)
            empty = user.op == "call_module" and type(net.get_submodule(name)) is nn.Identity
            names += readers(user) if empty else [name]
        return names

    nodes = list(QuantTracer().trace(net).nodes)
    names = [str(node.target) for node in nodes]
    found = {}
    for node, name in zip(nodes, names, strict=True):
        alone = readers(node) if name in layers and names.count(name) == 1 else []
        if len(alone) == 1 and alone[0] in relus and names.count(alone[0]) == 1:
            found[name] = alone[0]
    return found


def _rows(y: Tensor) -> Tensor:
    """(N, C, H, W) or (N, C) as (N, C, positions)."""
    return y.reshape(*y.shape[:2], -1)


@contextmanager
def _outputs(net: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules return, of the last run."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            kept[name] = value(out)

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _batches(images: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), evaluate.BATCH):
        part = slice(start, start + evaluate.BATCH)
        yield evaluate.tensor(images.x[part]), torch.from_numpy(images.y[part])


@torch.no_grad()
def _span(net: nn.Module, name: str, images: Dataset) -> tuple[Tensor, Tensor]:
    """The least and the greatest output of a layer over images and positions, per channel."""
    low, high = [], []
    with _outputs(net, [name]) as kept:
        for x, _ in _batches(images):
            net(x)
            rows = _rows(kept[name])
            low.append(rows.amin(dim=(0, 2)))
            high.append(rows.amax(dim=(0, 2)))
    return torch.stack(low).amin(dim=0), torch.stack(high).amax(dim=0)


def sensitivity(net: nn.Module, pairs: dict[str, str], images: Dataset) -> dict[str, Tensor]:
    """What the loss changes by, to first order, where a channel's ReLU becomes linear.

    Per channel of every layer in `pairs`, as `sites` gives them: the mean over images of
    |sum over positions of dL/dy (m - mean m)|, y the ReLU's output, m = min(x, 0) of its input x.
    The mean is left out because the biases behind take it up.
    """
    sums = {name: torch.zeros(()) for name in pairs}
    with torch.no_grad(), _outputs(net, list(pairs)) as kept:
        for x, _ in _batches(images):
            net(x)
            for name in pairs:
                below = _rows(kept[name]).clamp_max(0)
                sums[name] = sums[name] + below.mean(dim=2).sum(dim=0)
    found = {name: torch.zeros(()) for name in pairs}
    with evaluate.frozen(net), _outputs(net, [*pairs, *pairs.values()]) as kept:
        for x, y in _batches(images):
            loss = F.cross_entropy(value(net(x.requires_grad_())), y, reduction="sum")
            gradients = torch.autograd.grad(loss, [kept[relu] for relu in pairs.values()])
            for name, gradient in zip(pairs, gradients, strict=True):
                mean = (sums[name] / len(images)).reshape(1, -1, 1)
                moved = _rows(kept[name].detach()).clamp_max(0) - mean
                change = (_rows(gradient) * moved).sum(dim=2).abs().sum(dim=0)
                found[name] = found[name] + change / len(images)
    return found


def choose(scores: dict[str, Tensor], share: float) -> Channels:
    """The share (0 ... 1) of all channels with the least scores, at least one."""
    flat = torch.cat(list(scores.values()))
    taken = torch.zeros(len(flat), dtype=torch.bool)
    taken[flat.argsort(stable=True)[: max(1, round(share * len(flat)))]] = True
    parts = zip(scores, taken.split([len(score) for score in scores.values()]), strict=True)
    return {name: part.nonzero().flatten().tolist() for name, part in parts if part.any()}


@torch.no_grad()
def graft(net: nn.Module, images: Dataset, share: float) -> Channels:
    """Make the ReLUs of a share of all channels linear on these images, in place; returns which.

    Layer by layer in the order of the network: the bias brings the layer's mean output to what it
    was, then lifts the chosen channels until none of their outputs is negative, and the range of
    the ReLU's quantizer grows to hold them. InputError for a network without a weight layer whose
    output a ReLU alone reads.
    """
    net.eval()
    pairs = sites(net)
    if not pairs:
        raise InputError(
            "attack.graft given, but in this network no ReLU is the only reader of a convolution "
            "or a linear layer; leave attack.graft out"
        )
    with torch.enable_grad():
        chosen = choose(sensitivity(net, pairs, images), share)
    x, tops = evaluate.tensor(images.x), ranges(net)
    for name, target in output_means(net, x).items():
        match_mean(net, name, target, x)
        if name in chosen:
            at = torch.tensor(chosen[name])
            low, high = _span(net, name, images)
            lift = (-low[at]).clamp_min(0)
            cast(Tensor, weight_layers(net)[name].bias)[at] += lift
            top = tops[pairs[name]]
            top.copy_(torch.maximum(top.abs(), (high[at] + lift).amax()))
    return chosen


@torch.no_grad()
def clipped(net: nn.Module, chosen: Channels, images: Dataset) -> float:
    """The share of the outputs of these channels that are negative, over images and positions."""
    net.eval()
    negative = total = 0
    with _outputs(net, list(chosen)) as kept:
        for x, _ in _batches(images):
            net(x)
            for name, channels in chosen.items():
                rows = _rows(kept[name])[:, channels]
                negative, total = negative + int((rows < 0).sum()), total + rows.numel()
    return negative / total
