"""Stage by stage from a recipe to checkpoints: float, baseline, attack (1), fault (2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from resq_deploy import artifacts, data, seeds
from resq_deploy.data import calibration
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.errors import InputError
from resq_deploy.nets import build, checkpoint, names
from resq_deploy.nets.quantized import calibrate, quantize
from resq_deploy.recipe import Recipe
from resq_deploy.train.attacks import ATTACKS
from resq_deploy.train.faults import FAULTS, Clip
from resq_deploy.train.loop import fit, precision
from resq_deploy.train.objectives import CrossEntropy

STAGES = ("float", "baseline", "attack", "fault")


def _training_set(recipe: Recipe) -> tuple[Dataset, Dataset]:
    splits = data.of(recipe.data)
    if splits.train is None:
        raise InputError(
            f"data set {recipe.data.name!r} has no training images; expected one of "
            f"{', '.join(sorted(data.SOURCES))} under [data] name, or an .npz under [data] train"
        )
    return splits.train, calibration.load(recipe.data, splits)


def _objective(recipe: Recipe, stage: str) -> CrossEntropy:
    if stage == "attack":
        return ATTACKS[recipe.attack.method](recipe.attack)
    if stage == "fault":
        keep = recipe.fault.keep_attack
        unfaulted = _objective(recipe, "attack") if keep else CrossEntropy()
        return FAULTS[recipe.fault.method](recipe.fault, unfaulted, seed=recipe.seed)
    return CrossEntropy(getattr(recipe, stage).label_smoothing)


def _inputs(recipe: Recipe, stage: str, start: Path | None, images: tuple[Dataset, Dataset]) -> Any:
    """Everything that a stage's checkpoint depends on: an unchanged digest is not run again."""
    keeps_attack = stage == "fault" and recipe.fault.keep_attack
    sections = [stage, "model"] + ["attack"] * keeps_attack
    config = {name: getattr(recipe, name).model_dump(mode="json") for name in sections}
    if recipe.float.checkpoint is not None and stage == "float":
        config["float"] = {"checkpoint": artifacts.sha256(recipe.float.checkpoint)}
    return {
        "stage": stage,
        "seed": recipe.seed,
        "augment": recipe.data.augment,
        "recipe": config,
        "train_sha256": images[0].sha256,
        "calibration_sha256": images[1].sha256,
        "from_sha256": None if start is None else artifacts.sha256(start),
    }


def _start(recipe: Recipe, stage: str, start: Path | None, images: tuple[Dataset, Dataset]) -> Any:
    """The network that a stage begins with, and the arguments that build it."""
    train, calibration_images = images
    if stage == "float":
        arguments = {
            "name": recipe.model.net,
            "n_classes": train.n_classes,
            "in_channels": train.x.shape[1],
            "image_size": recipe.model.image_size,
            "width": recipe.model.width,
        }
        net = build(**arguments, seed=seeds.integer(recipe.seed, "init"))
        arguments["weight_bits"] = recipe.model.weight_bits
        if recipe.float.checkpoint is not None:
            tensors = names.translate(net, checkpoint.read_tensors(recipe.float.checkpoint))
            checkpoint.load_state(net, tensors, str(recipe.float.checkpoint))
        return net, arguments
    if start is None:
        raise InputError(f"stage {stage!r} starts from a checkpoint; give it with --from")
    net, facts = checkpoint.load(start)
    if facts["quantized"] == (stage == "baseline"):
        expected = "a float" if stage == "baseline" else "an int8"
        raise InputError(f"stage {stage!r} starts from {expected} checkpoint; {start} is another")
    if stage == "baseline":
        net = quantize(net, weight_bits=facts["net"].get("weight_bits", 8))
        calibrate(net, torch.from_numpy(as_float(calibration_images.x)))
    return net, facts["net"]


def train(
    recipe: Recipe,
    stage: str,
    *,
    out: Path,
    start: Path | None = None,
    device: str = "cpu",
    fresh: bool = False,
) -> Path:
    """Run one stage; returns OUT/checkpoint.safetensors, with its sidecar beside it.

    An unchanged stage is not run again, an interrupted one continues after its last whole
    epoch; `fresh` forgets both. Raises InputError for unusable data, checkpoints, options.
    """
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} is unknown; expected one of {', '.join(STAGES)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} given, but PyTorch sees no CUDA device; use cpu")
    images = _training_set(recipe)
    inputs = _inputs(recipe, stage, start, images)
    final, resume = out / "checkpoint.safetensors", out / "resume.safetensors"
    if fresh:
        for path in (final, resume):
            path.unlink(missing_ok=True)
    if artifacts.is_current(final, inputs):
        return final
    net, arguments = _start(recipe, stage, start, images)
    config = getattr(recipe, stage)
    objective = _objective(recipe, stage)
    history: list[dict[str, float]] = []
    if not (stage == "float" and recipe.float.checkpoint is not None):
        history = fit(
            net, images[0], objective, config, stage=stage, seed=recipe.seed,
            augment=recipe.data.augment, resume=resume, inputs=inputs, device=device,
        )  # fmt: skip
    facts: dict[str, Any] = {
        "stage": stage,
        "quantized": stage != "float",
        "net": arguments,
        "recipe": recipe.portable(),
        "history": history,
        "precision": precision(device),
        "threads": torch.get_num_threads(),
    }
    if isinstance(objective, Clip):
        facts["criticality"] = objective.criticality.ranking(net) if history else []
    checkpoint.save(final, net, inputs=inputs, **facts)
    for path in (resume, artifacts.sidecar(resume)):
        path.unlink(missing_ok=True)
    return final


__all__ = ["STAGES", "train"]
