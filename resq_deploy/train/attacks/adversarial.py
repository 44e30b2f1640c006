"""Plain PGD training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resq_deploy.train.attacks.base import Attack


class Adversarial(Attack):
    """CE(f(x'), y) alone (Madry et al., arXiv 1706.06083).

    No clean image is seen, so the loss on x' stands for the clean loss where one is asked for.
    """

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self.clean(net(self.perturb(net, x, y, generator)), y)
