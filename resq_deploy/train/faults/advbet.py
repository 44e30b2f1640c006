"""Bit errors that an adversary would choose."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from resq_deploy.perturb.weights import Masks, worst_masks
from resq_deploy.train.faults.base import BitErrors
from resq_deploy.train.loop import weights


class AdvBET(BitErrors):
    """The `flips` bits that raise the loss most to first order flip (after AdvBET, Stutz et al.,
    arXiv 2104.08323).

    Ours: one gradient step instead of projected ascent over bits, at the price of one more
    forward and backward pass. The gradient chooses the layers; `guided` has no effect.
    """

    def masks(self, net: nn.Module, x: Tensor, y: Tensor, rng: np.random.Generator) -> Masks:
        layers = weights(net)
        found = torch.autograd.grad(self.cross_entropy(net(x), y), list(layers.values()))
        return worst_masks(net, self.flips(), dict(zip(layers, found, strict=True)))
