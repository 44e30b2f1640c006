"""A network of the user's own, from a factory in a Python file or an installed module.

Making it executes that file. It happens in the stage `float` only, for the source that the recipe
names; checkpoints hold the traced steps instead, and loading one executes nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from resq_deploy import artifacts, recipe
from resq_deploy.errors import InputError
from resq_deploy.nets.traced import trace


def _file(source: str) -> Path:
    """The file that `FILE.py:factory` or `package.module:factory` stands in."""
    module = source.rpartition(":")[0]
    if module.endswith(".py"):
        return Path(module)
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        raise InputError(
            f"model.source: no module {module!r} is installed; give package.module:factory, or "
            "path/to/file.py:factory relative to the recipe"
        )
    return Path(found.origin)


def sha256(source: str) -> str:
    """Digest of the source file; of what it imports nothing is known. InputError when missing."""
    file = _file(source)
    if not file.is_file():
        raise InputError(f"model.source: no file {file}")
    return artifacts.sha256(file)


@contextmanager
def _import(source: str) -> Iterator[ModuleType]:
    """The module of a source; while it is used, files beside it can be imported."""
    module, _, _ = source.rpartition(":")
    if not module.endswith(".py"):
        yield importlib.import_module(module)
        return
    file = _file(source)
    found = importlib.util.spec_from_file_location(f"_own_{file.stem}", file)
    assert found is not None and found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    sys.modules[found.name] = loaded  # dataclasses look themselves up there
    sys.path.insert(0, str(file.parent))
    try:
        found.loader.exec_module(loaded)
        yield loaded
    finally:
        sys.path.remove(str(file.parent))


def call(source: str, arguments: dict[str, Any]) -> nn.Module:
    """What the factory of a source returns for keyword arguments; this executes the user's code.

    InputError in one line for whatever goes wrong in there, and for a result that is no module.
    """
    name = source.rpartition(":")[2]
    try:
        with _import(source) as module:
            net = getattr(module, name)(**arguments)
    except Exception as error:  # the user's code may raise anything
        line = " ".join(str(error).split())
        raise InputError(f"model.source {source}: {type(error).__name__}: {line}") from None
    if not isinstance(net, nn.Module):
        raise InputError(
            f"model.source {source}: {name} returned {type(net).__name__}; a torch.nn.Module "
            "expected"
        )
    return net


def make(
    config: recipe.Model,
    *,
    shape: tuple[int, ...],
    n_classes: int,
    seed: int,
    prepare: Callable[[nn.Module], None],
) -> tuple[nn.Module, dict[str, Any]]:
    """The traced float network of `config.source`, and what its checkpoints keep of it.

    It takes images (N, *shape) with pixels in [0, 1]; `prepare` gets the user's own network
    before it is traced (to load weights under its own names). `seed` is that of fresh weights.
    InputError names every module that cannot be quantized, and why.
    """
    assert config.source is not None
    digest = sha256(config.source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = call(config.source, config.arguments or {})
    prepare(net)
    steps, traced = trace(net, shape, mean=config.mean, std=config.std)
    n_logits = traced.eval()(torch.zeros(1, *shape)).shape[1]
    if n_logits < n_classes:
        raise InputError(
            f"model.source {config.source}: the network has {n_logits} outputs, the data set "
            f"{n_classes} classes"
        )
    return traced, {"source": config.portable_source(), "source_sha256": digest, "steps": steps}


def check_unchanged(config: recipe.Model, made: dict[str, Any], where: Path) -> None:
    """InputError when a checkpoint was made from another source than the recipe names now."""
    given = None if config.source is None else sha256(config.source)
    if made.get("source_sha256") != given:
        raise InputError(
            f"{where} was made from {made.get('source') or made.get('name')} "
            f"(SHA-256 {str(made.get('source_sha256'))[:12]}), the recipe names "
            f"{config.portable_source() or config.net} ({str(given)[:12]}): the source has "
            "changed; run stage float again"
        )
