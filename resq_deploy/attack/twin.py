"""The twin of a file: the network of a checkpoint, whose codes the file stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from resq_deploy import artifacts, bits
from resq_deploy.export import MANIFEST
from resq_deploy.inject.memory import Memory
from resq_deploy.nets import checkpoint
from resq_deploy.nets.quantized import codes, encoding_of, weight_layers

WANTED = (
    "give the checkpoint that the file was exported from (after export --encoding or --profile "
    f"leave the file beside its {MANIFEST}, which says so)"
)


def load_twin(model: Path, source: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, in eval mode, and its sidecar, as `checkpoint.load` gives them.

    Where the manifest beside `model` says that this checkpoint was exported with another encoding
    or profile than it was trained for, that is done to the network too. InputError as there.
    """
    manifest = model.parent / MANIFEST
    made: Any = artifacts.read_json(manifest) if manifest.is_file() else None
    inputs = made.get("inputs") if isinstance(made, dict) else None
    given = {}
    if isinstance(inputs, dict) and inputs.get("checkpoint_sha256") == artifacts.sha256(source):
        given = {key: inputs.get(key) for key in ("encoding", "profile")}
    return checkpoint.load(source, **given)


def strange_weight(memory: Memory, net: nn.Module) -> str | None:
    """The first weight of a quantized `net` whose codes, encoded as it says, the memory of the
    file does not store; None when it stores all of them."""
    encoding = encoding_of(net)
    pairs = zip(memory.space.tensors, memory.contents, strict=True)
    stored = {tensor.name: (tensor.dtype, content.tobytes()) for tensor, content in pairs}
    for layer_name, layer in weight_layers(net).items():
        name = f"{layer_name}.weight"
        expected = encoding.encode(codes(layer).numpy())
        dtype, content = stored.get(name, ("", b""))
        if dtype in bits.PACKED:
            expected = bits.pack(expected.reshape(-1))
        if content != expected.tobytes():
            return name
    return None
