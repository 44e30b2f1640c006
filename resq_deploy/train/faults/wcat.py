"""Quantization ranges that are learned, and pushed down while accuracy holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resq_deploy import recipe
from resq_deploy.train.faults.clip import Clip
from resq_deploy.train.loop import part, weights
from resq_deploy.train.objectives import CrossEntropy

REFERENCE_STEPS = 20
"""Steps whose mean clean loss is what must hold; ranges do not move before."""
FLOOR = 0.05
"""No range becomes smaller than this share of what it was."""


class WCAT(Clip):
    """One range r per layer, learned (ours, after the idea of Chitsaz et al., TMLR, "Training DNNs
    Resilient to Adversarial and Random Bit-Flips by Learning Quantization Ranges").

    Channel c of the layer is clipped to +- r m_c, m_c its max|w| before the stage; r begins at 1,
    never exceeds it, and takes the place of `clip_rms`. r descends on loss + `range_penalty` r
    with step `range_lr`; a clipped weight equals +- r m_c and passes its gradient on to r. The
    penalty is off while the running clean loss is more than `range_margin` above its mean over
    the first steps.
    """

    def __init__(self, config: recipe.Fault, unfaulted: CrossEntropy, *, seed: int) -> None:
        super().__init__(config, unfaulted, seed=seed)
        self.ranges: dict[str, float] = {}
        self.peaks: dict[str, Tensor] = {}
        self.reference = 0.0

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        if not self.peaks:
            for name, w in weights(net).items():
                axes = tuple(range(1, w.ndim))
                self.peaks[name] = w.detach().abs().amax(dim=axes, keepdim=True)
                self.ranges[name] = 1.0
        loss = super().loss(net, x, y, generator)
        if self.steps <= REFERENCE_STEPS:
            self.reference += self.unfaulted.clean_loss / REFERENCE_STEPS
        return loss

    @torch.no_grad()
    def after_backward(self, net: nn.Module) -> None:
        super().after_backward(net)
        if self.steps <= REFERENCE_STEPS:
            return
        holds = self.running <= self.reference + self.config.range_margin
        for name, w in weights(net).items():
            if w.grad is None:
                continue
            peak = self.peaks[name].to(w.device)
            clipped = w.abs() >= self.ranges[name] * peak * (1 - 1e-6)
            slope = float((w.grad * w.sign() * peak * clipped).sum())
            moved = self.ranges[name] - self.config.range_lr * (
                slope + self.config.range_penalty * holds
            )
            self.ranges[name] = min(1.0, max(FLOOR, moved))

    @torch.no_grad()
    def after_step(self, net: nn.Module) -> None:
        for name, w in weights(net).items():
            bound = self.ranges[name] * self.peaks[name].to(w.device)
            torch.minimum(torch.maximum(w, -bound), bound, out=w)

    def state(self) -> dict[str, Tensor]:
        state = super().state() | {"reference": torch.tensor(self.reference, dtype=torch.float64)}
        state |= {f"peak.{n}": peak for n, peak in self.peaks.items()}
        return state | {
            f"range.{n}": torch.tensor(r, dtype=torch.float64) for n, r in self.ranges.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.reference = float(state["reference"])
        self.peaks = part(state, "peak.")
        self.ranges = {n: float(r) for n, r in part(state, "range.").items()}
