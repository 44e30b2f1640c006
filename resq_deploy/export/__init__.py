"""From a checkpoint to the files that a device runs, with proof that they are the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from resq_deploy import artifacts, evaluate, runtime
from resq_deploy.callable_module import make_callable
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.errors import InputError
from resq_deploy.export import checks, decoders
from resq_deploy.export.qdq import qdq
from resq_deploy.export.qonnx import execute, qonnx
from resq_deploy.nets import checkpoint
from resq_deploy.nets.quantized import codes, encoding_of, weight_layers
from resq_deploy.recipe import Export

QDQ, QONNX, MANIFEST = "model.qdq.onnx", "model.qonnx.onnx", "manifest.json"


def output_step(net: nn.Module) -> float:
    """Scale of the quantizer on the logits: the unit of parity."""
    scale = net.get_submodule("output.act_quant").scale()  # type: ignore[operator]
    return float(scale)


def _parity(
    net: nn.Module, files: dict[str, Any], images: Dataset, config: Export
) -> list[dict[str, Any]]:
    n = min(config.parity_images, len(images))
    x, outputs = images.first(n).x, {}
    outputs["torch"] = evaluate.logits(net, x).numpy()
    for level in runtime.LEVELS:
        session = runtime.session(files[QDQ].SerializeToString(), level=level, threads=0)
        outputs[f"onnxruntime {level}"] = runtime.run(session, runtime.adapt(x, session))
    outputs["qonnx"] = execute(files[QONNX], as_float(x))
    pairs = [("torch", f"onnxruntime {level}") for level in runtime.LEVELS]
    pairs += [("torch", "qonnx"), ("onnxruntime all", "qonnx")]
    step = output_step(net)
    return checks.require(
        [checks.parity(pair, outputs[pair[0]], outputs[pair[1]], step=step) for pair in pairs]
    )


def _inputs(source: Path, images: Dataset, config: Export, encoding: str | None) -> dict[str, Any]:
    return {
        "checkpoint_sha256": artifacts.sha256(source),
        **({} if encoding is None else {"encoding": encoding}),
        "export": config.model_dump(mode="json"),
        "parity_sha256": images.first(min(config.parity_images, len(images))).sha256,
    }


def _is_current(out: Path, inputs: dict[str, Any]) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    manifest = artifacts.read_json(out / MANIFEST)
    return bool(manifest.get("inputs") == inputs) and all(
        (out / name).is_file() and artifacts.sha256(out / name) == digest
        for name, digest in manifest["files"].items()
    )


def export(
    source: Path,
    *,
    out: Path,
    images: Dataset,
    config: Export | None = None,
    encoding: str | None = None,
) -> Path:
    """Write OUT/model.qdq.onnx, model.qonnx.onnx and manifest.json; returns the first.

    `encoding` stores the weights otherwise than the checkpoint was trained for: their codes are
    rounded to its levels.
    `images` (uint8) prove parity. Every guarantee is checked before anything appears in OUT:
    ExportError (one line) leaves no partial export. An unchanged export is not repeated.
    """
    config = config or Export()
    inputs = _inputs(source, images, config, encoding)
    if _is_current(out, inputs):
        return out / QDQ
    net, facts = checkpoint.load(source, encoding=encoding)
    if not facts["quantized"]:
        raise InputError(f"{source} is a float checkpoint; export needs an int8 one")
    shape = tuple(images.x.shape[1:])
    options = {"opset": config.opset, "ir_version": config.ir_version}
    files = {QDQ: qdq(net, shape, **options), QONNX: qonnx(net, shape, **options)}
    weights = {name: codes(layer).numpy() for name, layer in weight_layers(net).items()}
    kernels = checks.integer_kernels(files[QDQ].SerializeToString())
    stored = encoding_of(net)
    decoders.attach(files[QDQ], stored, {f"{name}.weight": w for name, w in weights.items()})
    checks.structure(files[QDQ], weights, stored)
    checks.same_kernels(files[QDQ].SerializeToString(), kernels)
    manifest = {
        "inputs": inputs,
        "stage": facts["stage"],
        "seed": facts["recipe"]["seed"],
        "recipe": facts["recipe"],
        "opset": config.opset,
        "ir_version": config.ir_version,
        "kernels": kernels,
        "parity": _parity(net, files, images, config),
        "weights": {
            "n_bytes": int(sum(w.size for w in weights.values())),
            "code_min": int(min(np.min(w) for w in weights.values())),
            "code_max": int(max(np.max(w) for w in weights.values())),
            "storage": "one int8 code per byte, two's complement",
            "encoding": stored.name,
            "n_unprotected_bytes": sum(stored.unprotected(w.size) for w in weights.values()),
        },
        "rounding": "half to even",
        "versions": artifacts.versions(),
        "threads": torch.get_num_threads(),
    }
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        for name, model in files.items():
            artifacts.write(staged / name, lambda p, m=model: p.write_bytes(m.SerializeToString()))  # type: ignore[misc]
        manifest["files"] = {name: artifacts.sha256(staged / name) for name in files}
        artifacts.write_json(staged / MANIFEST, manifest)
        shutil.rmtree(out, ignore_errors=True)
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return out / QDQ


make_callable(__name__, export)

__all__ = ["MANIFEST", "QDQ", "QONNX", "export", "output_step"]
