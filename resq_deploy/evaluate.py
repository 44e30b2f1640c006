"""What a checkpoint does, in PyTorch float32: clean, attacked, and with flipped codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_deploy import progress, seeds
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.nets.quantized import value
from resq_deploy.perturb.inputs import on_pixel_grid, pgd
from resq_deploy.perturb.weights import Masks, bit_errors
from resq_deploy.records import Count

BATCH = 250


def tensor(x: NDArray[np.generic]) -> Tensor:
    """Images (N, C, H, W) as float32 pixels in [0, 1], in the layout that convolutions like."""
    return torch.from_numpy(as_float(x)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def logits(net: nn.Module, x: NDArray[np.generic], *, masks: Masks | None = None) -> Tensor:
    """Dequantized logits (N, n_classes) of uint8 images, optionally with flipped codes."""
    net.eval()
    with bit_errors(net, masks or {}):
        parts = [value(net(tensor(x[i : i + BATCH]))) for i in range(0, len(x), BATCH)]
    return torch.cat(parts)


def count(scores: Tensor, y: NDArray[np.int64]) -> Count:
    """How many arg maxes are the label."""
    return Count(n_correct=int((scores.argmax(1).numpy() == y).sum()), n_total=len(y))


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Inside the context no parameter collects gradients: attacks only need those of the input."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def adversarial(
    net: nn.Module,
    data: Dataset,
    *,
    epsilon: float,
    steps: int,
    restarts: int = 1,
    seed: int = 0,
    what: str = "attack",
) -> NDArray[np.uint8]:
    """White-box PGD on `net`, as uint8 images within epsilon (pixels in [0, 1]) of `data.x`.

    An image that is misclassified is left as it is; every restart attacks the ones that
    withstood the earlier ones.
    """
    net.eval()
    result = np.array(data.x)
    with frozen(net), progress.bar(len(data), what) as bar:
        for start in range(0, len(data), BATCH):
            part = slice(start, start + BATCH)
            clean, y = tensor(data.x[part]), torch.from_numpy(data.y[part])
            adv = result[part]
            for restart in range(restarts):
                left = (logits(net, adv).argmax(1) == y).nonzero().flatten()
                if len(left) == 0:
                    break
                generator = torch.Generator().manual_seed(
                    seeds.integer(seed, "attack", round(epsilon * 1e9), start, restart)
                )
                found = pgd(
                    net, clean[left], y[left], epsilon=epsilon, steps=steps, step_size=1.25,
                    generator=generator, early_stop=True,
                )  # fmt: skip
                adv[left.numpy()] = on_pixel_grid(found, clean[left], epsilon=epsilon).numpy()
            bar.update(len(y))
    return result
