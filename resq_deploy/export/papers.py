"""What goes with a model on paper: the bill of materials and the model card."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from resq_deploy import metrics
from resq_deploy.export.manifest import Manifest

NAMESPACE = uuid.UUID("5f1f2a0e-0d0b-5c57-9d3f-6f1f0c1b7f10")
"""Of serial numbers that are made from digests."""


def _library(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{version}"
    return {
        "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
        "scope": "excluded",
    }  # fmt: skip


def _file(name: str, digest: str) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": digest}]
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": hashes}


def sbom(made: Manifest, files: Mapping[str, str]) -> dict[str, Any]:
    """The bill of materials, CycloneDX 1.6.

    `files` are the digests of the files of the bundle by name. Libraries made the bundle and are
    no part of it (scope `excluded`). No time and no random number: the serial number is made from
    the digests.
    """
    tools = {name: version for name, version in made.versions.items() if name != "python"}
    own = {"type": "application", "name": "resq-deploy", "version": tools.pop("resq-deploy", "0")}
    serial = uuid.uuid5(NAMESPACE, "".join(f"{name}{files[name]}" for name in sorted(files)))
    network = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": made.name,
        "version": made.inputs.checkpoint_sha256[:12],
        "description": f"int8 image classifier, stage {made.stage}",
        "properties": [
            {"name": "resq:checkpoint_sha256", "value": made.inputs.checkpoint_sha256},
            {"name": "resq:recipe_sha256", "value": made.recipe_sha256},
        ],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"tools": {"components": [own]}, "component": network},
        "components": [
            *(_file(name, files[name]) for name in sorted(files)),
            *(_library(name, tools[name]) for name in sorted(tools)),
        ],
        "dependencies": [{"ref": "model", "dependsOn": [f"file:{n}" for n in sorted(files)]}],
    }


def _bullets(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def _hardening(made: Manifest) -> str:
    if not made.hardening:
        return "None: this is the baseline, quantized and trained without faults and attacks."
    rows = []
    for name, section in made.hardening.items():
        fields = ", ".join(f"{key} = {value}" for key, value in section.items())
        rows.append(f"- `{name}`: {fields}")
    return "\n".join(rows)


def model_card(made: Manifest) -> str:
    """The model card, Markdown."""
    right = metrics.rate(made.accuracy.n_correct, made.accuracy.n_total, 0.95, method="wilson")
    worst = max(row.max_steps for row in made.parity)
    facts = {
        "network": made.recipe.get("model", {}).get("net", "not in the recipe"),
        "data": made.recipe.get("data", {}).get("name", "not in the recipe"),
        "stage": f"`{made.stage}`, seed {made.seed}",
        "input": "uint8 pixels, value = pixel / 255; (N, C, H, W) in the ONNX files",
        "weights": f"{made.weights.n_bytes} bytes, codes {made.weights.code_min} to "
        f"{made.weights.code_max}, {made.weights.storage}, encoding `{made.weights.encoding}`",
        "profile": f"`{made.profile}`"
        + (", converted at export: not trained with these scales" if made.inputs.profile else ""),
        "checkpoint": f"SHA-256 `{made.inputs.checkpoint_sha256}`",
        "recipe": f"SHA-256 `{made.recipe_sha256}`",
    }
    measured = {
        "accuracy without faults": f"{made.accuracy.n_correct} of {made.accuracy.n_total} images "
        f"({100 * right.value:.2f} %, 95 % Wilson interval {100 * right.low:.2f} to "
        f"{100 * right.high:.2f} %), onnxruntime",
        "agreement of PyTorch, onnxruntime and QONNX": f"at most {worst} output steps on "
        f"{made.parity[0].n_images} images",
    }
    return f"""\
# {made.name}, stage {made.stage}

An image classifier with int8 weights and activations, exported for devices whose memory may be
corrupted. Made by resq-deploy; `manifest.json` holds all of this for machines.

## Model

{_bullets(facts)}

## Hardening

{_hardening(made)}

## Measured at export

{_bullets(measured)}

Accuracy under faults and under attack is not measured by the export: `resq-deploy inject` and
`resq-deploy attack` measure it on `model.qdq.onnx`.

## Use and limits

For images like those it was trained on. The class of any other image means nothing, and the output
is no probability. A memory fault can change the answer; `resq_check.c` finds faults in the stored
weights, and nothing here finds those in activations.
"""
