"""What the methods of stage 1 share: perturbed images, and the features before the classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resq_deploy import recipe
from resq_deploy.nets.quantized import value
from resq_deploy.perturb.inputs import pgd
from resq_deploy.train.objectives import CrossEntropy


class Attack(CrossEntropy):
    """An objective that looks at images under attack; a method defines `loss`."""

    def __init__(self, config: recipe.Attack) -> None:
        super().__init__(config.label_smoothing)
        self.config = config

    def perturb(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """x' made by PGD with a random start; y holds labels (N,) or probabilities (N, C)."""
        c = self.config
        return pgd(
            net, x, y, epsilon=c.epsilon, steps=c.steps, step_size=c.step_size, generator=generator
        )


@contextmanager
def features(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collects h(x), the input of the last layer with weights, of every forward pass inside."""
    last = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(value(args[0])))
    try:
        yield seen
    finally:
        handle.remove()
