"""Clean accuracy, and answers that a perturbation does not move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resq_deploy.nets.quantized import value
from resq_deploy.train.attacks.base import Attack


class Trades(Attack):
    """CE(f(x), y) + a KL(p(x) || p(x')) (TRADES, Zhang et al., arXiv 1901.08573).

    x' maximises the same divergence: cross-entropy against p(x) differs from it by a constant.
    Ours: x' starts anywhere in the ball, as in the other methods, and not beside x.
    """

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        logits = value(net(x)).float()
        p = logits.softmax(1)
        x_adv = self.perturb(net, x, p.detach(), generator)
        log_p_adv = value(net(x_adv)).float().log_softmax(1)
        divergence = F.kl_div(log_p_adv, p, reduction="batchmean")
        return self.clean(logits, y) + self.config.adversarial_weight * divergence
