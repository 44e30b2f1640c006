"""Stage by stage from a recipe to checkpoints: float, baseline, attack (1), fault (2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from resq_deploy import artifacts, data, seeds
from resq_deploy.data import calibration
from resq_deploy.data.base import Dataset, Splits, as_float
from resq_deploy.errors import InputError
from resq_deploy.nets import build, checkpoint, names, own
from resq_deploy.nets.posttraining import correct_biases, equalize
from resq_deploy.nets.quantized import calibrate, quantize
from resq_deploy.recipe import Recipe
from resq_deploy.train.attacks import ATTACKS
from resq_deploy.train.faults import FAULTS, Clip
from resq_deploy.train.grafting import clipped, graft
from resq_deploy.train.loop import fit, precision
from resq_deploy.train.objectives import CrossEntropy

STAGES = ("float", "baseline", "attack", "fault")


def planned(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe asks for: stages 1 and 2 only where they have epochs."""
    return ("float", "baseline") + tuple(s for s in STAGES[2:] if getattr(recipe, s).epochs)


def _trains(recipe: Recipe, stage: str) -> bool:
    """Whether a stage moves weights; else it needs no training images."""
    given = stage == "float" and recipe.float.checkpoint is not None
    return not given and getattr(recipe, stage).epochs > 0


def _images(recipe: Recipe, stage: str) -> tuple[Splits, Dataset]:
    """All images of the data set, and those that calibrate."""
    splits = data.of(recipe.data)
    if splits.train is None and _trains(recipe, stage):
        raise InputError(
            f"data set {recipe.data.name!r} has no training images; expected one of "
            f"{', '.join(sorted(data.SOURCES))} under [data] name, or an .npz under [data] train"
        )
    return splits, calibration.load(recipe.data, splits)


def objective_of(recipe: Recipe, stage: str) -> CrossEntropy:
    """What a stage of a recipe minimises."""
    if stage == "attack":
        return ATTACKS[recipe.attack.method](recipe.attack)
    if stage == "fault":
        keep = recipe.fault.keep_attack and recipe.attack.epsilon > 0
        plain = CrossEntropy(recipe.fault.label_smoothing)
        unfaulted = objective_of(recipe, "attack") if keep else plain
        return FAULTS[recipe.fault.method](recipe.fault, unfaulted, seed=recipe.seed)
    return CrossEntropy(getattr(recipe, stage).label_smoothing)


def _inputs(recipe: Recipe, stage: str, start: Path | None, images: tuple[Splits, Dataset]) -> Any:
    """Everything that a stage's checkpoint depends on: an unchanged digest is not run again."""
    splits, calibration_images = images
    keeps_attack = stage == "fault" and recipe.fault.keep_attack
    sections = [stage, "model"] + ["attack"] * keeps_attack
    config = {name: getattr(recipe, name).model_dump(mode="json") for name in sections}
    if recipe.float.checkpoint is not None and stage == "float":
        config["float"] = {"checkpoint": artifacts.sha256(recipe.float.checkpoint)}
    if recipe.packed:
        config["model"]["packed"] = True
    if recipe.model.source is not None:
        config["model"]["source"] = recipe.model.portable_source()
        config["model"]["source_sha256"] = own.sha256(recipe.model.source)
    return {
        "stage": stage,
        "seed": recipe.seed,
        "augment": recipe.data.augment,
        "recipe": config,
        "train_sha256": None if splits.train is None else splits.train.sha256,
        "calibration_sha256": calibration_images.sha256,
        "from_sha256": None if start is None else artifacts.sha256(start),
    }


def _float_net(recipe: Recipe, splits: Splits) -> tuple[nn.Module, dict[str, Any]]:
    """The float network of a recipe, and the arguments that build it."""

    def load_weights(net: nn.Module) -> None:
        if recipe.float.checkpoint is not None:
            tensors = names.translate(net, checkpoint.read_tensors(recipe.float.checkpoint))
            checkpoint.load_state(net, tensors, str(recipe.float.checkpoint))

    shown = splits.train or splits.test
    seed = seeds.integer(recipe.seed, "init")
    if recipe.model.source is not None:
        net, arguments = own.make(
            recipe.model, shape=shown.x.shape[1:], n_classes=shown.n_classes, seed=seed,
            prepare=load_weights,
        )  # fmt: skip
    else:
        arguments = {
            "name": recipe.model.net,
            "n_classes": shown.n_classes,
            "in_channels": shown.x.shape[1],
            "image_size": recipe.model.image_size,
            "width": recipe.model.width,
        }
        net = build(**arguments, seed=seed)
        load_weights(net)
    stored: Any = {"weight_bits": recipe.model.weight_bits, "profile": recipe.model.profile}
    stored |= {"packed": True} if recipe.packed else {}
    with torch.random.fork_rng(devices=[]):
        quantize(net, **stored)  # what has no int8 form is refused before it is trained
    return net, arguments | stored


def _start(recipe: Recipe, stage: str, start: Path | None, images: tuple[Splits, Dataset]) -> Any:
    """The network that a stage begins with, and the arguments that build it."""
    splits, calibration_images = images
    if stage == "float":
        return _float_net(recipe, splits)
    if start is None:
        raise InputError(f"stage {stage!r} starts from a checkpoint; give it with --from")
    stored = recipe.fault.encoding if stage == "fault" else None
    net, facts = checkpoint.load(start, encoding=stored)
    if facts["quantized"] == (stage == "baseline"):
        expected = "a float" if stage == "baseline" else "an int8"
        raise InputError(f"stage {stage!r} starts from {expected} checkpoint; {start} is another")
    own.check_unchanged(recipe.model, facts["net"], start)
    if stage == "baseline":
        x = torch.from_numpy(as_float(calibration_images.x))
        if recipe.baseline.equalize:
            net = equalize(net, recipe.baseline.equalize)
        kept = {k: v for k, v in facts["net"].items() if k in checkpoint.OF_QUANTIZE}
        net = quantize(net, **kept)
        calibrate(net, x)
        if recipe.baseline.bias_correction:
            correct_biases(net, x)
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
    images = _images(recipe, stage)
    inputs = _inputs(recipe, stage, start, images)
    final, resume = out / "checkpoint.safetensors", out / "resume.safetensors"
    if fresh:
        for path in (final, resume):
            path.unlink(missing_ok=True)
    if artifacts.is_current(final, inputs):
        return final
    net, arguments = _start(recipe, stage, start, images)
    config = getattr(recipe, stage)
    share = recipe.attack.graft if stage == "attack" else 0
    grafted = graft(net, images[1], share) if share else {}
    objective = objective_of(recipe, stage)
    history: list[dict[str, float]] = []
    if _trains(recipe, stage):
        assert images[0].train is not None
        history = fit(
            net, images[0].train, objective, config, stage=stage, seed=recipe.seed,
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
    if grafted:
        facts["graft"] = {"channels": grafted, "clipped": clipped(net, grafted, images[1])}
    if isinstance(objective, Clip):
        facts["criticality"] = objective.criticality.ranking(net) if history else []
    checkpoint.save(final, net, inputs=inputs, **facts)
    for path in (resume, artifacts.sidecar(resume)):
        path.unlink(missing_ok=True)
    return final


__all__ = ["STAGES", "objective_of", "planned", "train"]
