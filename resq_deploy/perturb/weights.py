"""Bit errors in the integer codes of a Brevitas network, with straight-through gradients.

w -> int8 code q -> encode(q) xor mask -> decode -> dequantize; encode and decode are those of the
network's encoding. The flip itself is the exclusive-or of `bits.py`; the gradient of the faulty
weight passes to the weight as if nothing happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from brevitas.quant_tensor import IntQuantTensor
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_deploy import bits
from resq_deploy.encoding import Encoding
from resq_deploy.errors import InputError
from resq_deploy.nets.quantized import codes, encoding_of, weight_layers, zero_point

Masks = Mapping[str, Tensor]
"""Layer name -> int8 tensor of the weight's shape; bit b set means: bit b is flipped. Of packed
codes bit 3, their sign, stands for bits 3 to 7 of the int8 code."""


def _mask(weight: Tensor, at: NDArray[np.int64], width: int) -> Tensor:
    """The mask that flips bit `at` % `width` of element `at` // `width` of a weight."""
    mask = bits.flip_sites(np.zeros(weight.numel(), np.int8), at // width, at % width)
    if width == 4:
        mask = bits.from_nibbles(mask.view(np.uint8), "int4")
    return torch.from_numpy(mask).reshape(weight.shape).to(weight.device)


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: cast(Tensor, layer.weight) for name, layer in weight_layers(net).items()}


def _width(net: nn.Module) -> int:
    """Stored bits of a code: one number for all layers."""
    (found,) = {cast(int, layer.stored_bits) for layer in weight_layers(net).values()}
    return found


def random_masks(
    net: nn.Module, rates: float | Mapping[str, float], rng: np.random.Generator
) -> dict[str, Tensor]:
    """Independent errors per stored bit at one rate in [0, 1], or at one rate per layer.

    A layer that `rates` does not name, or that draws no error, is left out.
    """
    masks, width = {}, _width(net)
    for name, weight in _weights(net).items():
        rate = rates if isinstance(rates, float) else rates.get(name, 0.0)
        at = bits.random_positions(width * weight.numel(), rate, rng)
        if at.size:
            masks[name] = _mask(weight, at, width)
    return masks


def k_masks(
    net: nn.Module, k: int, rates: Mapping[str, float], rng: np.random.Generator
) -> dict[str, Tensor]:
    """Exactly `k` distinct stored bits of the whole network, bits of a layer drawn in proportion
    to its rate (equal rates: every set of k bits alike).

    InputError when the layers with a rate above 0 have fewer bits.
    """
    layers = {name: w for name, w in _weights(net).items() if rates.get(name, 0.0) > 0}
    width = _width(net)
    n_bits = np.array([width * w.numel() for w in layers.values()])
    if k > n_bits.sum():
        raise InputError(f"{k} bits are to flip; the layers that may be hit have {n_bits.sum()}")
    share = n_bits * np.array([rates[name] for name in layers])
    found: set[tuple[int, int]] = set()
    while len(found) < k:  # a bit that was drawn before is drawn again
        for layer in rng.choice(len(layers), size=k - len(found), p=share / share.sum()):
            found.add((int(layer), int(rng.integers(n_bits[layer]))))
    hit: dict[int, list[int]] = {}
    for layer, position in sorted(found):
        hit.setdefault(layer, []).append(position)
    names = list(layers)
    return {names[i]: _mask(layers[names[i]], np.array(at), width) for i, at in hit.items()}


def worst_masks(net: nn.Module, k: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `k` bits, at most one per weight, whose flips raise the loss most to first order.

    `gradients` holds dL/dW by layer; flipping a bit changes the loss by about dL/dW times the
    scale times the change of the code. Fewer than k where fewer would raise it.
    """
    gains, chosen, starts = [], [], [0]
    layers, encoding, width = weight_layers(net), encoding_of(net), _width(net)
    if encoding.corrects:
        raise InputError(
            f"encoding {encoding.name} corrects single flips: there is no worst one; random bit "
            "errors (fault.method = randbet) expected"
        )
    for name, gradient in gradients.items():
        code = codes(layers[name])
        scale = cast(Any, layers[name]).quant_weight().scale.detach()
        slope = (gradient.detach() * scale).float()
        steps = [_step_of_one(code, bit, encoding, width) for bit in range(width)]
        change = torch.stack([step * slope for step in steps])
        best, bit = change.flatten(1).max(dim=0)
        gains.append(best)
        chosen.append(bit)
        starts.append(starts[-1] + len(best))
    top = torch.cat(gains).topk(min(k, starts[-1]))
    bit_of = torch.cat(chosen)
    at = np.sort(top.indices[top.values > 0].cpu().numpy())
    masks = {}
    for name, start, end in zip(gradients, starts, starts[1:], strict=False):
        inside = at[(at >= start) & (at < end)]
        if inside.size:
            bits_there = bit_of[torch.from_numpy(inside)].cpu().numpy()
            masks[name] = _mask(_weights(net)[name], width * (inside - start) + bits_there, width)
    return masks


def _step(code: Tensor, mask: Tensor, encoding: Encoding) -> Tensor:
    """By how much what is read differs from int8 codes once stored bits flip, as int16."""
    if encoding.name == "plain":
        read = code ^ mask
    else:
        stored = encoding.encode(code.cpu().numpy()) ^ mask.cpu().numpy()
        read = torch.from_numpy(encoding.decode(stored)).to(code.device)
    return read.to(torch.int16) - code.to(torch.int16)


def _step_of_one(code: Tensor, bit: int, encoding: Encoding, width: int) -> Tensor:
    """The same where one of the `width` stored bits flips alone, for each of the codes."""
    if encoding.name == "plain":
        mask = 1 << bit if bit < width - 1 else -(1 << bit)
        return _step(code, torch.full_like(code, mask), encoding)
    read = encoding.struck_alone(encoding.encode(code.cpu().numpy()), bit)
    return torch.from_numpy(read).to(code.device, torch.int16) - code.to(torch.int16)


def _corrupt(mask: Tensor, encoding: Encoding) -> Any:
    def hook(proxy: nn.Module, args: Any, out: IntQuantTensor) -> IntQuantTensor:
        scale = out.scale.detach()
        code = torch.round(out.value.detach() / scale + zero_point(out)).to(torch.int8)
        step = _step(code, mask, encoding).to(scale.dtype)
        return cast(IntQuantTensor, out.set(value=out.value + step * scale))

    return hook


@contextmanager
def bit_errors(net: nn.Module, masks: Masks) -> Iterator[None]:
    """Inside the context, the named layers compute with what is read of flipped stored codes."""
    layers = weight_layers(net)
    with ExitStack() as stack:
        for name, mask in masks.items():
            proxy = cast(nn.Module, layers[name].weight_quant)
            hook = _corrupt(mask, cast(Encoding, layers[name].encoding))
            stack.callback(proxy.register_forward_hook(hook).remove)
        yield
