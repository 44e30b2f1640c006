"""What the methods with bit errors share: when they begin, how strong they are, both passes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from resq_deploy import recipe, seeds
from resq_deploy.perturb.weights import Masks, bit_errors
from resq_deploy.train.faults.clip import Clip
from resq_deploy.train.faults.criticality import layer_rates
from resq_deploy.train.loop import weights
from resq_deploy.train.objectives import CrossEntropy


class BitErrors(Clip):
    """Clean and faulty pass on the same batch, fresh errors every step; a method defines `masks`.

    Errors begin once the running clean loss is below `start_loss`, and then stay.
    """

    def __init__(self, config: recipe.Fault, unfaulted: CrossEntropy, *, seed: int) -> None:
        super().__init__(config, unfaulted, seed=seed)
        self.started = False

    def masks(self, net: nn.Module, x: Tensor, y: Tensor, rng: np.random.Generator) -> Masks:
        """The bits that flip in this step."""
        raise NotImplementedError

    def strength(self) -> float:
        """Share in (0, 1] of the full rate that `rate_schedule` gives this step."""
        if self.config.rate_schedule == "constant":
            return 1.0
        return min(1.0, 2 * self.steps / max(1, self.total))

    def rates(self, net: nn.Module) -> dict[str, float]:
        """Bit error rate of every layer in this step, by criticality and schedule."""
        sizes = {n: w.numel() for n, w in weights(net).items()}
        rate = self.config.rate * self.strength()
        return layer_rates(self.criticality.scores(net), sizes, self.config, rate=rate)

    def flips(self) -> int:
        """Number of flips in this step, by schedule; at least 1."""
        return max(1, round(self.config.flips * self.strength()))

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        rng = seeds.stream(self.seed, "bit errors", self.steps)
        loss = super().loss(net, x, y, generator)
        self.started |= self.running < self.config.start_loss
        if self.started:
            with bit_errors(net, self.masks(net, x, y, rng)):
                loss = loss + self.config.fault_weight * self.cross_entropy(net(x), y)
        return loss

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"started": torch.tensor(self.started)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.started = bool(state["started"])
