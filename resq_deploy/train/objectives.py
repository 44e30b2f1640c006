"""Plain classification: what the methods of stage 1 (attacks/) and 2 (faults/) begin with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resq_deploy.nets.quantized import value


class CrossEntropy:
    """Plain classification: float pre-training and the int8 baseline."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.clean_loss = float("inf")
        """Cross-entropy of the last batch's unperturbed images under unperturbed weights."""

    def begin(self, steps: int) -> None:
        pass

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self.clean(net(x), y)

    def clean(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = self.cross_entropy(logits, y)
        self.clean_loss = float(loss.detach())
        return loss

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(value(logits).float(), y, label_smoothing=self.label_smoothing)

    def after_backward(self, net: nn.Module) -> None:
        pass

    def after_step(self, net: nn.Module) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass
