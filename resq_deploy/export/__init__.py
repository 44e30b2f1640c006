"""From a checkpoint to the files that a device runs, with proof that they are the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from resq_deploy import artifacts, evaluate, memory_map, metrics, runtime
from resq_deploy.callable_module import make_callable
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.encoding import decoders
from resq_deploy.errors import InputError
from resq_deploy.export import bundle, c_decoder, checks, golden
from resq_deploy.export.bundle import MANIFEST
from resq_deploy.export.graph import capture
from resq_deploy.export.manifest import hardening
from resq_deploy.export.packed import pack
from resq_deploy.export.qdq import to_qdq
from resq_deploy.export.qonnx import execute, to_qonnx
from resq_deploy.export.tflite import Unsupported, tflite
from resq_deploy.nets import checkpoint
from resq_deploy.nets.quantized import codes, encoding_of, weight_layers
from resq_deploy.recipe import Export

QDQ, QONNX, TFLITE = "model.qdq.onnx", "model.qonnx.onnx", "model.tflite"
STORAGE = {
    "int8": "one int8 code per byte, two's complement",
    "int4": "two int4 codes per byte, low nibble first, two's complement",
}


def output_step(net: nn.Module) -> float:
    """Scale of the quantizer on the logits: the unit of parity."""
    scale = net.get_submodule("output.act_quant").scale()  # type: ignore[operator]
    return float(scale)


def _outputs(net: nn.Module, files: dict[str, Any], x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Logits (N, n_classes) of all executions of the network, by name."""
    outputs = {"torch": evaluate.logits(net, x).numpy()}
    for level in runtime.LEVELS:
        session = runtime.session(files[QDQ].SerializeToString(), level=level, threads=0)
        outputs[f"onnxruntime {level}"] = runtime.run(session, runtime.adapt(x, session))
    outputs["qonnx"] = execute(files[QONNX], as_float(x))
    return outputs


