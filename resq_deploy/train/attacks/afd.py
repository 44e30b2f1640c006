"""Features from which an adversary cannot tell clean from perturbed images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resq_deploy import recipe
from resq_deploy.nets.quantized import value
from resq_deploy.train.attacks.base import Attack, features
from resq_deploy.train.loop import part


class Discriminator(nn.Module):
    """Logit that features h (N, F) of class y (N,) belong to a clean image.

    psi(z) + <v_y, z> with z = relu(A h + b): the projection discriminator of Miyato and Koyama,
    arXiv 1802.05637, with one hidden layer.
    """

    def __init__(self, n_features: int, n_classes: int, n_hidden: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_features, n_hidden)
        self.out = nn.Linear(n_hidden, 1)
        self.classes = nn.Embedding(n_classes, n_hidden)
        nn.init.zeros_(self.classes.weight)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        z = F.relu(self.hidden(h))
        logit: Tensor = self.out(z).squeeze(1) + (self.classes(y) * z).sum(1)
        return logit


class AFD(Attack):
    """CE(f(x), y) + a CE(f(x'), y) + b softplus(-D(h(x'), y)): Adversarial Feature
    Desensitization (Bashivan et al., arXiv 2006.04621).

    Every step D first learns softplus(-D(h(x), y)) + softplus(D(h(x'), y)) on detached features,
    with Adam. Ours: the term a (0 gives the paper's loss) and the size of D. D begins anew in
    every stage that keeps this loss.
    """

    def __init__(self, config: recipe.Attack) -> None:
        super().__init__(config)
        self.discriminator: Discriminator | None = None
        self._saved: dict[str, Tensor] = {}

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        c = self.config
        x_adv = self.perturb(net, x, y, generator)
        with features(net) as h:
            logits = value(net(x))
            adversarial = self.cross_entropy(net(x_adv), y)
        clean_h, adv_h = (seen.flatten(1).float() for seen in h)
        with torch.autocast(x.device.type, enabled=False):
            if self.discriminator is None:
                self._build(clean_h, logits.shape[1], generator)
            self.learn(clean_h.detach(), adv_h.detach(), y)
            hidden = F.softplus(-self._judge(adv_h, y)).mean()
        clean = self.clean(logits, y)
        return clean + c.adversarial_weight * adversarial + c.feature_weight * hidden

    def learn(self, clean: Tensor, perturbed: Tensor, y: Tensor) -> float:
        """One step of the discriminator on features (N, F); returns its loss before the step."""
        self._adam.zero_grad()
        loss = (F.softplus(-self._judge(clean, y)) + F.softplus(self._judge(perturbed, y))).mean()
        loss.backward()
        self._adam.step()
        return float(loss.detach())

    def _judge(self, h: Tensor, y: Tensor) -> Tensor:
        assert self.discriminator is not None
        logit: Tensor = self.discriminator(h, y)
        return logit

    def _build(self, h: Tensor, n_classes: int, generator: torch.Generator) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.discriminator = Discriminator(h.shape[1], n_classes).to(h.device)
        self._adam = torch.optim.Adam(
            self.discriminator.parameters(), lr=self.config.discriminator_lr
        )
        if self._saved:
            self.discriminator.load_state_dict(part(self._saved, "discriminator."))
            adam = part(self._saved, "adam.")
            for name, p in self.discriminator.named_parameters():
                found = part(adam, f"{name}.")
                self._adam.state[p] = {k: v.to(p.device) for k, v in found.items() if k != "step"}
                self._adam.state[p]["step"] = found["step"]

    def state(self) -> dict[str, Tensor]:
        if self.discriminator is None:
            return self._saved
        state = {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        for name, p in self.discriminator.named_parameters():
            state |= {f"adam.{name}.{k}": v for k, v in self._adam.state[p].items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        # The discriminator is built, on the right device, with the first features.
        self._saved = state
