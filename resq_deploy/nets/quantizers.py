"""The quantizers of the networks, and the profiles that say which ones a network gets.

`float-channel`: scales are any numbers, those of weights one for each output channel. `po2-tensor`:
every scale is a power of two and holds for a whole tensor, so that integer hardware only shifts;
sums and results are then exact in float32, and every executor gives the same bits. `po2-channel`:
the same with one scale for each output channel of weights. Deep networks need it for parity: with
other scales executors round one code in a million otherwise, and fifty layers make steps of the
output of that.
`asymmetric-tensor`: the robust quantization of the RandBET papers (arXiv 2006.13977, 2104.08323):
the codes 0 ... 255 of a layer's weights span [min w, max w], rounded to the nearest, with one scale
and one zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from brevitas.core.function_wrapper import CeilSte
from brevitas.core.restrict_val import RestrictValueType
from brevitas.core.scaling import ScalingImplType
from brevitas.quant import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    ShiftedUint8WeightPerTensorFloat,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)
from torch import Tensor, nn

from resq_deploy.encoding import Encoding
from resq_deploy.errors import InputError
from resq_deploy.nets.blocks import Kind
from resq_deploy.nets.fused import FusedIntQuant


class Unit(Uint8ActPerTensorFloat):
    """uint8 values in [0, 1], scale fixed at 1/255: a device feeds camera bytes as they are."""

    int_quant = FusedIntQuant
    scaling_impl_type = ScalingImplType.CONST
    restrict_scaling_type = RestrictValueType.FP
    scaling_init = 1.0


class Probability(Unit):
    """uint8 values in [0, 1], scale fixed at 1/256, a power of two."""

    scaling_init = 255 / 256


class UpToSix(Unit):
    """uint8 values in [0, 6], scale fixed at 6/255: saturating is what ReLU6 does."""

    scaling_init = 6.0


class UpToSixShift(Unit):
    """uint8 values in [0, 6), scale fixed at 6/256 = 3/128: ReLU6, one step below six.

    Three times a power of two: products with it are exact in float32 as well.
    """

    scaling_init = 6 * 255 / 256


class Unsigned(Uint8ActPerTensorFloat):
    """uint8 activations. Statistics come from `calibrate`, not from the first 300 steps."""

    int_quant = FusedIntQuant
    collect_stats_steps = 1


class Signed(Int8ActPerTensorFloat):
    """int8 activations, symmetric."""

    int_quant = FusedIntQuant
    collect_stats_steps = 1


class UnsignedShift(Uint8ActPerTensorFixedPoint):
    """uint8 activations, the scale a power of two."""

    int_quant = FusedIntQuant
    collect_stats_steps = 1


class SignedShift(Int8ActPerTensorFixedPoint):
    """int8 activations, symmetric, the scale a power of two."""

    int_quant = FusedIntQuant
    collect_stats_steps = 1


class WeightShift(Int8WeightPerChannelFloat):
    """int8 weights, the scale of every output channel a power of two: that of 128 codes to the next
    power of two above the largest weight."""

    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl = CeilSte


class ToLevels(nn.Module):
    """Rounds real codes to the nearest level of an encoding, with straight-through gradient."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.levels = torch.from_numpy(encoding.levels.astype(np.float32))
        self.between = (self.levels[1:] + self.levels[:-1]) / 2

    def forward(self, x: Tensor) -> Tensor:
        at = torch.bucketize(x.detach().float().contiguous(), self.between.to(x.device))
        return x + (self.levels.to(x.device)[at].to(x.dtype) - x).detach()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Which quantizers a network gets."""

    weights: type
    """8-bit weights; fewer bits are made of it."""
    relu: type
    relu6: type | None
    """None where the scale that saturates at 6 does not exist."""
    kinds: dict[Kind, type]
    """By what a `Boundary` marks."""
    asymmetric: bool = False
    """Whether weights have a zero point."""


_SHIFTS: dict[Kind, type] = {
    # Pixels have the scale 1/256, one step off a camera's bytes from 128 on: b + (b >> 7) at most
    # 255 is the code of byte b.
    "unit": Probability, "probability": Probability, "unsigned": UnsignedShift,
    "signed": SignedShift,
}  # fmt: skip
PROFILES = {
    "float-channel": Profile(
        weights=Int8WeightPerChannelFloat, relu=Unsigned, relu6=UpToSix,
        kinds={"unit": Unit, "probability": Probability, "unsigned": Unsigned, "signed": Signed},
    ),
    "po2-tensor": Profile(
        weights=Int8WeightPerTensorFixedPoint, relu=UnsignedShift, relu6=None, kinds=_SHIFTS
    ),
    "po2-channel": Profile(
        weights=WeightShift, relu=UnsignedShift, relu6=UpToSixShift, kinds=_SHIFTS
    ),
    "asymmetric-tensor": Profile(
        weights=ShiftedUint8WeightPerTensorFloat, relu=Unsigned, relu6=UpToSix, asymmetric=True,
        kinds={"unit": Unit, "probability": Probability, "unsigned": Unsigned, "signed": Signed},
    ),
}  # fmt: skip


def profile(name: str) -> Profile:
    """The profile of that name; InputError for an unknown one."""
    if name not in PROFILES:
        raise InputError(f"profile {name!r} is unknown; expected one of {', '.join(PROFILES)}")
    return PROFILES[name]


def weight_quantizer(of: Profile, weight_bits: int, encoding: Encoding) -> type:
    """The quantizer whose codes are levels of `encoding`; InputError where there is none."""
    if weight_bits not in (8, 4):
        raise InputError(f"weight_bits must be 8 or 4, got {weight_bits}")
    if weight_bits == 4 and encoding.name != "plain":
        raise InputError(f"encoding {encoding.name} is for 8-bit weights; the network has 4")
    if of.asymmetric and (weight_bits, encoding.name) != (8, "plain"):
        raise InputError(
            "asymmetric-tensor is for 8-bit weights that are stored plain; the network has "
            f"{weight_bits} bits and encoding {encoding.name}"
        )
    bits = 7 if encoding.limit == 63 else weight_bits  # codes -63 ... 63, or -7 ... 7
    base = type(f"Weights{bits}", (of.weights,), {"bit_width": bits})
    if encoding.uniform:
        return base
    return type("WeightsOfLevels", (base,), {"float_to_int_impl": ToLevels(encoding)})
