"""What each training stage minimises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resq_deploy import recipe, seeds
from resq_deploy.nets.quantized import value
from resq_deploy.perturb.inputs import pgd
from resq_deploy.perturb.weights import bit_errors, random_masks
from resq_deploy.train.loop import weights


class CrossEntropy:
    """Plain classification: float pre-training and the int8 baseline."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.clean_loss = float("inf")
        """Cross-entropy of the last batch's unperturbed images under unperturbed weights."""

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


@contextmanager
def features(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collects h(x), the input of the last linear layer, of every forward pass inside."""
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(value(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def feature_distance(clean: Tensor, perturbed: Tensor, kind: str) -> Tensor:
    """Mean over images of 1 - cosine, or of the squared distance relative to the clean norm."""
    clean, perturbed = clean.flatten(1).float(), perturbed.flatten(1).float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(clean, perturbed)).mean()
    return ((clean - perturbed).square().sum(1) / (clean.square().sum(1) + 1e-6)).mean()


class FeatureConsistency(CrossEntropy):
    """Stage 1 (our definition of RESQ's first stage, arXiv 2603.15413):

    CE(f(x), y) + a CE(f(x'), y) + b D(h(x), h(x')), x' made by PGD with a random start.
    The clean branch of D is detached: perturbed features move to the clean ones.
    """

    def __init__(self, config: recipe.Attack) -> None:
        super().__init__(config.label_smoothing)
        self.config = config

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        c = self.config
        x_adv = pgd(
            net, x, y, epsilon=c.epsilon, steps=c.steps, step_size=c.step_size, generator=generator
        )
        with features(net) as h:
            clean = self.clean(net(x), y)
            adversarial = self.cross_entropy(net(x_adv), y)
        distance = feature_distance(h[0].detach(), h[1], c.distance)
        return clean + c.adversarial_weight * adversarial + c.feature_weight * distance


ATTACKS = {"feature-consistency": FeatureConsistency}


class Criticality:
    """Which layers matter: s <- beta s + (1 - beta) ||dL/dW||_2 after every step (RESQ)."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.norm: dict[str, float] = {}

    def update(self, net: nn.Module) -> None:
        for name, w in weights(net).items():
            if w.grad is not None:
                new = float(w.grad.norm())
                old = self.norm.get(name, new)
                self.norm[name] = self.beta * old + (1 - self.beta) * new

    def scores(self, net: nn.Module) -> dict[str, float]:
        """Scores divided by the square root of the layer's size: gradient RMS per weight."""
        return {n: self.norm[n] / w.numel() ** 0.5 for n, w in weights(net).items()}

    def ranking(self, net: nn.Module) -> list[dict[str, float | str]]:
        """Most critical layer first; both variants of the score."""
        scores = self.scores(net)
        rows: list[dict[str, float | str]] = [
            {"layer": n, "score": scores[n], "norm": self.norm[n]} for n in scores
        ]
        return sorted(rows, key=lambda row: -float(row["score"]))


def layer_rates(
    scores: dict[str, float], sizes: dict[str, int], config: recipe.Fault
) -> dict[str, float]:
    """Bit error rate per layer, so that the expected number of errors is that of `rate`.

    `proportional`: rate_l ~ score_l, at most four times and at least a quarter of the
    average before normalising, so that no layer goes untrained; `top-k`: the k highest
    scores share all errors; `none`: the same rate everywhere.
    """
    if config.guided == "none" or not scores:
        share = dict.fromkeys(sizes, 1.0)
    elif config.guided == "top-k":
        top = sorted(scores, key=lambda n: -scores[n])[: config.top_k]
        share = {n: float(n in top) for n in sizes}
    else:
        mean = sum(scores[n] * sizes[n] for n in sizes) / sum(sizes.values())
        share = {n: min(4.0, max(0.25, scores[n] / (mean + 1e-30))) for n in sizes}
    total = sum(share[n] * sizes[n] for n in sizes) / sum(sizes.values())
    return {n: min(0.5, config.rate * share[n] / total) for n in sizes}


class RandBET(CrossEntropy):
    """Stage 2: clean and faulty pass on the same batch, fresh bit errors every step.

    RandBET (Stutz et al., arXiv 2006.13977, 2104.08323) in the stored integer codes; errors
    begin once the running clean loss is below `start_loss`. Weights are clipped per channel
    to `clip_rms` root mean squares after every step. `unfaulted` is the loss of the unperturbed
    weights: stage 1's with `keep_attack`, else cross-entropy.
    """

    def __init__(self, config: recipe.Fault, unfaulted: CrossEntropy, *, seed: int) -> None:
        super().__init__(config.label_smoothing)
        self.config = config
        self.unfaulted = unfaulted
        self.seed = seed
        self.criticality = Criticality(config.ema_beta)
        self.steps = 0
        self.running = float("inf")
        self.started = False

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        loss = self.unfaulted.loss(net, x, y, generator)
        new = self.unfaulted.clean_loss
        self.running = 0.9 * self.running + 0.1 * new if self.steps else new
        self.started |= self.running < self.config.start_loss
        if self.started:
            sizes = {n: w.numel() for n, w in weights(net).items()}
            scores = self.criticality.scores(net) if self.criticality.norm else {}
            rates = layer_rates(scores, sizes, self.config)
            masks = random_masks(net, rates, seeds.stream(self.seed, "bit errors", self.steps))
            with bit_errors(net, masks):
                loss = loss + self.config.fault_weight * self.cross_entropy(net(x), y)
        self.steps += 1
        return loss

    def after_backward(self, net: nn.Module) -> None:
        self.criticality.update(net)

    @torch.no_grad()
    def after_step(self, net: nn.Module) -> None:
        if self.config.clip_rms is not None:
            for w in weights(net).values():
                clip_per_channel(w, self.config.clip_rms)

    def state(self) -> dict[str, Tensor]:
        state = {f"norm.{n}": torch.tensor(v, dtype=torch.float64) for n, v in
                 self.criticality.norm.items()}  # fmt: skip
        state["steps"] = torch.tensor(self.steps)
        state["running"] = torch.tensor(self.running, dtype=torch.float64)
        state["started"] = torch.tensor(self.started)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state.pop("steps"))
        self.running = float(state.pop("running"))
        self.started = bool(state.pop("started"))
        self.criticality.norm = {k.removeprefix("norm."): float(v) for k, v in state.items()}


FAULTS = {"randbet": RandBET}


@torch.no_grad()
def clip_per_channel(w: Tensor, rms: float) -> None:
    """Clamp in place to +- `rms` root mean squares of each output channel (axis 0)."""
    axes = tuple(range(1, w.ndim))
    bound = rms * w.square().mean(dim=axes, keepdim=True).sqrt()
    torch.minimum(torch.maximum(w, -bound), bound, out=w)


__all__ = [
    "ATTACKS",
    "FAULTS",
    "Criticality",
    "CrossEntropy",
    "FeatureConsistency",
    "RandBET",
    "clip_per_channel",
]
