"""A fixed number of single upsets."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from resq_deploy.perturb.weights import Masks, k_masks
from resq_deploy.train.faults.base import BitErrors


class KUpset(BitErrors):
    """Exactly `flips` distinct bits flip in every faulty pass (after arXiv 2502.09374, which
    trains under several single upsets per pass; drawing the layers by criticality is ours)."""

    def masks(self, net: nn.Module, x: Tensor, y: Tensor, rng: np.random.Generator) -> Masks:
        return k_masks(net, self.flips(), self.rates(net), rng)
