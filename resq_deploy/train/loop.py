"""The training loop: SGD epochs that can be killed at any moment and resumed exactly.

After every epoch the network, the momentum and the objective's own state are written; all
randomness comes from streams named by stage and epoch, so a resumed run ends with the same
bytes as an uninterrupted one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resq_deploy import artifacts, progress, seeds
from resq_deploy.data.augment import AUGMENTATIONS
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.errors import InputError
from resq_deploy.nets.checkpoint import read_tensors, write_tensors
from resq_deploy.nets.quantized import weight_layers
from resq_deploy.recipe import Training


class Objective(Protocol):
    """What a stage minimises. A new method implements these and gets the loop for free."""

    def begin(self, steps: int) -> None:
        """Before the first step: the whole stage has so many, those before a restart included."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar loss of one batch: x (N, C, H, W) in [0, 1], y (N,)."""

    def after_backward(self, net: nn.Module) -> None:
        """Gradients are there; weights have not moved."""

    def after_step(self, net: nn.Module) -> None:
        """Weights have moved (projections go here)."""

    def state(self) -> dict[str, Tensor]:
        """What must survive a restart."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The counterpart of `state`."""


def precision(device: str) -> str:
    """`bfloat16` where the device computes it natively, else `float32`; recorded: it moves bits."""
    if device == "cpu":
        return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"


def learning_rate(peak: float, step: int, total: int) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to zero."""
    warm = max(1, total // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def optimizer(net: nn.Module, config: Training) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on matrices and kernels only."""
    # Weight decay would pull activation scales and biases to zero.
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups: Any = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)


def _save(path: Path, net: nn.Module, sgd: torch.optim.SGD, objective: Objective) -> None:
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    for name, p in net.named_parameters():
        if "momentum_buffer" in sgd.state[p]:
            tensors[f"momentum.{name}"] = sgd.state[p]["momentum_buffer"]
    tensors |= {f"objective.{k}": v for k, v in objective.state().items()}
    write_tensors(path, tensors)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def _restore(path: Path, net: nn.Module, config: Training, objective: Objective) -> torch.optim.SGD:
    tensors = read_tensors(path)
    net.load_state_dict(part(tensors, "net."))
    # Only now: Brevitas replaces parameters while it loads, and the optimizer must hold the new.
    sgd = optimizer(net, config)
    momentum = part(tensors, "momentum.")
    for name, p in net.named_parameters():
        if name in momentum:
            # In the memory format of p: another one takes other kernels, which round otherwise.
            sgd.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum[name])
    objective.load_state(part(tensors, "objective."))
    return sgd


def update(
    net: nn.Module,
    sgd: torch.optim.SGD,
    objective: Objective,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    config: Training,
) -> Tensor:
    """One step of training on a batch x (N, C, H, W), y (N,); returns the loss before it."""
    device = x.device.type
    sgd.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=precision(device) == "bfloat16"):
        loss = objective.loss(net, x, y, generator)
    loss.backward()
    objective.after_backward(net)
    # Folded networks have no batch norm to absorb a large step.
    nn.utils.clip_grad_norm_(net.parameters(), config.max_gradient_norm)
    sgd.step()
    objective.after_step(net)
    return loss.detach()


def fit(
    net: nn.Module,
    data: Dataset,
    objective: Objective,
    config: Training,
    *,
    stage: str,
    seed: int,
    augment: str,
    resume: Path,
    inputs: dict[str, Any],
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Train `net` in place; returns one {"epoch", "loss"} per epoch.

    `resume` is the file of the epoch state; it is used if it was made from the same
    `inputs`, and removed by the caller once the stage's checkpoint is written. Raises
    InputError when the loss is no longer finite.
    """
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    history: list[dict[str, float]] = []
    if not artifacts.is_current(resume, inputs):
        sgd = optimizer(net, config)
    else:
        sgd = _restore(resume, net, config, objective)
        history = artifacts.read_json(artifacts.sidecar(resume))["history"]
    # Every step sees a full batch, whatever the size of the set: the tail joins the next epoch's
    # shuffle. A set smaller than one batch is one step.
    batch = min(config.batch, len(data))
    steps = len(data) // batch
    total = steps * config.epochs
    objective.begin(total)
    with progress.bar(total, stage) as bar:
        bar.update(len(history) * steps)
        for epoch in range(len(history), config.epochs):
            order = seeds.stream(seed, stage, "order", epoch).permutation(len(data))
            augmenter = seeds.stream(seed, stage, "augment", epoch)
            generator = torch.Generator().manual_seed(seeds.integer(seed, stage, "torch", epoch))
            losses = torch.zeros(())
            for step in range(steps):
                index = order[step * batch : (step + 1) * batch]
                pixels = AUGMENTATIONS[augment](data.x[index], augmenter)
                x = torch.from_numpy(as_float(pixels)).to(device)
                x = x.contiguous(memory_format=torch.channels_last)
                y = torch.from_numpy(data.y[index]).to(device)
                for group in sgd.param_groups:
                    group["lr"] = learning_rate(config.lr, epoch * steps + step, total)
                loss = update(net, sgd, objective, x, y, generator, config)
                if not torch.isfinite(loss):
                    raise InputError(
                        f"stage {stage}: the loss became {loss.item()} in epoch {epoch + 1}; lower "
                        f"lr (given: {config.lr})"
                    )
                losses += loss.cpu()
                bar.update(1)
            history.append({"epoch": epoch + 1, "loss": float(losses) / steps})
            _save(resume, net, sgd, objective)
            artifacts.seal(resume, inputs, history=history)
    net.to("cpu").eval()
    return history


def weights(net: nn.Module) -> dict[str, Tensor]:
    """The float weights behind the stored codes, by layer name."""
    return {name: layer.weight for name, layer in weight_layers(net).items()}  # type: ignore[misc]
