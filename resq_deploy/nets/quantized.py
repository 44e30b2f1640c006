"""From a float network to the int8 Brevitas network that is trained, attacked and exported.

The pattern is the one that onnxruntime turns into integer kernels completely: batch norm
folded, per-channel int8 weights, int32 biases, a quantizer on both inputs of every
addition, quantized pooled features and logits.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import brevitas.nn as qnn
import numpy as np
import torch
from brevitas.core.restrict_val import RestrictValueType
from brevitas.core.scaling import ScalingImplType
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from resq_deploy.encoding import Encoding
from resq_deploy.encoding import parse as parse_encoding
from resq_deploy.errors import InputError
from resq_deploy.nets.blocks import Add, Boundary, Foldable, Kind


class Unit(Uint8ActPerTensorFloat):
    """uint8 values in [0, 1], scale fixed at 1/255: a device feeds camera bytes as they are."""

    scaling_impl_type = ScalingImplType.CONST
    restrict_scaling_type = RestrictValueType.FP
    scaling_init = 1.0


class Probability(Unit):
    """uint8 values in [0, 1], scale fixed at 1/256: onnxruntime's QLinearSoftmax rounds exactly
    at this scale and cuts off at others."""

    scaling_init = 255 / 256


class UpToSix(Unit):
    """uint8 values in [0, 6], scale fixed at 6/255: saturating is what ReLU6 does."""

    scaling_init = 6.0


class Weights4(Int8WeightPerChannelFloat):
    """4-bit weights, codes -7 ... 7, per output channel."""

    bit_width = 4


class Weights7(Int8WeightPerChannelFloat):
    """7-bit weights, codes -63 ... 63, per output channel."""

    bit_width = 7


class ToLevels(nn.Module):
    """Rounds real codes to the nearest level of an encoding, with straight-through gradient."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.levels = torch.from_numpy(encoding.levels.astype(np.float32))
        self.between = (self.levels[1:] + self.levels[:-1]) / 2

    def forward(self, x: Tensor) -> Tensor:
        at = torch.bucketize(x.detach().float(), self.between.to(x.device))
        return x + (self.levels.to(x.device)[at].to(x.dtype) - x).detach()


def _weight_quant(weight_bits: int, encoding: Encoding) -> type:
    """The quantizer whose codes are levels of `encoding`; InputError where there is none."""
    if weight_bits not in (8, 4):
        raise InputError(f"weight_bits must be 8 or 4, got {weight_bits}")
    if weight_bits == 4:
        if encoding.name != "plain":
            raise InputError(f"encoding {encoding.name} is for 8-bit weights; the network has 4")
        return Weights4
    base = Weights7 if encoding.limit == 63 else Int8WeightPerChannelFloat
    if encoding.uniform:
        return base
    return type("WeightsOfLevels", (base,), {"float_to_int_impl": ToLevels(encoding)})


class Unsigned(Uint8ActPerTensorFloat):
    """uint8 activations. Statistics come from `calibrate`, not from the first 300 steps."""

    collect_stats_steps = 1


class Signed(Int8ActPerTensorFloat):
    """int8 activations, symmetric."""

    collect_stats_steps = 1


def _quantizer(act_quant: type, *, plain: bool = False) -> nn.Module:
    out = qnn.QuantIdentity(act_quant=act_quant, return_quant_tensor=not plain)
    return cast(nn.Module, out)


class QuantAdd(nn.Module):
    """Addition of two quantized tensors, as onnxruntime's QLinearAdd does it."""

    def __init__(self, marker: Add) -> None:
        super().__init__()
        self.main = None if marker.main_is_quantized else _quantizer(Signed)
        self.skip = None if marker.skip_is_quantized else _quantizer(Signed)

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        main = self.main(main) if self.main else main
        return value(main) + value(self.skip(skip) if self.skip else skip)


KINDS: dict[Kind, type] = {
    "unit": Unit, "probability": Probability, "unsigned": Unsigned, "signed": Signed,
}  # fmt: skip
WEIGHT_LAYERS = (qnn.QuantConv2d, qnn.QuantLinear)


def value(x: Tensor | QuantTensor) -> Tensor:
    """The dequantized value of a QuantTensor; a plain tensor as it is."""
    return x.value if isinstance(x, QuantTensor) else x


