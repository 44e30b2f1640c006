"""Attacks on the input, made for an exported file and measured on it.

White-box attacks use the gradients of the twin, the checkpoint that the file was exported from;
their images, as uint8 pixels, then run on the file. Parity makes the transfer exact up to
rounding, and both counts are reported. Black-box attacks see the file only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from resq_deploy import artifacts, metrics, runtime
from resq_deploy.attack import registry, sanity
from resq_deploy.attack.base import Budget, Images, Target
from resq_deploy.attack.matrix import matrix
from resq_deploy.attack.twin import WANTED, load_twin, strange_weight
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.inject import discovery
from resq_deploy.inject.memory import Memory

Correct = NDArray[np.bool_]


def _counts(correct: Correct) -> dict[str, int]:
    return {"n_correct": int(correct.sum()), "n_total": len(correct)}


def marks(correct: Correct) -> str:
    """One character per image, in order: what paired intervals need."""
    return "".join("01"[int(c)] for c in correct)


def _measured(epsilon: float, correct: Correct, confidence: float) -> dict[str, Any]:
    accuracy = metrics.wilson(int(correct.sum()), len(correct), confidence)
    return {
        "epsilon": epsilon,
        "deployed": _counts(correct),
        "accuracy": vars(accuracy),
        "correct": marks(correct),
    }


def _check(data: Dataset, epsilons: Sequence[float], rates: Sequence[float], draws: int) -> None:
    for epsilon in epsilons:
        if not 0 <= epsilon <= 1:
            raise InputError(f"epsilon must lie in [0, 1] (8/255 is 0.0314), got {epsilon}")
    if not epsilons or len(set(epsilons)) < len(epsilons):
        raise InputError(f"epsilons {list(epsilons)} given; expected one or more different radii")
    if data.x.dtype != np.uint8 or data.x.ndim != 4:
        raise InputError(
            f"{data.name}: uint8 images (N, C, H, W) expected, got {data.x.dtype} of shape "
            f"{data.x.shape}"
        )
    for rate in rates:
        if not 0 < rate <= 1:
            raise InputError(f"bit error rates must lie in (0, 1], got {rate}")
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")


def _warnings(raw: bytes, net: nn.Module, *, quantized: bool) -> list[str]:
    """That another network is attacked than the one that the file holds."""
    try:
        memory = Memory.of(discovery.discover(runtime.parse_model(raw)))
    except UnsupportedModel:  # such as one of float weights: no codes to compare
        return []
    strange = strange_weight(memory, net) if quantized else memory.space.tensors[0].name
    if strange is None:
        return []
    return [
        f"the file does not store the codes of {strange} in the twin: gradients of another network "
        f"break fewer images; {WANTED}"
    ]


def attack(
    model: Path,
    twin: Path,
    data: Dataset,
    *,
    epsilons: Sequence[float],
    attacks: Sequence[str] = ("pgd",),
    steps: int = 20,
    restarts: int = 1,
    queries: int = 1000,
    seed: int = 0,
    check: bool = True,
    rates: Sequence[float] = (),
    draws: int = 20,
    workers: int = 1,
    confidence: float = 0.95,
    out: Path | None = None,
) -> dict[str, Any]:
    """Every attack at every epsilon (pixels in [0, 1]); returns, and writes to `out`, the counts.

    `attacks` are names of `registry.ATTACKS`, with the budget of `base.Budget`. The result has
    `attacks` (by name, each with its rows `epsilons`), `worst` (right only where no attack
    succeeded), `sanity` (with `check`) and, with bit error `rates`, `matrix`: clean and worst
    images under `draws` fault patterns per rate. `epsilons` repeats the rows of PGD, `warnings`
    says where `twin` is not the checkpoint of `model`.

    An existing `out` made from the same inputs is returned as it is. Raises InputError when
    `model` or `twin` cannot be read or an option is out of its range.
    """
    _check(data, epsilons, rates, draws)
    chosen = registry.make(attacks, Budget(steps=steps, restarts=restarts, queries=queries))
    raw = runtime.read_model(model)
    net, made = load_twin(model, twin)
    facts = {
        "model_sha256": artifacts.sha256(model),
        "twin_sha256": artifacts.sha256(twin),
        "data_sha256": data.sha256,
        "steps": steps,
        "restarts": restarts,
        "seed": seed,
    }
    inputs = facts | {
        "radii": list(epsilons),
        "attacks": list(attacks),
        "queries": queries,
        "check": check,
        "rates": list(rates),
        "draws": draws,
        "confidence": confidence,
    }
    if out is not None and out.is_file():
        done = artifacts.read_json(out)
        if done.get("inputs") == inputs:
            return dict(done)
    target = Target.of(net, raw, data.x)
    data.check_labels(target.n_classes)
    clean_twin, clean = target.twin(data.x, data.y), target.deployed(data.x, data.y)
    found: dict[str, dict[str, Any]] = {}
    correct: dict[str, dict[float, Correct]] = {name: {} for name in chosen}
    worst = dict.fromkeys(epsilons, clean)
    images: dict[float, Images] = {0.0: data.x} | {epsilon: data.x.copy() for epsilon in epsilons}
    for name, method in chosen.items():
        rows = []
        for epsilon in epsilons:
            moved = method(target, data.x, data.y, epsilon=epsilon, seed=seed)
            right = correct[name][epsilon] = target.deployed(moved, data.y)
            broken = worst[epsilon] & ~right
            images[epsilon][broken] = moved[broken]
            worst[epsilon] = worst[epsilon] & right
            rows.append(
                {"twin": _counts(target.twin(moved, data.y))}
                | _measured(epsilon, right, confidence)
            )
        label = {"label": method.label, "white_box": method.white_box}
        found[name] = label | method.settings() | {"epsilons": rows}
    result = facts | {
        "inputs": inputs,
        "n_total": len(data),
        "clean": {"twin": _counts(clean_twin), "deployed": _counts(clean)},
        "clean_correct": marks(clean),
        "attacks": found,
        "worst": [_measured(epsilon, right, confidence) for epsilon, right in worst.items()],
        "versions": artifacts.versions(),
        "warnings": _warnings(raw, net, quantized=made["quantized"]),
    }
    if "pgd" in found:
        result["epsilons"] = found["pgd"]["epsilons"]
    if check:
        result["sanity"] = sanity.checks(
            target, data.x, data.y, chosen, correct, seed=seed, confidence=confidence
        )
    if rates:
        sets = {e: Dataset(name=f"{data.name}/{e}", x=x, y=data.y) for e, x in images.items()}
        result["matrix"] = matrix(
            model, sets, rates=rates, draws=draws, seed=seed, workers=workers,
            confidence=confidence,
        )  # fmt: skip
    if out is not None:
        artifacts.write_json(out, result)
    return result
