"""What `manifest.json` holds; its JSON schema is published as docs/manifest.schema.json.

A field that is added keeps SCHEMA_VERSION, one that is renamed or changes its meaning raises it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Literal[1] = 1
DIGEST = r"^[0-9a-f]{64}$"

HARDENING = {
    "attack": ("attack",),
    "fault": ("attack", "fault"),
    "adjust": ("attack", "fault", "adjust"),
}
"""Sections of the recipe behind a checkpoint, by the stage that wrote it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Inputs(_Section):
    """What the bundle was made from; the same inputs are not exported again."""

    checkpoint_sha256: str = Field(pattern=DIGEST, description="SHA-256 of the checkpoint")
    encoding: str | None = Field(None, description="encoding asked for in place of the trained one")
    profile: str | None = Field(
        None, description="profile converted to at export, in place of the trained one"
    )
    export: dict[str, Any] = Field(description="section [export] of the recipe")
    parity_sha256: str = Field(pattern=DIGEST, description="digest of the images of the proof")


class Parity(_Section):
    """How far two executions are apart, in steps of the output quantizer."""

    a: str
    b: str
    n_images: int
    within_one_step: int = Field(description="images on which no output is further apart")
    max_steps: int
    argmax_equal: int
    argmax_decided: int = Field(description="images whose best two outputs are > 2 steps apart")
    argmax_decided_equal: int


class Accuracy(_Section):
    """Of model.qdq.onnx in onnxruntime, on the images of the parity proof."""

    n_correct: int
    n_total: int


class Weights(_Section):
    """The integer codes."""

    n_bytes: int = Field(description="bytes of all weights, without biases")
    code_min: int = Field(description="smallest code of the network")
    code_max: int = Field(description="largest code of the network")
    storage: str = Field(description="how a code is stored")
    encoding: str = Field(description="how codes are protected in their own bytes")
    n_unprotected_bytes: int = Field(description="bytes that the encoding does not cover")


class Tflite(_Section):
    """model.tflite, which holds some networks only."""

    written: bool
    reason: str | None = Field(description="why it is not there")


class Memory(_Section):
    """The array weights.bin; memory_map.json says where every tensor lies."""

    n_bytes: int
    n_tensors: int
    alignment: int = Field(description="of every tensor, bytes")
    byte_order: Literal["little"] = "little"
    bit_order: Literal["least significant bit of a byte is bit 0"] = (
        "least significant bit of a byte is bit 0"
    )


class Events(_Section):
    """Counts by what happens to a value at a quantizer."""

    tie: int = Field(description="exactly between two codes: rounded to the even one")
    saturated_low: int = Field(description="below the smallest code")
    saturated_high: int = Field(description="above the largest code")


class Vectors(_Section):
    """The golden vectors."""

    n_vectors: int
    n_quantizers: int
    quantizers_with: Events = Field(description="quantizers at which a vector causes it")
    n_roundings: int
    roundings_with: Events = Field(description="rows of the table of roundings that are one")
    tolerance_steps: dict[str, int] = Field(
        description="by client: output steps that it may be off on any vector"
    )
    measured_steps: dict[str, int] = Field(
        description="by execution at export: output steps that it was off at most"
    )


class Manifest(_Section):
    """manifest.json of a bundle that `resq-deploy export` wrote."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(description="name in the recipe")
    stage: str = Field(description="stage that wrote the checkpoint")
    hardening: dict[str, Any] = Field(
        description="sections of the recipe that hardened the checkpoint; none for a baseline"
    )
    seed: int
    recipe: dict[str, Any] = Field(description="the recipe without the paths of a machine")
    recipe_sha256: str = Field(pattern=DIGEST, description="digest of `recipe` in canonical JSON")
    inputs: Inputs
    opset: int
    ir_version: int
    profile: Literal["float-channel", "po2-tensor", "po2-channel", "asymmetric-tensor"] = Field(
        description="scales of weights: float, one per channel; or powers of two, one per tensor "
        "or channel"
    )
    rounding: Literal["half to even"] = "half to even"
    kernels: dict[str, int] = Field(description="operators that onnxruntime runs, and how many")
    parity: list[Parity]
    accuracy: Accuracy
    weights: Weights
    tflite: Tflite
    memory: Memory
    golden: Vectors
    versions: dict[str, str] = Field(description="of Python and of the libraries")
    threads: int = Field(description="of PyTorch in the parity proof")
    files: dict[str, str] = Field(description="SHA-256 of every other file, by name")


def hardening(stage: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The sections of a recipe that hardened the checkpoint of a stage."""
    return {name: recipe[name] for name in HARDENING.get(stage, ()) if name in recipe}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of manifest.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(mode="serialization"),
    }
