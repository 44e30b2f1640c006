"""From a float network to the int8 Brevitas network that is trained, attacked and exported.

The pattern is the one that onnxruntime turns into integer kernels completely: batch norm
folded, per-channel int8 weights, int32 biases, a quantizer on both inputs of every
addition, quantized pooled features and logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import Int32Bias
from brevitas.quant_tensor import IntQuantTensor, QuantTensor
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from resq_deploy.encoding import Encoding
from resq_deploy.encoding import parse as parse_encoding
from resq_deploy.errors import InputError
from resq_deploy.nets import islands
from resq_deploy.nets.blocks import Add, Boundary, Foldable, UnitClip
from resq_deploy.nets.quantizers import Profile, weight_quantizer
from resq_deploy.nets.quantizers import profile as parse_profile


def _quantizer(act_quant: type, *, plain: bool = False) -> nn.Module:
    out = qnn.QuantIdentity(act_quant=act_quant, return_quant_tensor=not plain)
    return cast(nn.Module, out)


class QuantAdd(nn.Module):
    """Addition of two quantized tensors, as onnxruntime's QLinearAdd does it."""

    def __init__(self, marker: Add, signed: type) -> None:
        super().__init__()
        self.main = None if marker.main_is_quantized else _quantizer(signed)
        self.skip = None if marker.skip_is_quantized else _quantizer(signed)

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        main = self.main(main) if self.main else main
        return value(main) + value(self.skip(skip) if self.skip else skip)


WEIGHT_LAYERS = (qnn.QuantConv2d, qnn.QuantLinear)
RANGE = ".act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
"""In the name of an activation's range in a state dict."""


def value(x: Tensor | QuantTensor) -> Tensor:
    """The dequantized value of a QuantTensor; a plain tensor as it is."""
    return x.value if isinstance(x, QuantTensor) else x


class MarkerTracer(fx.Tracer):
    """Traces a network without looking into our markers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Boundary, Add)) or super().is_leaf_module(m, module_qualified_name)


class QuantTracer(fx.Tracer):
    """Traces an int8 network without looking into what `quantize` put in the place of layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, QuantAdd | islands.GELU | islands.LayerNorm | islands.Softmax)
        made = ours or type(m).__module__.startswith("brevitas.")
        return made or super().is_leaf_module(m, module_qualified_name)


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


def _layer(
    old: nn.Module, profile: Profile, weight_bits: int, encoding: Encoding
) -> nn.Module | None:
    """The Brevitas counterpart of one float module; None where it stays as it is."""
    weights = {
        "weight_quant": weight_quantizer(profile, weight_bits, encoding), "bias_quant": Int32Bias,
    }  # fmt: skip
    if isinstance(old, nn.Conv2d):
        shape: Any = (old.in_channels, old.out_channels, old.kernel_size)
        options: Any = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups")}
        new = qnn.QuantConv2d(*shape, bias=True, **options, **weights)
    elif isinstance(old, nn.Linear):
        new = qnn.QuantLinear(old.in_features, old.out_features, bias=True, **weights)
    elif isinstance(old, nn.ReLU | nn.ReLU6):
        kind = profile.relu if isinstance(old, nn.ReLU) else profile.relu6
        if kind is None:
            raise InputError(
                "ReLU6 saturates at 6, which no power of two does: use the profile po2-channel, or "
                "float-channel"
            )
        relu = cast(nn.Module, qnn.QuantReLU(act_quant=kind, return_quant_tensor=True))
        if isinstance(old, nn.ReLU6):
            relu.saturates = 6.0  # type: ignore[assignment]
        return relu
    elif isinstance(old, Add):
        return QuantAdd(old, profile.kinds["signed"])
    elif isinstance(old, UnitClip):
        unit = _quantizer(profile.kinds["unit"])
        unit.saturates = 1.0  # type: ignore[assignment]
        return unit
    elif isinstance(old, Boundary):
        return _quantizer(profile.kinds[old.kind], plain=old.plain)
    elif isinstance(old, nn.GELU):
        return islands.GELU(_quantizer(profile.kinds["signed"], plain=True))
    elif isinstance(old, nn.Softmax):
        return islands.Softmax(old.dim)
    elif isinstance(old, nn.LayerNorm):
        options = {"elementwise_affine": old.elementwise_affine, "bias": old.bias is not None}
        norm = islands.LayerNorm(old.normalized_shape, old.eps, **options)
        norm.load_state_dict(old.state_dict())
        return norm
    else:
        return None
    new.encoding = encoding
    new.weight.data.copy_(old.weight.data)
    new.bias.data.zero_()
    if old.bias is not None:
        new.bias.data.copy_(old.bias.data)
    return cast(nn.Module, new)


