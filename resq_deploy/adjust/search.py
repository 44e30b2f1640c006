"""The search of stage 3: clip ratios of weights, and of the ranges of activations, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import EllipsisType
from typing import Any, cast

import torch
from torch import Tensor, nn

from resq_deploy import progress, recipe
from resq_deploy.adjust.bench import Bench, allowed
from resq_deploy.nets.quantized import ranges, weight_layers


def clip(w: Tensor, ratio: float) -> Tensor:
    """Weights clipped per output channel (axis 0) to ratio * max|w|."""
    bound = ratio * w.abs().amax(dim=tuple(range(1, w.ndim)), keepdim=True)
    return torch.minimum(torch.maximum(w, -bound), bound)


def _scale(layer: nn.Module, channels: Tensor) -> float:
    """Mean over these channels of the weight scale (real value of one code step)."""
    scale = cast(Tensor, layer.quant_weight().scale).flatten()  # type: ignore[operator]
    return float((scale if len(scale) == 1 else scale[channels]).mean())


def groups(w: Tensor, config: recipe.Adjust) -> list[Tensor]:
    """Numbers of the output channels (axis 0) that are decided together, most promising first.

    All of them with granularity `layer`; with `channel`, `channel_groups` groups of like size
    by max|w| / rms(w): what a flip moves grows with the first, what the channel says with the
    second, so clipping gains most where the ratio is high. Groups bound the cost, which is that
    of a layer for each.
    """
    if config.granularity == "layer":
        return [torch.arange(len(w))]
    rows = w.flatten(1)
    peaked = rows.abs().amax(dim=1) / rows.square().mean(dim=1).sqrt().clamp_min(1e-12)
    order = peaked.argsort(descending=True, stable=True)
    return [group.sort().values for group in order.chunk(min(config.channel_groups, len(w)))]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What gets one clip ratio."""

    label: dict[str, Any]
    """How the decision names it."""
    values: Tensor
    """The parameter that holds it."""
    at: Tensor | EllipsisType
    """Where in `values`."""
    clip: Callable[[Tensor, float], Tensor]
    scale: Callable[[], float]
    """Mean real value of one code step."""


def parts(net: nn.Module, order: list[str], config: recipe.Adjust) -> list[Part]:
    """Layers, or groups of their channels, in the given order of layers; then activations."""
    found, layers = [], weight_layers(net)
    for name in order:
        weight = cast(Tensor, layers[name].weight)
        for channels in groups(weight, config):
            which = {"channels": channels.tolist()} if config.granularity == "channel" else {}
            found.append(
                Part(
                    label={"layer": name, **which}, values=weight, at=channels, clip=clip,
                    scale=partial(_scale, layers[name], channels),
                )
            )  # fmt: skip
    if config.activations:
        for name, top in ranges(net).items():
            found.append(
                Part(
                    label={"layer": name}, values=top, at=..., clip=lambda v, ratio: ratio * v,
                    scale=lambda v=top: float(v) / 255,  # type: ignore[misc]
                )
            )  # fmt: skip
    return found


@torch.no_grad()
def search(net: nn.Module, bench: Bench, order: list[str]) -> list[dict[str, Any]]:
    """Choose clip ratios, in place; one decision per part (`parts`).

    Ratios are tried from mild to strong until one does not improve the objective; what is
    decided keeps ratio 1 when none improves it within the allowed loss of accuracy.
    """
    config = bench.config
    start = current = bench.terms(net)
    decisions, chosen_from = [], parts(net, order, config)
    with progress.bar(len(chosen_from), f"adjust by {config.granularity}") as bar:
        for part in chosen_from:
            before, values, at = current, part.values, part.at
            original = kept = values[at].clone()
            scale_before, chosen = part.scale(), 1.0
            for ratio in sorted(config.ratios, reverse=True):
                values[at] = part.clip(original, ratio)
                new = bench.terms(net)
                if new.objective >= current.objective or not allowed(new, start, config.margin):
                    break
                current, chosen, kept = new, ratio, values[at].clone()
            values[at] = kept
            decisions.append(
                {
                    **part.label,
                    "ratio": chosen,
                    "scale_before": scale_before,
                    "scale_after": part.scale(),
                    "objective_before": before.objective,
                    "objective_after": current.objective,
                    **{k: v for k, v in asdict(current).items() if k != "objective"},
                }
            )
            bar.update(1)
    return decisions
