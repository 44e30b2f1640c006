"""The files that go with an exported model, for build systems; all of them are made in memory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from resq_deploy import runtime
from resq_deploy.export import c_arrays, papers
from resq_deploy.export.golden import Golden
from resq_deploy.export.manifest import Manifest, schema
from resq_deploy.memory_map import MemoryMap

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
STATIC = Path(__file__).with_name("static")
"""Files that are the same in every bundle."""


def digest(content: bytes) -> str:
    """SHA-256, as hex."""
    return hashlib.sha256(content).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def profile(mapped: MemoryMap) -> str:
    """`po2-tensor` where every scale is a power of two and holds for a whole tensor; `po2-channel`
    where each is a power of two, or three times one (behind ReLU6); `asymmetric-tensor` where a
    zero point is not 0; else `float-channel`."""
    if any(any(tensor.zero_point) for tensor in mapped.tensors):
        return "asymmetric-tensor"
    scales = [tensor.scale for tensor in mapped.tensors]
    if all(len(s) == 1 and np.frexp(s[0])[0] == 0.5 for s in scales):
        return "po2-tensor"
    if all(np.isin(np.frexp(s)[0], (0.5, 0.75)).all() for s in scales):
        return "po2-channel"
    return "float-channel"


def required_operators(model: bytes) -> str:
    """The configuration of a reduced onnxruntime build (`--include_ops_by_config`).

    Operators of the file and of the graph that onnxruntime makes of it, each with the version of
    the opset that introduced its form.
    """
    found: dict[tuple[str, int], set[str]] = {}
    for graph in (runtime.parse_model(model), runtime.optimized(model)):
        opsets = {entry.domain: entry.version for entry in graph.opset_import}
        for node in graph.graph.node:
            since = 1  # of com.microsoft's own
            if not node.domain:
                since = onnx.defs.get_schema(node.op_type, opsets[""]).since_version
            found.setdefault((node.domain or "ai.onnx", since), set()).add(node.op_type)
    lines = [f"{domain};{since};{','.join(sorted(ops))}" for (domain, since), ops in found.items()]
    return "\n".join(sorted(lines)) + "\n"


def embedded(
    qdq: bytes, name: str, mapped: MemoryMap, image: bytes, vectors: Golden
) -> dict[str, bytes]:
    """The files for firmware: memory map, arrays, golden vectors, build system integration."""
    return {
        "weights.bin": image,
        "memory_map.json": _json(mapped.to_json()),
        **c_arrays.weights(mapped, image),
        "golden.npz": vectors.npz(),
        **c_arrays.golden(vectors, name),
        "required_operators.config": required_operators(qdq).encode(),
        **{path.name: path.read_bytes() for path in sorted(STATIC.iterdir())},
    }


def depfile(target: Path, sources: Sequence[Path]) -> str:
    """A rule for make and ninja: `target` is made again when a source has changed.

    Paths stand as they are given, relative ones to the folder in which the build runs; blanks, `$`
    and `#` are escaped as GNU make reads them.
    """
    words = [
        re.sub(r"([ #])", r"\\\1", str(path)).replace("$", "$$") for path in (target, *sources)
    ]
    return f"{words[0]}: {' '.join(words[1:])}\n"


def finish(files: Mapping[str, bytes], made: dict[str, Any]) -> dict[str, bytes]:
    """All files of the bundle: those given, and the manifest, bill of materials and model card.

    `made` is the manifest without `files`; ValidationError (our own mistake) where it does not fit
    its schema.
    """
    sums = {name: digest(content) for name, content in files.items()}
    draft = Manifest(**made, files=sums)
    papers_ = {
        "sbom.cdx.json": _json(papers.sbom(draft, sums)),
        "MODEL_CARD.md": papers.model_card(draft).encode(),
        "manifest.schema.json": _json(schema()),
    }
    every = {**files, **papers_}
    sums = {name: digest(content) for name, content in every.items()}
    manifest = Manifest(**made, files=sums).model_dump(mode="json")
    every[MANIFEST] = _json(manifest)
    lines = [f"{digest(every[name])}  {name}\n" for name in sorted(every)]
    return {**every, SUMS: "".join(lines).encode()}
