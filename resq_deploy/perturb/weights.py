"""Bit errors in the integer codes of a Brevitas network, with straight-through gradients.

w -> int8 code q -> q xor mask -> dequantize. The flip itself is the exclusive-or of
`bits.py`; the gradient of the faulty weight passes to the weight as if nothing happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from resq_deploy import bits
from resq_deploy.nets.quantized import weight_layers

Masks = Mapping[str, Tensor]
"""Layer name -> int8 tensor of the weight's shape; bit b set means: bit b is flipped."""


def random_masks(
    net: nn.Module, rates: float | Mapping[str, float], rng: np.random.Generator
) -> dict[str, Tensor]:
    """Independent errors per stored bit at one rate in [0, 1], or at one rate per layer.

    A layer that `rates` does not name, or that draws no error, is left out.
    """
    masks = {}
    for name, layer in weight_layers(net).items():
        weight = cast(Tensor, layer.weight)
        rate = rates if isinstance(rates, float) else rates.get(name, 0.0)
        at = bits.random_positions(8 * weight.numel(), rate, rng)
        if at.size:
            mask = bits.flip_sites(np.zeros(weight.numel(), np.int8), at // 8, at % 8)
            masks[name] = torch.from_numpy(mask).reshape(weight.shape).to(weight.device)
    return masks


def _corrupt(mask: Tensor) -> Any:
    def hook(proxy: nn.Module, args: Any, out: IntQuantTensor) -> IntQuantTensor:
        scale = out.scale.detach()
        code = torch.round(out.value.detach() / scale).to(torch.int8)
        step = (code ^ mask).to(scale.dtype) - code.to(scale.dtype)
        return cast(IntQuantTensor, out.set(value=out.value + step * scale))

    return hook


@contextmanager
def bit_errors(net: nn.Module, masks: Masks) -> Iterator[None]:
    """Inside the context, the named layers compute with flipped codes."""
    layers = weight_layers(net)
    with ExitStack() as stack:
        for name, mask in masks.items():
            proxy = cast(nn.Module, layers[name].weight_quant)
            stack.callback(proxy.register_forward_hook(_corrupt(mask)).remove)
        yield
