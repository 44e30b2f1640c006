"""Writes the steps of a network, each value behind the one quantizer that its readers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from resq_deploy.nets.blocks import Boundary, Kind
from resq_deploy.nets.standard import Refused
from resq_deploy.nets.steps import INPUT, OUTPUT, Step, Value, step


@dataclass(frozen=True)
class Ref:
    """What a node has become: a step, and what is known of its values."""

    step: str
    quantized: bool
    kind: Kind
    """Of the quantizer that belongs behind it."""


class Writer:
    """Writes steps, with a quantizer wherever one is needed."""

    def __init__(self, names: set[str]) -> None:
        """`names` are those that the user's modules have."""
        self.steps: dict[str, Step] = {}
        self.weights: dict[str, Tensor] = {}
        """Of the modules that are not the user's, by name."""
        self.renamed: dict[str, str] = {}
        """What modules of the user's that have our names are called instead."""
        self.quantizers: dict[str, Ref] = {}
        self.taken = names | {INPUT, OUTPUT}

    def free(self, name: str) -> str:
        """`name`, or one like it that nothing in the network has."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def write(
        self, name: str, module: type[nn.Module], *reads: Ref, quantized: bool = False,
        of: Kind = "signed", **options: Any,
    ) -> Ref:  # fmt: skip
        """One more step, whose values are `of` a kind."""
        if name in self.steps:
            raise Refused("a layer with weights is called twice; give every call its own layer")
        self.steps[name] = step(name, module, [r.step for r in reads], **options)
        return Ref(name, quantized, of)

    def quantized(self, ref: Ref) -> Ref:
        """The value behind its quantizer, which all its readers share."""
        if ref.quantized:
            return ref
        if ref.step not in self.quantizers:
            name = self.free(f"{ref.step}_quant")
            self.quantizers[ref.step] = self.write(
                name, Boundary, ref, quantized=True, of=ref.kind, kind=ref.kind, plain=False
            )
        return self.quantizers[ref.step]

    def plain(self, ref: Ref) -> Ref:
        """The quantized value for modules that know no QuantTensor."""
        ref = self.quantized(ref)
        return replace(self.write(self.free(f"{ref.step}_value"), Value, ref), kind=ref.kind)

    def depthwise(self, name: str, ref: Ref, scale: Tensor, shift: Tensor | None) -> Ref:
        """scale * x + shift per channel, as a 1x1 convolution that runs in integers."""
        c = len(scale)
        self.weights[f"{name}.weight"] = scale.reshape(c, 1, 1, 1)
        if shift is not None:
            self.weights[f"{name}.bias"] = shift.clone()
        return self.write(
            name, nn.Conv2d, self.quantized(ref), in_channels=c, out_channels=c, kernel_size=1,
            groups=c, bias=shift is not None,
        )  # fmt: skip

    def name(self, theirs: str) -> str:
        """What a module, or tensor, of the user's is called: as they do, unless that is ours."""
        top, dot, rest = theirs.partition(".")
        if top in (INPUT, OUTPUT):
            if top not in self.renamed:
                self.renamed[top] = self.free(f"{top}_")
            top = self.renamed[top]
        return top + dot + rest
