"""Bounds learned per neuron: FitAct (Ghavami et al., arXiv 2112.13544)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from resq_deploy import bounds, progress, seeds
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.errors import InputError
from resq_deploy.nets import checkpoint

EPOCHS, BATCH, RATE = 2, 64, 0.01
"""RATE of Adam, for bounds relative to where they begin."""
PRICE = 0.3
"""What the mean square of the relative bounds weighs beside the cross-entropy."""
STEEPNESS = 20.0
"""Of the sigmoid that stands for the bound while it is learned, over a neuron's range."""
LOST = 0.01
"""Accuracy that the bounds may cost on the images that were kept back."""
KEPT_BACK = 4
"""One image in so many is kept back."""

How = Literal["free", "hard", "soft"]
"""Without bounds; 0 beyond them, as in the file; FitAct's smooth step, which has a gradient."""


class _Bounded:
    """A float network with each output x of a ReLU bounded at r times its peak."""

    def __init__(self, net: nn.Module, peaks: list[Tensor]) -> None:
        self.net, self.peaks = net.requires_grad_(False), peaks
        self.ratios = [torch.ones_like(peak, requires_grad=True) for peak in peaks]
        self.how: How = "free"
        self.seen: list[Tensor] = []
        """Outputs of the ReLUs in the last run, in the order of the network, before the bound."""
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._bound)

    def _bound(self, module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        i = len(self.seen)
        self.seen.append(x)
        if self.how == "free":
            return x
        relative = x / self.peaks[i].clamp_min(torch.finfo(x.dtype).tiny)
        if self.how == "hard":
            return torch.where(relative <= self.ratios[i], x, torch.zeros_like(x))
        return x * torch.sigmoid(STEEPNESS * (self.ratios[i] - relative))

    def run(self, x: Tensor, how: How) -> Tensor:
        """Logits (N, C)."""
        self.seen, self.how = [], how
        return self.net(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """With hard bounds."""
        chosen = torch.cat([self.run(part, "hard").argmax(1) for part in torch.split(x, BATCH)])
        return float((chosen == y).double().mean())


def _check(net: _Bounded, x: Tensor, twin: Path) -> None:
    """InputError unless the ReLUs of the network reach the peaks of those of the file on `x`."""
    found: list[Tensor] = []
    with torch.no_grad():
        for part in torch.split(x, BATCH):
            net.run(part, "free")
            peaks = [seen.amax(0) for seen in net.seen]
            found = list(map(torch.maximum, found, peaks)) or peaks
    same = len(found) == len(net.peaks) and all(
        mine.shape == peak.shape and (mine - peak).abs().max() <= 1e-3 * peak.max()
        for mine, peak in zip(found, net.peaks, strict=True)
    )
    if not same:
        raise InputError(
            f"{twin} is not the twin of the model: what its ReLUs give differs; expected the "
            "float checkpoint that the model was exported from"
        )


def learn(
    model: onnx.ModelProto, images: Dataset, twin: Path, *, show: progress.Progress
) -> dict[str, Any]:
    """Lower the bounds that `bound` has put as `learned`, in place, by gradient descent.

    The weights stay; the bounds minimise cross-entropy + PRICE times the mean square of the bounds,
    each relative to its neuron's peak on `images` (ours: FitAct takes them as they are), with
    FitAct's x sigmoid(k (bound - x)) for the bounded output. `twin` is the float checkpoint of the
    model, in which gradients are computed. One image in KEPT_BACK is kept back: bounds are those
    of the last epoch that costs no more than LOST of the accuracy there, or stay.
    Returns what was done. InputError when the checkpoint is not the model's.
    """
    limits = bounds.limits(model)
    peaks = [torch.from_numpy(numpy_helper.to_array(limit).copy()) for limit in limits]
    net = _Bounded(checkpoint.load(twin)[0], peaks)
    x, y = torch.from_numpy(as_float(images.x)), torch.from_numpy(images.y)
    _check(net, x, twin)
    n = max(1, len(x) // KEPT_BACK)
    before = accuracy = net.accuracy(x[:n], y[:n])
    chosen, epoch = [torch.ones_like(peak) for peak in peaks], 0
    optimizer, order = torch.optim.Adam(net.ratios, RATE), seeds.stream(0, "learned bounds")
    with show(EPOCHS * (len(x) - n), "images to learn bounds from") as bar:
        for step in range(1, EPOCHS + 1):
            shuffled = torch.from_numpy(n + order.permutation(len(x) - n))
            for index in torch.split(shuffled, BATCH):
                price = torch.cat([ratio.flatten() for ratio in net.ratios]).square().mean()
                loss = F.cross_entropy(net.run(x[index], "soft"), y[index]) + PRICE * price
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                with torch.no_grad():
                    for ratio in net.ratios:
                        ratio.clamp_(0, 1)
                bar.update(len(index))
            now = net.accuracy(x[:n], y[:n])
            if now >= before - LOST:
                chosen, accuracy, epoch = [r.detach().clone() for r in net.ratios], now, step
    for limit, peak, ratio in zip(limits, peaks, chosen, strict=True):
        limit.raw_data = np.asarray(ratio * peak, np.float32).tobytes()
    return {
        "epochs": epoch,
        "n_images": len(x) - n,
        "n_kept_back": n,
        "accuracy_before": before,
        "accuracy": accuracy,
        "mean_ratio": float(torch.cat([ratio.flatten() for ratio in chosen]).mean()),
    }
