"""The int8 weights of a quantized ONNX file, whoever made it, stored in an encoding.

Nothing is trained, and nothing but the file is needed: codes are rounded to the levels of the
encoding, and a decoder of standard operators stands behind each weight.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from resq_deploy import artifacts, runtime
from resq_deploy.encoding import Encoding, decoders, parse
from resq_deploy.errors import InputError
from resq_deploy.inject import discovery

OPSET = 13
"""From here on, Gather takes codes as indices into a table, and weights have scales by channel."""


def encode(source: Path, *, out: Path, encoding: str) -> dict[str, Any]:
    """Write OUT, the quantized ONNX file SOURCE with its int8 weights stored as `encoding`, by its
    name; a JSON sidecar beside it, which is returned.

    `rms_change`: root mean square by which codes changed, in steps; `n_bytes`: of these weights.
    InputError for an encoding whose scales would be others (codes of 7 bits), a file without int8
    weights, one with decoders already, and where onnxruntime would run other kernels.
    """
    kind = parse(encoding)
    if kind.limit != Encoding.limit:
        raise InputError(
            f"encoding {encoding} has codes of 7 bits, and the file has scales for 8; expected one "
            "such as cosq:0.01, or export --encoding from the checkpoint"
        )
    raw = runtime.read_model(source)
    before = runtime.kernels(raw)
    found = discovery.discover(runtime.parse_model(raw, str(source)))
    if found.decoders.read:
        raise InputError(f"{source} has decoders behind its weights already; the file without them "
                         "expected")  # fmt: skip
    opset = {o.domain: o.version for o in found.model.opset_import}.get("", 0)
    if opset < OPSET:
        raise InputError(f"{source} has opset {opset}; {OPSET} or newer expected: export it again")
    types = Counter(tensor.dtype for tensor in found.space.tensors)
    if set(types) != {"int8"}:
        named = ", ".join(f"{n} of {dtype}" for dtype, n in sorted(types.items()))
        raise InputError(f"{source} has weights that are not int8 ({named}); quantize it with int8 "
                         "weights")  # fmt: skip
    stored = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer}
    weights = {tensor.name: stored[tensor.name] for tensor in found.space.tensors}
    levels = {name: kind.nearest(codes.astype(np.float64)) for name, codes in weights.items()}
    decoders.attach(found.model, kind, levels)
    made = found.model.SerializeToString(deterministic=True)
    kernels = runtime.kernels(made)
    if kernels != before:
        raise InputError(f"onnxruntime would run other kernels ({kernels}) than without the "
                         f"decoders of {encoding} ({before}); it must stay as it is")  # fmt: skip
    artifacts.write(out, lambda path: path.write_bytes(made))
    change = np.concatenate([
        (levels[name].astype(float) - codes).reshape(-1) for name, codes in weights.items()
    ])  # fmt: skip
    return artifacts.seal(
        out,
        {"model_sha256": artifacts.sha256(source), "encoding": encoding},
        n_bytes=change.size,
        rms_change=float(np.sqrt(np.mean(change**2))),
        kernels=kernels,
    )