def quantize(
    net: nn.Module,
    *,
    weight_bits: int = 8,
    encoding: str = "plain",
    profile: str = "float-channel",
    packed: bool = False,
) -> nn.Module:
    """The int8 Brevitas network of a float one (batch norm folded), not yet calibrated.

    Weight names stay those of the float network. `weight_bits` is 8 or 4 (codes -7 ... 7) for
    every weight; activations stay at 8 bits. Every code is a level of `encoding`, by its name;
    scales are as `profile`, one of `quantizers.PROFILES`, says. `packed`: 4-bit codes are stored
    two a byte, and faults strike 4 bits of each.
    InputError for another number of bits, for 4 bits with another encoding than plain, for packed
    8-bit codes, and for a layer that the profile has no quantizer for.
    """
    if packed and weight_bits != 4:
        raise InputError(f"codes of {weight_bits} bits cannot be packed; weight_bits = 4 expected")
    stored, quantizers = parse_encoding(encoding), parse_profile(profile)
    net = fold(net)
    for name, module in list(net.named_modules()):
        new = _layer(module, quantizers, weight_bits, stored)
        if new is not None:
            _replace(net, name, new)
    for layer in weight_layers(net).values():
        cast(Any, layer).stored_bits = 4 if packed else 8
    return net


@contextmanager
def _saturating(net: nn.Module) -> Iterator[None]:
    """Inside the context the quantizers that stand for a clipping function clip although they are
    off, as Brevitas has them while it calibrates; else what is behind them sees values that never
    occur."""

    def clip(module: nn.Module, args: Any) -> Any:
        return (value(args[0]).clamp(0, cast(float, module.saturates)),)

    with ExitStack() as stack:
        for module in net.modules():
            if hasattr(module, "saturates"):
                stack.callback(module.register_forward_pre_hook(clip).remove)
        yield


@torch.no_grad()
def calibrate(net: nn.Module, x: Tensor, *, batch: int = 128) -> None:
    """Set the scale of every activation quantizer from images x (N, C, H, W) in [0, 1]."""
    device = next(net.parameters()).device
    net.eval()
    with _saturating(net), calibration_mode(net):
        for start in range(0, len(x), batch):
            net(x[start : start + batch].to(device))


def weight_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose stored weights are int8, by name, in the order of the network."""
    return {n: m for n, m in net.named_modules() if isinstance(m, WEIGHT_LAYERS)}


def ranges(net: nn.Module) -> dict[str, Tensor]:
    """The upper ends of what ReLU quantizers represent, by module name; those that are fixed
    (ReLU6) are left out. Scales that are powers of two keep their logarithm here: not for them."""
    found = dict(net.named_parameters())
    relus = [name for name, module in net.named_modules() if isinstance(module, qnn.QuantReLU)]
    return {name: found[name + RANGE] for name in relus if name + RANGE in found}


def encoding_of(net: nn.Module) -> Encoding:
    """How the weights of a quantized network are stored: one encoding for all."""
    (found,) = {cast(Encoding, layer.encoding) for layer in weight_layers(net).values()}
    return found


UNSIGNED = 128
"""An unsigned code is held and stored as the int8 code that is less by this: the same byte with the
top bit inverted, so that every flip means the same."""


def zero_point(weight: IntQuantTensor) -> Tensor | int:
    """The int8 code of a weight of 0."""
    return 0 if weight.signed else weight.zero_point - UNSIGNED


def codes(layer: nn.Module) -> Tensor:
    """The int8 codes of a layer's weights, in the shape of the weight: what a device computes with.

    4-bit weights too have one code per byte. A file stores what `layer.encoding` makes of them.
    """
    weight = cast(IntQuantTensor, cast(Any, layer).quant_weight())
    found = cast(Tensor, weight.int()).to(torch.int16)
    return (found if weight.signed else found - UNSIGNED).to(torch.int8)
