"""Stage 3: clip and rescale the quantized weights after training, by layer or by channels.

The scale of a channel is max|w| / 127, so clipping its weights to c max|w| is the same as
choosing the new scale c max|w| / 127: a flipped bit then moves the weight by less.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_deploy import artifacts, evaluate, metrics, progress, recipe, seeds
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.nets import checkpoint
from resq_deploy.nets.quantized import codes, value, weight_layers
from resq_deploy.perturb.weights import Masks, random_masks

SHARE = 8
METHOD = 2
"""Raised with every change that moves a result: artefacts of another method are made again."""


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


class _Bench:
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


def clip(w: Tensor, ratio: float) -> Tensor:
    """Weights clipped per output channel (axis 0) to ratio * max|w|."""
    bound = ratio * w.abs().amax(dim=tuple(range(1, w.ndim)), keepdim=True)
    return torch.minimum(torch.maximum(w, -bound), bound)


def _allowed(new: Terms, start: Terms, margin: float) -> bool:
    return (
        new.clean_accuracy >= start.clean_accuracy - margin
        and new.adversarial_accuracy >= start.adversarial_accuracy - margin
    )


def _scale(layer: nn.Module, channels: Tensor) -> float:
    """Mean over these channels of the weight scale (real value of one code step)."""
    scale = cast(Tensor, layer.quant_weight().scale).flatten()  # type: ignore[operator]
    return float(scale[channels].mean())


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


def _histogram(layer: nn.Module) -> list[int]:
    """How often each code -128 ... 127 is stored."""
    counts = np.bincount(codes(layer).numpy().astype(np.int64).ravel() + 128, minlength=256)
    return [int(n) for n in counts]


@torch.no_grad()
def search(net: nn.Module, bench: _Bench, order: list[str]) -> list[dict[str, Any]]:
    """Choose clip ratios, in place; one decision per layer, or per group of its channels, in
    the given order of layers.

    Ratios are tried from mild to strong until one does not improve the objective; what is
    decided keeps ratio 1 when none improves it within the allowed loss of accuracy.
    """
    config, layers = bench.config, weight_layers(net)
    start = current = bench.terms(net)
    parts = [(name, part) for name in order for part in groups(layers[name].weight, config)]  # type: ignore[arg-type]
    decisions = []
    with progress.bar(len(parts), f"adjust by {config.granularity}") as bar:
        for name, channels in parts:
            layer, before = layers[name], current
            weight = cast(Tensor, layer.weight)
            original = kept = weight[channels]
            scale_before, chosen = _scale(layer, channels), 1.0
            for ratio in sorted(config.ratios, reverse=True):
                weight[channels] = clip(original, ratio)
                new = bench.terms(net)
                if new.objective >= current.objective or not _allowed(new, start, config.margin):
                    break
                current, chosen, kept = new, ratio, weight[channels]
            weight[channels] = kept
            decisions.append(
                {
                    "layer": name,
                    **({"channels": channels.tolist()} if config.granularity == "channel" else {}),
                    "ratio": chosen,
                    "scale_before": scale_before,
                    "scale_after": _scale(layer, channels),
                    "objective_before": before.objective,
                    "objective_after": current.objective,
                    **{k: v for k, v in asdict(current).items() if k != "objective"},
                }
            )
            bar.update(1)
    return decisions


def _output_means(net: nn.Module, images: Dataset) -> dict[str, Tensor]:
    """Mean over images and positions (pixels, tokens) of what every weight layer returns."""
    layers = weight_layers(net)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            y = value(out).transpose(0, 1).flatten(1).double()  # (channels, images x positions)
            sums[name] = sums.get(name, torch.zeros(())) + y.sum(dim=1)
            counts[name] = counts.get(name, 0) + y.shape[1]

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(keep(name)).remove)
        evaluate.logits(net, images.x)
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def correct_biases(net: nn.Module, reference: nn.Module, images: Dataset) -> None:
    """Shift biases in place so that every layer's mean output per channel is the reference's.

    Layer by layer in network order (Nagel et al., arXiv 1906.04721, section 4.2), because
    each correction changes what the next layers see.
    """
    target = _output_means(reference, images)
    for name, layer in weight_layers(net).items():
        shift = target[name] - _output_means(net, images)[name]
        bias = cast(Tensor, layer.bias)
        bias += shift.to(bias.dtype)


def adjust(
    source: Path,
    *,
    out: Path,
    images: Dataset,
    config: recipe.Adjust,
    seed: int = 0,
    fresh: bool = False,
) -> Path:
    """Run stage 3 on an int8 checkpoint; returns OUT/checkpoint.safetensors.

    `images` is the calibration set (uint8); every other image decides, the rest confirms. The
    sidecar records the decision per layer or group of channels, the bias correction, code
    histograms before and after, and the confirmation on images and fault patterns that the search
    did not see: unless the objective is better there beyond doubt, everything is reverted.
    """
    final = out / "checkpoint.safetensors"
    inputs = {
        "stage": "adjust",
        "method": METHOD,
        "seed": seed,
        "adjust": config.model_dump(mode="json"),
        "calibration_sha256": images.sha256,
        "from_sha256": artifacts.sha256(source) if source.is_file() else None,
    }
    if not fresh and artifacts.is_current(final, inputs):
        return final
    net, facts = checkpoint.load(source)
    if not facts["quantized"]:
        raise InputError(f"{source} is a float checkpoint; stage 3 needs an int8 one")
    reference = copy.deepcopy(net)
    bench = _Bench(net, images.take(slice(0, None, 2)), config, seed=seed, name="search")
    start = bench.terms(net)
    critical = [row["layer"] for row in facts.get("criticality", [])]
    order = critical + [n for n in weight_layers(net) if n not in critical]
    decisions = search(net, bench, order)
    correction = {"kept": False}
    if config.bias_correction and any(d["ratio"] < 1 for d in decisions):
        correction = _try_bias_correction(net, reference, bench, start)
    net, check = confirm(net, reference, images.take(slice(1, None, 2)), config, seed=seed)
    checkpoint.save(
        final, net, inputs=inputs, stage="adjust", quantized=True, net=facts["net"],
        recipe=facts["recipe"], decisions=decisions, bias_correction=correction, held_out=check,
        start=asdict(start), criticality=facts.get("criticality", []),
        codes={
            name: {"before": _histogram(layer), "after": _histogram(weight_layers(net)[name])}
            for name, layer in weight_layers(reference).items()
        },
    )  # fmt: skip
    return final


def _try_bias_correction(
    net: nn.Module, reference: nn.Module, bench: _Bench, start: Terms
) -> dict[str, Any]:
    """Correct the biases in place; undone when the objective does not improve."""
    before = bench.terms(net)
    state = copy.deepcopy(net.state_dict())
    correct_biases(net, reference, bench.images)
    after = bench.terms(net)
    kept = after.objective < before.objective and _allowed(after, start, bench.config.margin)
    if not kept:
        net.load_state_dict(state)
    return {"kept": kept, "before": asdict(before), "after": asdict(after)}


def confirm(
    net: nn.Module, reference: nn.Module, images: Dataset, config: recipe.Adjust, *, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """`net` if it beats `reference` on images and fault patterns not seen before, else that one.

    It must lower the objective with 95 % confidence, paired over patterns, and keep accuracy
    within the margin; the attack is made afresh on each of the two.
    """
    bench = _Bench(reference, images, config, seed=seed, name="held out")
    before, faulty_before = bench.terms(reference), bench.fault_losses(reference)
    bench.attacked = bench.attack(net)
    after, faulty_after = bench.terms(net), bench.fault_losses(net)
    gain = metrics.bootstrap_mean(
        after.clean_loss - before.clean_loss + config.fault_weight * (faulty_after - faulty_before)
    )
    kept = gain.high < 0 and _allowed(after, before, config.margin)
    facts = {
        "kept": kept,
        "change": asdict(gain),
        "before": asdict(before),
        "after": asdict(after),
    }
    return (net if kept else reference), facts
