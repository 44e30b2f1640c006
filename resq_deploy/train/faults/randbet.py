"""Random bit errors."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from resq_deploy.perturb.weights import Masks, random_masks
from resq_deploy.train.faults.base import BitErrors


class RandBET(BitErrors):
    """Every stored bit flips with probability `rate` (Stutz et al., arXiv 2006.13977, 2104.08323),
    more often in critical layers where `guided` says so (RESQ)."""

    def masks(self, net: nn.Module, x: Tensor, y: Tensor, rng: np.random.Generator) -> Masks:
        return random_masks(net, self.rates(net), rng)
