"""Checkpoints: safetensors with a JSON sidecar; never pickles, nothing in them is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from brevitas.core.restrict_val import RestrictValueType
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from resq_deploy import artifacts
from resq_deploy.errors import InputError
from resq_deploy.nets import build, quantizers
from resq_deploy.nets.quantized import RANGE, quantize
from resq_deploy.nets.steps import assemble

OF_QUANTIZE = ("weight_bits", "encoding", "profile", "packed")
"""What `net` in a sidecar says beside how the float network is made: arguments of `quantize`."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; InputError in one line when it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write contiguous CPU copies, complete or not at all."""
    ready = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    return artifacts.write(path, lambda p: p.write_bytes(serialize(ready)))


def load_state(net: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load into a network; InputError names the first missing, surplus or misshapen tensor."""
    # Brevitas leaves a scale that was not calibrated yet out of the state dict of a new network.
    expected = dict(net.named_parameters()) | net.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{where}: tensor {name!r} is missing")
        if name not in expected:
            raise InputError(f"{where}: tensor {name!r} does not belong to this network")
        if expected[name].shape != tensors[name].shape:
            raise InputError(
                f"{where}: tensor {name!r} has shape {tuple(tensors[name].shape)}, the network "
                f"needs {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensors[name].float()).all():
            raise InputError(f"{where}: tensor {name!r} holds NaN or infinite values")
    net.load_state_dict(tensors)


def save(path: Path, network: nn.Module, *, inputs: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Write PATH.safetensors and its sidecar; `facts` must hold `quantized` and `net` (the
    arguments of `build`, or the `steps` of a traced network; and those of OF_QUANTIZE that are not
    the defaults of `quantize`)."""
    write_tensors(path, network.state_dict())
    return artifacts.seal(path, inputs, **facts)


def read_facts(path: Path) -> dict[str, Any]:
    """The sidecar of a checkpoint; InputError when there is none, or that of another file."""
    if not artifacts.sidecar(path).is_file():
        raise InputError(
            f"{path} has no sidecar {artifacts.sidecar(path).name} beside it; give a checkpoint "
            "that `resq-deploy train` or `adjust` wrote"
        )
    facts = artifacts.read_json(artifacts.sidecar(path))
    if not (isinstance(facts, dict) and isinstance(facts.get("net"), dict)):
        raise InputError(f"{artifacts.sidecar(path)} is not the sidecar of a checkpoint")
    return facts


def profile_of(facts: dict[str, Any]) -> str:
    """The profile of the network of a sidecar."""
    return str(facts["net"].get("profile", "float-channel"))


def _convert_ranges(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The tensors of a network of the profile `old`, for one of the profile `new`.

    They differ only in how Brevitas stores the range of an activation: as it is (the sign means
    nothing), or as its logarithm, where the scale is rounded up to a power of two.
    """
    relus: list[Any] = [quantizers.profile(name).relu for name in (old, new)]
    was_log, is_log = (r.restrict_scaling_type == RestrictValueType.POWER_OF_TWO for r in relus)
    if was_log == is_log:
        return tensors
    ranges = {k: v.abs().log2() if is_log else v.exp2() for k, v in tensors.items() if RANGE in k}
    return tensors | ranges


def load(
    path: Path, *, encoding: str | None = None, profile: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, in eval mode, and its sidecar.

    `encoding` restricts the codes of an int8 network to the levels of another one than it was
    trained with; `profile` gives it the quantizers of another profile, which take the weights and
    the ranges of activations as they are. The sidecar is returned as if it had been that.
    Raises InputError for a missing or broken file or sidecar, a changed digest, or a layer that
    the profile has no quantizer for.
    """
    facts = read_facts(path)
    tensors = read_tensors(path)
    if facts.get("sha256") != artifacts.sha256(path):
        raise InputError(f"{path} is not the file that {artifacts.sidecar(path).name} describes")
    try:
        if encoding is not None:
            facts["net"]["encoding"] = encoding
        if profile is not None and profile != profile_of(facts):
            tensors = _convert_ranges(tensors, profile_of(facts), profile)
            facts["net"]["profile"] = profile
        arguments = dict(facts["net"])
        stored = {k: arguments.pop(k) for k in OF_QUANTIZE if k in arguments}
        net = assemble(arguments["steps"]) if "steps" in arguments else build(**arguments)
        quantized = facts["quantized"]
    except (KeyError, TypeError):
        raise InputError(f"{artifacts.sidecar(path)} is not the sidecar of a checkpoint") from None
    if quantized:
        net = quantize(net, **stored)
    load_state(net, tensors, str(path))
    return net.eval(), facts
