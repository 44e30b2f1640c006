"""What stage 3 weighs: fixed images and fault patterns on which networks are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from resq_deploy import evaluate, recipe, seeds
from resq_deploy.data.base import Dataset
from resq_deploy.perturb.weights import Masks, random_masks

SHARE = 8
"""Every fault pattern is tried on one of so many parts of the images."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What stage 3 weighs, on the calibration images."""

    clean_loss: float
    fault_loss: float
    """Mean cross-entropy over the fixed fault patterns, each on one eighth of the images."""
    objective: float
    """clean_loss + fault_weight * fault_loss"""
    clean_accuracy: float
    adversarial_accuracy: float
    """On adversarial images made once, on the network before stage 3."""


class Bench:
    """The fixed images and fault patterns on which networks are compared."""

    def __init__(
        self, net: nn.Module, images: Dataset, config: recipe.Adjust, *, seed: int, name: str
    ) -> None:
        self.images, self.config, self.seed = images, config, seed
        self.attacked = self.attack(net)
        self.patterns: list[Masks] = [
            random_masks(net, config.rate, seeds.stream(seed, "adjust", name, i))
            for i in range(config.patterns)
        ]

    def attack(self, net: nn.Module) -> NDArray[np.uint8]:
        c = self.config
        return evaluate.adversarial(
            net,
            self.images,
            epsilon=c.epsilon,
            steps=c.steps,
            seed=self.seed,
            what="stage 3 attack",
        )

    def fault_losses(self, net: nn.Module) -> NDArray[np.float64]:
        """Cross-entropy under every pattern, each on every SHARE-th image.

        Patterns differ more than images do, so many patterns on few images each say more.
        """
        losses = []
        for i, masks in enumerate(self.patterns):
            part = self.images.take(slice(i % SHARE, None, SHARE))
            scores = evaluate.logits(net, part.x, masks=masks)
            losses.append(float(F.cross_entropy(scores, torch.from_numpy(part.y))))
        return np.array(losses)

    def terms(self, net: nn.Module) -> Terms:
        clean = evaluate.logits(net, self.images.x)
        attacked = evaluate.logits(net, self.attacked)
        clean_loss = float(F.cross_entropy(clean, torch.from_numpy(self.images.y)))
        fault_loss = float(self.fault_losses(net).mean())
        return Terms(
            clean_loss=clean_loss,
            fault_loss=fault_loss,
            objective=clean_loss + self.config.fault_weight * fault_loss,
            clean_accuracy=evaluate.count(clean, self.images.y).rate,
            adversarial_accuracy=evaluate.count(attacked, self.images.y).rate,
        )


def allowed(new: Terms, start: Terms, margin: float) -> bool:
    """Do clean and adversarial accuracy keep within the margin of what they were?"""
    return (
        new.clean_accuracy >= start.clean_accuracy - margin
        and new.adversarial_accuracy >= start.adversarial_accuracy - margin
    )
