"""What was measured on an exported file, read from the files that other commands wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resq_deploy import artifacts
from resq_deploy.errors import InputError
from resq_deploy.inject import results
from resq_deploy.records import Count

DEPLOYED = "model.qdq.onnx"
"""The file of an export that campaigns and attacks run on."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What the manifest of an export says."""

    max_steps: int
    """Steps of the output quantizer by which any two executions differ at most."""
    n_images: int
    """Images of that comparison."""
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured, by kind; every dict is by the file's name as it was given."""

    model_sha256: str
    """Digest of the one file that everything was measured on."""
    campaigns: dict[str, dict[str, Any]]
    """Summaries as `resq-deploy results` makes them."""
    attacks: dict[str, dict[float, Count]]
    """Accuracy of the file by epsilon."""
    clean: dict[str, Count]
    """Accuracy without faults and attacks."""
    exports: dict[str, Export]
    confidence: float


def _campaign(path: Path, confidence: float) -> dict[str, Any]:
    """A finished campaign: a gate does not decide on half of one."""
    found = results([path], confidence=confidence)
    if found["shard"] != "0/1":
        raise InputError(
            f"{path} is shard {found['shard']} of a campaign; `merge` the shards first"
        )
    if found["n_trials"] < found["n_planned"]:
        raise InputError(
            f"{path} has {found['n_trials']} of {found['n_planned']} planned trials; finish it "
            "with inject --resume"
        )
    return found


def read(paths: Sequence[Path], *, confidence: float = 0.95, model: Path | None = None) -> Evidence:
    """Campaign stores and `.json` files: of `attack`, the clean.json of a run, manifest.json of an
    export.

    InputError when a file is none of these or a campaign is not finished, and when they (and
    `model`, an ONNX file) do not belong to one and the same file.
    """
    digests = {} if model is None else {str(model): artifacts.sha256(model)}
    campaigns: dict[str, dict[str, Any]] = {}
    attacks: dict[str, dict[float, Count]] = {}
    clean: dict[str, Count] = {}
    exports: dict[str, Export] = {}
    for path in paths:
        name = str(path)
        if path.suffix != ".json":
            campaigns[name] = found = _campaign(path, confidence)
            clean[name] = Count(**found["golden"])
            digests[name] = found["model_sha256"]
            continue
        found = artifacts.read_json(path)
        try:
            if "parity" in found:
                digests[name] = found["files"][DEPLOYED]
                exports[name] = Export(
                    max_steps=max(int(pair["max_steps"]) for pair in found["parity"]),
                    n_images=min(int(pair["n_images"]) for pair in found["parity"]),
                    weight_bytes=int(found["weights"]["n_bytes"]),
                )
            elif "epsilons" in found:
                digests[name] = found["model_sha256"]
                rows = found["epsilons"]
                attacks[name] = {float(r["epsilon"]): Count(**r["deployed"]) for r in rows}
                clean[name] = Count(**found["clean"]["deployed"])
            else:
                clean[name] = Count(n_correct=found["n_correct"], n_total=found["n_total"])
                digests[name] = found["inputs"]["model_sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no evidence (wrong or missing: {error}); expected campaign stores, the "
                "JSON of `attack`, the clean.json of a run, or manifest.json"
            ) from None
    if not digests:
        raise InputError("nothing to judge by given; expected campaign stores or JSON files")
    first = next(iter(digests))
    for name, digest in digests.items():
        if digest != digests[first]:
            raise InputError(
                f"{first} and {name} were measured on different files (SHA-256 "
                f"{digests[first][:12]}... and {digest[:12]}...); measure both on one file"
            )
    return Evidence(
        model_sha256=digests[first], campaigns=campaigns, attacks=attacks, clean=clean,
        exports=exports, confidence=confidence,
    )  # fmt: skip
