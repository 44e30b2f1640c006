"""Which layers matter, and what share of the bit errors each of them gets."""

from __future__ import annotations

from torch import nn

from resq_deploy import recipe
from resq_deploy.train.loop import weights


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
        """Scores divided by the square root of the layer's size: gradient RMS per weight.

        Empty before the first update.
        """
        return {n: self.norm[n] / w.numel() ** 0.5 for n, w in weights(net).items() if self.norm}

    def ranking(self, net: nn.Module) -> list[dict[str, float | str]]:
        """Most critical layer first; both variants of the score."""
        scores = self.scores(net)
        rows: list[dict[str, float | str]] = [
            {"layer": n, "score": scores[n], "norm": self.norm[n]} for n in scores
        ]
        return sorted(rows, key=lambda row: -float(row["score"]))


def layer_rates(
    scores: dict[str, float], sizes: dict[str, int], config: recipe.Fault, *, rate: float
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
    return {n: min(0.5, rate * share[n] / total) for n in sizes}