class MarkerTracer(fx.Tracer):
    """Traces a network without looking into our markers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Boundary, Add)) or super().is_leaf_module(m, module_qualified_name)


def fold(net: nn.Module) -> nn.Module:
    """A copy in eval mode with every batch norm folded into the convolution before it, and
    every `Foldable` folded.

    The folded network computes the same function up to float rounding. Raises InputError
    for a batch norm that does not directly follow a convolution.
    """
    net = copy.deepcopy(net).eval()
    modules = dict(net.named_modules())
    for node in MarkerTracer().trace(net).nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        before = modules.get(str(cast(fx.Node, node.args[0]).target))
        if not isinstance(before, nn.Conv2d | nn.Linear):
            raise InputError(
                f"batch norm {node.target!r} does not follow a convolution and cannot be folded"
            )
        assert norm.running_mean is not None and norm.running_var is not None
        before.weight, before.bias = fuse_conv_bn_weights(
            before.weight, before.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias,
        )  # fmt: skip
        _replace(net, str(node.target), nn.Identity())
    for module in net.modules():
        if isinstance(module, Foldable):
            module.fold()
    return net


def _replace(net: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, new)


def _layer(old: nn.Module, weight_bits: int, encoding: Encoding) -> nn.Module | None:
    """The Brevitas counterpart of one float module; None where it stays as it is."""
    weights = {"weight_quant": _weight_quant(weight_bits, encoding), "bias_quant": Int32Bias}
    if isinstance(old, nn.Conv2d):
        shape: Any = (old.in_channels, old.out_channels, old.kernel_size)
        options: Any = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups")}
        new = qnn.QuantConv2d(*shape, bias=True, **options, **weights)
    elif isinstance(old, nn.Linear):
        new = qnn.QuantLinear(old.in_features, old.out_features, bias=True, **weights)
    elif isinstance(old, nn.ReLU | nn.ReLU6):
        kind = Unsigned if isinstance(old, nn.ReLU) else UpToSix
        return cast(nn.Module, qnn.QuantReLU(act_quant=kind, return_quant_tensor=True))
    elif isinstance(old, Add):
        return QuantAdd(old)
    elif isinstance(old, Boundary):
        return _quantizer(KINDS[old.kind], plain=old.plain)
    else:
        return None
    new.encoding = encoding
    new.weight.data.copy_(old.weight.data)
    new.bias.data.zero_()
    if old.bias is not None:
        new.bias.data.copy_(old.bias.data)
    return cast(nn.Module, new)


def quantize(net: nn.Module, *, weight_bits: int = 8, encoding: str = "plain") -> nn.Module:
    """The int8 Brevitas network of a float one (batch norm folded), not yet calibrated.

    Weight names stay those of the float network. `weight_bits` is 8 or 4 (codes -7 ... 7) for
    every weight; activations stay at 8 bits. Every code is a level of `encoding`, by its name.
    InputError for another number of bits, and for 4 bits with another encoding than plain.
    """
    stored = parse_encoding(encoding)
    net = fold(net)
    for name, module in list(net.named_modules()):
        new = _layer(module, weight_bits, stored)
        if new is not None:
            _replace(net, name, new)
    return net


@torch.no_grad()
def calibrate(net: nn.Module, x: Tensor, *, batch: int = 128) -> None:
    """Set the scale of every activation quantizer from images x (N, C, H, W) in [0, 1]."""
    device = next(net.parameters()).device
    net.eval()
    with calibration_mode(net):
        for start in range(0, len(x), batch):
            net(x[start : start + batch].to(device))


def weight_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose stored weights are int8, by name, in the order of the network."""
    return {n: m for n, m in net.named_modules() if isinstance(m, WEIGHT_LAYERS)}


def encoding_of(net: nn.Module) -> Encoding:
    """How the weights of a quantized network are stored: one encoding for all."""
    (found,) = {cast(Encoding, layer.encoding) for layer in weight_layers(net).values()}
    return found


def codes(layer: nn.Module) -> Tensor:
    """The int8 codes of a layer's weights, in the shape of the weight: what a device computes with.

    4-bit weights too have one code per byte. A file stores what `layer.encoding` makes of them.
    """
    return cast(Tensor, cast(Any, layer).quant_weight().int()).to(torch.int8)