def _parity(net: nn.Module, outputs: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    pairs = [("torch", f"onnxruntime {level}") for level in runtime.LEVELS]
    pairs += [("torch", "qonnx"), ("onnxruntime all", "qonnx")]
    step = output_step(net)
    return checks.require(
        [checks.parity(pair, outputs[pair[0]], outputs[pair[1]], step=step) for pair in pairs]
    )


def _tflite(model: onnx.ModelProto, config: Export) -> tuple[dict[str, bytes], str | None]:
    """The TFLite file by name; or nothing, and why the format cannot hold this network."""
    try:
        raw = tflite(model)
    except Unsupported as error:
        if config.tflite == "required":
            raise
        return {}, str(error)
    checks.tflite_codes(raw, model)
    return {TFLITE: raw}, None


def _inputs(
    source: Path, images: Dataset, config: Export, encoding: str | None, profile: str | None
) -> dict[str, Any]:
    return {
        "checkpoint_sha256": artifacts.sha256(source),
        "encoding": encoding,
        "profile": profile,
        "export": config.model_dump(mode="json"),
        "parity_sha256": images.first(min(config.parity_images, len(images))).sha256,
    }


def _pixels(images: Dataset) -> NDArray[np.uint8]:
    """The images as a device gets them."""
    x = images.x
    return x if x.dtype == np.uint8 else np.rint(255 * x).astype(np.uint8)


def _refuse_foreign(out: Path) -> None:
    """InputError when `out` holds anything that no export wrote: it would be lost."""
    if not out.exists():
        return
    ours = {MANIFEST, bundle.SUMS}
    if (out / MANIFEST).is_file():
        ours |= artifacts.read_json(out / MANIFEST).get("files", {}).keys()
    foreign = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else ["-"]
    if foreign:
        raise InputError(
            f"{out} is not a folder of exported files alone (first: {foreign[0]}); an export "
            "replaces the whole folder: give a new one"
        )


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
    profile: str | None = None,
) -> Path:
    """Write the bundle of docs/bundle.md into OUT: model.qdq.onnx, model.qonnx.onnx, model.tflite
    where that format can hold the network, manifest.json and all that builds need; returns the
    first.

    `encoding` stores the weights otherwise than the checkpoint was trained for: their codes are
    rounded to its levels. `profile`, one of `nets.quantizers.PROFILES`, gives weights and
    activations other scales than those that the checkpoint was trained with.
    `images` (uint8) prove parity. Every guarantee is checked before anything appears in OUT:
    ExportError (one line) leaves no partial export. An unchanged export is not repeated, only its
    manifest gets a new time, as build systems expect. InputError when OUT holds other files.
    """
    config = config or Export()
    if profile == checkpoint.profile_of(checkpoint.read_facts(source)):
        profile = None
    inputs = _inputs(source, images, config, encoding, profile)
    if _is_current(out, inputs):
        (out / MANIFEST).touch()
        return out / QDQ
    _refuse_foreign(out)
    net, facts = checkpoint.load(source, encoding=encoding, profile=profile)
    if not facts["quantized"]:
        raise InputError(f"{source} is a float checkpoint; export needs an int8 one")
    shape = tuple(images.x.shape[1:])
    graph = capture(net, shape, opset=config.opset)
    files = {
        QDQ: to_qdq(graph, net, ir_version=config.ir_version),
        QONNX: to_qonnx(graph, net, ir_version=config.ir_version),
    }
    weights = {name: codes(layer).numpy() for name, layer in weight_layers(net).items()}
    kernels = checks.integer_kernels(files[QDQ].SerializeToString())
    stored = encoding_of(net)
    decoders.attach(files[QDQ], stored, {f"{name}.weight": w for name, w in weights.items()})
    checks.structure(files[QDQ], weights, stored)
    checks.same_kernels(files[QDQ].SerializeToString(), kernels)
    lite, why_not = _tflite(files[QDQ], config)
    if config.weights == "int4":
        pack(files[QDQ], [f"{name}.weight" for name in weights])
        checks.same_kernels(files[QDQ].SerializeToString(), kernels)
    written = {name: model.SerializeToString() for name, model in files.items()} | lite
    mapped, image = memory_map.of(
        files[QDQ], name=QDQ, sha256=bundle.digest(written[QDQ]), encoding=stored.name
    )
    scales = bundle.profile(mapped)
    vectors = golden.make(files[QDQ], _pixels(images), profile=scales)
    proof = images.first(min(config.parity_images, len(images)))
    outputs = _outputs(net, files, proof.x)
    made = {
        "name": facts["recipe"].get("name", source.stem),
        "inputs": inputs,
        "stage": facts["stage"],
        "seed": facts["recipe"]["seed"],
        "recipe": facts["recipe"],
        "recipe_sha256": artifacts.digest(facts["recipe"]),
        "hardening": hardening(facts["stage"], facts["recipe"]),
        "profile": scales,
        "opset": files[QDQ].opset_import[0].version,
        "ir_version": files[QDQ].ir_version,
        "kernels": kernels,
        "parity": _parity(net, outputs),
        "accuracy": {
            "n_correct": int((metrics.top1(outputs["onnxruntime all"]) == proof.y).sum()),
            "n_total": len(proof),
        },
        "weights": {
            "n_bytes": sum(t.bytes for t in mapped.tensors if t.target == "weight"),
            "code_min": int(min(np.min(w) for w in weights.values())),
            "code_max": int(max(np.max(w) for w in weights.values())),
            "storage": STORAGE[config.weights],
            "encoding": stored.name,
            "n_unprotected_bytes": sum(
                stored.unprotected(t.bytes) for t in mapped.tensors if t.target == "weight"
            ),
        },
        "tflite": {"written": bool(lite), "reason": why_not},
        "memory": {
            "n_bytes": mapped.bytes,
            "n_tensors": len(mapped.tensors),
            "alignment": mapped.alignment,
        },
        "golden": vectors.facts()
        | {
            "measured_steps": {
                name: vectors.steps(output)
                for name, output in _outputs(net, files, vectors.x).items()
            }
        },
        "versions": artifacts.versions(),
        "threads": torch.get_num_threads(),
    }
    written |= bundle.embedded(written[QDQ], QDQ, mapped, image, vectors)
    written |= c_decoder.sources(stored)
    artifacts.write_folder(out, bundle.finish(written, made))
    return out / QDQ


make_callable(__name__, export)

__all__ = ["MANIFEST", "QDQ", "QONNX", "TFLITE", "export", "output_step"]
