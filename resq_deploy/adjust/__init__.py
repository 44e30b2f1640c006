"""Stage 3: clip and rescale the quantized weights after training, by layer or by channels.

The scale of a channel is max|w| / 127, so clipping its weights to c max|w| is the same as
choosing the new scale c max|w| / 127: a flipped bit then moves the weight by less.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from resq_deploy import artifacts, evaluate, metrics, recipe
from resq_deploy.adjust.bench import SHARE, Bench, Terms, allowed
from resq_deploy.adjust.search import search
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.nets import checkpoint
from resq_deploy.nets.posttraining import match_mean, output_means
from resq_deploy.nets.quantized import codes, weight_layers

METHOD = 2
"""Raised with every change that moves a result: artefacts of another method are made again."""


def _histogram(layer: nn.Module) -> list[int]:
    """How often each code -128 ... 127 is stored."""
    counts = np.bincount(codes(layer).numpy().astype(np.int64).ravel() + 128, minlength=256)
    return [int(n) for n in counts]


def correct_biases(net: nn.Module, reference: nn.Module, images: Dataset) -> None:
    """Shift biases in place so that every layer's mean output per channel is the reference's.

    Layer by layer in network order (Nagel et al., arXiv 1906.04721, section 4.2), because
    each correction changes what the next layers see.
    """
    x = evaluate.tensor(images.x)
    for name, target in output_means(reference, x).items():
        match_mean(net, name, target, x)


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
    if len(images) < 2 * SHARE:
        raise InputError(
            f"{len(images)} calibration images given; stage 3 needs {2 * SHARE} or more: half of "
            f"them decide, a fault pattern sees every {SHARE}th of a half"
        )
    profile = facts["net"].get("profile", "float-channel")
    if config.activations and profile != "float-channel":
        raise InputError(
            f"adjust.activations given for a network of the profile {profile}; it needs "
            "float-channel, whose ranges may take any value"
        )
    reference = copy.deepcopy(net)
    bench = Bench(net, images.take(slice(0, None, 2)), config, seed=seed, name="search")
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
    net: nn.Module, reference: nn.Module, bench: Bench, start: Terms
) -> dict[str, Any]:
    """Correct the biases in place; undone when the objective does not improve."""
    before = bench.terms(net)
    state = copy.deepcopy(net.state_dict())
    correct_biases(net, reference, bench.images)
    after = bench.terms(net)
    kept = after.objective < before.objective and allowed(after, start, bench.config.margin)
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
    bench = Bench(reference, images, config, seed=seed, name="held out")
    before, faulty_before = bench.terms(reference), bench.fault_losses(reference)
    bench.attacked = bench.attack(net)
    after, faulty_after = bench.terms(net), bench.fault_losses(net)
    gain = metrics.bootstrap_mean(
        after.clean_loss - before.clean_loss + config.fault_weight * (faulty_after - faulty_before)
    )
    kept = gain.high < 0 and allowed(after, before, config.margin)
    facts = {
        "kept": kept,
        "change": asdict(gain),
        "before": asdict(before),
        "after": asdict(after),
    }
    return (net if kept else reference), facts
