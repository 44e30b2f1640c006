"""Clipped weights: a flipped bit then moves a weight by less."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resq_deploy import recipe
from resq_deploy.train.faults.criticality import Criticality
from resq_deploy.train.loop import part, weights
from resq_deploy.train.objectives import CrossEntropy


class Clip(CrossEntropy):
    """Stage 2 without faults, and what every method of stage 2 begins with.

    Weights are clipped per channel to `clip_rms` root mean squares after every step (the w_max
    of Stutz et al., arXiv 2006.13977, relative to the channel). `unfaulted` is the loss of the
    unperturbed weights: stage 1's with `keep_attack`, else cross-entropy.
    """

    def __init__(self, config: recipe.Fault, unfaulted: CrossEntropy, *, seed: int) -> None:
        super().__init__(config.label_smoothing)
        self.config = config
        self.unfaulted = unfaulted
        self.seed = seed
        self.criticality = Criticality(config.ema_beta)
        self.steps = 0
        """Steps of this stage so far."""
        self.total = 0
        """Steps of the whole stage; 0 where nobody said."""
        self.running = float("inf")
        """Moving average of the clean loss."""

    def begin(self, steps: int) -> None:
        self.total = steps

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        loss = self.unfaulted.loss(net, x, y, generator)
        new = self.unfaulted.clean_loss
        self.running = 0.9 * self.running + 0.1 * new if self.steps else new
        self.steps += 1
        return loss

    def after_backward(self, net: nn.Module) -> None:
        self.criticality.update(net)

    @torch.no_grad()
    def after_step(self, net: nn.Module) -> None:
        if self.config.clip_rms > 0:
            for w in weights(net).values():
                clip_per_channel(w, self.config.clip_rms)

    def state(self) -> dict[str, Tensor]:
        state = {f"norm.{n}": torch.tensor(v, dtype=torch.float64) for n, v in
                 self.criticality.norm.items()}  # fmt: skip
        state["steps"] = torch.tensor(self.steps)
        state["running"] = torch.tensor(self.running, dtype=torch.float64)
        return state | {f"unfaulted.{k}": v for k, v in self.unfaulted.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        self.running = float(state["running"])
        self.criticality.norm = {k: float(v) for k, v in part(state, "norm.").items()}
        self.unfaulted.load_state(part(state, "unfaulted."))


@torch.no_grad()
def clip_per_channel(w: Tensor, rms: float) -> None:
    """Clamp in place to +- `rms` root mean squares of each output channel (axis 0)."""
    axes = tuple(range(1, w.ndim))
    bound = rms * w.square().mean(dim=axes, keepdim=True).sqrt()
    torch.minimum(torch.maximum(w, -bound), bound, out=w)
