"""Whether a checkpoint is the twin of a file: the network whose codes the file stores."""

from __future__ import annotations

from torch import nn

from resq_deploy import bits
from resq_deploy.inject.memory import Memory
from resq_deploy.nets.quantized import codes, encoding_of, weight_layers

WANTED = (
    "give the checkpoint that the file was exported from (export --encoding and --profile change "
    "codes: such a file has no twin)"
)


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
