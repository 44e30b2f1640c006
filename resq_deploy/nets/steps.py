"""A network written down as a list of steps: plain values, from which it is built again.

A network of the user's own is kept like this in its checkpoints, so that loading one never
executes code: a step names one of the modules of `MODULES`, with its options, and the steps that
it reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, fx, nn

from resq_deploy.errors import InputError
from resq_deploy.nets.blocks import Add, Boundary, UnitClip
from resq_deploy.nets.quantized import value

INPUT = "input"
"""Name of the first step, which reads the images."""
OUTPUT = "output"
"""Name of the last step, whose scale is the unit of parity."""
Step = dict[str, Any]
"""`name` (path of the module), `module` (key of MODULES), `options`, `reads` (names of steps)."""


class Value(nn.Identity):
    """The dequantized value, for modules that know nothing of QuantTensors."""

    def forward(self, x: Tensor) -> Tensor:
        return value(x)


class Dropout(nn.Dropout):
    """Dropout of a tensor that may be quantized, and then stays it: its scale is needed.

    `maps`: of whole channels.
    """

    def __init__(self, p: float, maps: bool = False) -> None:
        super().__init__(p)
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        dropped = (F.dropout2d if self.maps else F.dropout)(value(x), self.p)
        return x.set(value=dropped) if isinstance(x, QuantTensor) else dropped


class Concat(nn.Module):
    """Tensors one behind the other along axis `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat([value(part) for part in parts], dim=self.dim)


class Maps(nn.Module):
    """Vectors (N, C) as maps (N, C, 1, 1), which products spread over height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.channels, 1, 1)


class Multiply(nn.Module):
    """Product of two tensors, one of which may be (N, C, 1, 1)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return value(a) * value(b)


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                "groups", "bias")  # fmt: skip
_NORM = ("num_features", "eps", "momentum", "affine")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode")
MODULES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    cls.__name__: (cls, options)
    for cls, options in (
        (nn.Conv2d, _CONVOLUTION),
        (nn.Linear, ("in_features", "out_features", "bias")),
        (nn.BatchNorm1d, _NORM),
        (nn.BatchNorm2d, _NORM),
        (nn.ReLU, ()),
        (nn.ReLU6, ()),
        (nn.LeakyReLU, ("negative_slope",)),
        (nn.Sigmoid, ()),
        (nn.GELU, ()),
        (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
        (nn.MaxPool2d, (*_POOL, "dilation")),
        (nn.AvgPool2d, (*_POOL, "count_include_pad")),
        (nn.AdaptiveAvgPool2d, ("output_size",)),
        (nn.Flatten, ()),
        (Dropout, ("p", "maps")),
        (UnitClip, ()),
        (Boundary, ("kind", "plain")),
        (Add, ("skip_is_quantized", "main_is_quantized")),
        (Concat, ("dim",)),
        (Maps, ("channels",)),
        (Multiply, ()),
        (Value, ()),
    )
}
"""What a step may be: class and constructor options, by class name."""


def options_of(module: nn.Module) -> dict[str, Any]:
    """The constructor options of a module whose class stands in MODULES."""
    found = {}
    for option in MODULES[type(module).__name__][1]:
        given = getattr(module, option)
        found[option] = given is not None if option == "bias" else given
    return found


def step(name: str, module: type[nn.Module], reads: list[str], /, **options: Any) -> Step:
    """One step; its values survive JSON unchanged (tuples become lists)."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return {"name": name, "module": module.__name__, "options": plain, "reads": reads}


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module under a dotted name; what is on the way there is made."""
    *above, leaf = name.split(".")
    for part in above:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


def assemble(steps: list[Step]) -> fx.GraphModule:
    """The float network of the steps, with fresh weights; the last step is its output.

    Raises InputError for a list that `own.trace` cannot have written.
    """
    graph, nodes, root = fx.Graph(), dict[str, fx.Node](), nn.Module()
    images = graph.placeholder("images")
    try:
        for entry in steps:
            kind, allowed = MODULES[entry["module"]]
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["options"].items()}
            if not given.keys() <= set(allowed):
                raise KeyError(entry["name"])
            _place(root, entry["name"], kind(**given))
            reads = tuple(nodes[name] for name in entry["reads"]) or (images,)
            nodes[entry["name"]] = graph.call_module(entry["name"], reads)
        graph.output(nodes[OUTPUT])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"the steps of a traced network are broken: {error}") from None
    return fx.GraphModule(root, graph, "Traced")
