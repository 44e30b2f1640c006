"""Features of perturbed images are drawn to those of the clean ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resq_deploy.train.attacks.base import Attack, features


def feature_distance(clean: Tensor, perturbed: Tensor, kind: str) -> Tensor:
    """Mean over images of 1 - cosine, or of the squared distance relative to the clean norm."""
    clean, perturbed = clean.flatten(1).float(), perturbed.flatten(1).float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(clean, perturbed)).mean()
    return ((clean - perturbed).square().sum(1) / (clean.square().sum(1) + 1e-6)).mean()


class FeatureConsistency(Attack):
    """Stage 1 (our definition of RESQ's first stage, arXiv 2603.15413):

    CE(f(x), y) + a CE(f(x'), y) + b D(h(x), h(x')), x' made by PGD with a random start.
    The clean branch of D is detached: perturbed features move to the clean ones.
    """

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        c = self.config
        x_adv = self.perturb(net, x, y, generator)
        with features(net) as h:
            clean = self.clean(net(x), y)
            adversarial = self.cross_entropy(net(x_adv), y)
        distance = feature_distance(h[0].detach(), h[1], c.distance)
        return clean + c.adversarial_weight * adversarial + c.feature_weight * distance
