"""From a float network of the user's own to one that `quantized.quantize` can take.

The network is traced (torch.fx) and brought to a standard form by Brevitas' graph passes. Then
the markers of `blocks` are placed as our own networks have them: every convolution, linear
layer, addition, product and concatenation reads quantized values. What has no integer form is
named by the path of its module, before anything is trained.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resq_deploy.errors import InputError
from resq_deploy.nets.blocks import Add, Boundary, Kind, UnitClip
from resq_deploy.nets.standard import Refused, is_tensor, path_of, shape_of, standard_form
from resq_deploy.nets.steps import (
    INPUT,
    MODULES,
    OUTPUT,
    Concat,
    Dropout,
    Maps,
    Multiply,
    Step,
    Value,
    assemble,
    options_of,
)
from resq_deploy.nets.writer import Ref, Writer

AFFINE = {
    operator.add: "add", torch.add: "add", operator.iadd: "add", "add": "add", "add_": "add",
    operator.sub: "sub", torch.sub: "sub", operator.isub: "sub", "sub": "sub", "sub_": "sub",
    operator.mul: "mul", torch.mul: "mul", operator.imul: "mul", "mul": "mul", "mul_": "mul",
    operator.truediv: "div", torch.div: "div", operator.itruediv: "div", "div": "div",
    "div_": "div",
}  # fmt: skip
RESHAPES = ("view", "reshape", "flatten", "squeeze", torch.flatten, torch.reshape, torch.squeeze)
PASSED = ("contiguous", "clone", "float")
SOFTMAXES = (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax")
NORMS = (nn.GroupNorm, nn.InstanceNorm2d, nn.LocalResponseNorm)


class _Converter(Writer):
    """Goes through the graph once and writes what each node becomes."""

    def __init__(self, graph: Any, normalize: tuple[Tensor, Tensor] | None) -> None:
        super().__init__({n for n, _ in graph.named_modules()})
        self.graph, self.normalize = graph, normalize
        self.refs: dict[fx.Node, Ref] = {}

    # ------------------------------------------------------------------ modules

    def module(self, node: fx.Node) -> Ref:
        target = str(node.target)
        x = self.ref(node.all_input_nodes[0])
        return self.convert(self.name(target), self.graph.get_submodule(target), x, node)

    def convert(self, name: str, module: nn.Module, x: Ref, node: fx.Node) -> Ref:
        kind = type(module)
        if kind is nn.Identity:
            return x
        if kind in (nn.Dropout, nn.Dropout2d):
            maps = kind is nn.Dropout2d
            return self.write(
                name, Dropout, x, quantized=x.quantized, of=x.kind, p=module.p, maps=maps
            )
        if kind in (nn.ReLU, nn.ReLU6):
            return self.write(name, kind, x, quantized=True, of="unsigned")
        if kind is nn.SiLU:
            x = self.quantized(x)
            gate = self.write(self.free(f"{name}_sigmoid"), nn.Sigmoid, self.plain(x), of="unit")
            return self.write(name, Multiply, x, self.quantized(gate))
        if kind is nn.Hardsigmoid:
            return self.hard_sigmoid(name, x, node)
        if kind is nn.Hardswish:
            x = self.quantized(x)
            return self.write(name, Multiply, x, self.hard_sigmoid(f"{name}_gate", x, node))
        if isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                raise Refused("PReLU with a slope per channel; there is one with one slope")
            slope = module.weight.item()
            return self.write(name, nn.LeakyReLU, self.plain(x), negative_slope=slope)
        if kind is nn.LayerNorm:
            return self.write(name, kind, self.plain(x), **options_of(module))
        if kind is nn.GELU:
            return self.gelu(name, module, x)
        if kind in (nn.LeakyReLU, nn.Sigmoid):
            after: Kind = "unit" if kind is nn.Sigmoid else "signed"
            return self.write(name, kind, self.plain(x), of=after, **options_of(module))
        if kind in (nn.Conv2d, nn.Linear):
            return self.layer(name, module, x)
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            return self.norm(name, cast(nn.BatchNorm2d, module), x, node)
        if kind is nn.MaxPool2d:
            if module.return_indices:
                raise Refused("indices of max pooling cannot be returned")
            x = self.quantized(x)
            return self.write(name, kind, x, quantized=True, of=x.kind, **options_of(module))
        if kind is nn.AvgPool2d:
            if module.divisor_override is not None:
                raise Refused("average pooling with another divisor than its window")
            return self.average(name, x, **options_of(module))
        if kind is nn.AdaptiveAvgPool2d:
            return self.adaptive(name, x, node)
        if kind is nn.Flatten:
            return self.flatten(node, x)
        if kind in (nn.Softmax, nn.LogSoftmax):
            return self.softmax(node, x)
        if isinstance(module, NORMS):
            raise Refused(f"{kind.__name__} divides by statistics of each image, which has no "
                           "integer kernel; train it with batch norm")  # fmt: skip
        known = ", ".join(n for n, (c, _) in MODULES.items() if c.__module__.startswith("torch."))
        raise Refused(f"{kind.__name__} has no quantized form; there is one of {known}")

    def layer(self, name: str, module: nn.Module, x: Ref) -> Ref:
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise Refused(f"padding_mode {module.padding_mode!r}; only 'zeros' is quantized")
        options = options_of(module)
        if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
            left_right_top_bottom = module._reversed_padding_repeated_twice
            if left_right_top_bottom[::2] != left_right_top_bottom[1::2]:
                raise Refused("padding that differs on two sides, by an even kernel")
            options["padding"] = left_right_top_bottom[::-2]
        return self.write(name, type(module), self.quantized(x), **options)

    def norm(self, name: str, module: nn.BatchNorm2d, x: Ref, node: fx.Node) -> Ref:
        if not module.track_running_stats:
            raise Refused("batch norm without running statistics cannot be folded")
        partner = "Conv2d" if isinstance(module, nn.BatchNorm2d) else "Linear"
        if self.steps[x.step]["module"] != partner:
            if partner == "Linear":
                raise Refused("BatchNorm1d does not follow a linear layer and cannot be folded")
            # As in networks that normalise before they convolve: a layer of its own takes it up.
            ones = torch.ones(module.num_features)
            x = self.depthwise(self.free(f"{name}_scale"), x, ones, None)
        return self.write(name, type(module), x, **options_of(module))

    def gelu(self, name: str, module: nn.Module, x: Ref) -> Ref:
        """In float; quantized, it has a quantizer of its own for what it reads."""
        if module.approximate != "none":
            raise Refused("GELU approximated by tanh; there is the exact one")
        if x.quantized or self.steps[x.step]["module"] not in ("Linear", "LayerNorm"):
            raise Refused("GELU directly behind a linear layer or LayerNorm only")
        return self.write(name, nn.GELU, x)

    def hard_sigmoid(self, name: str, x: Ref, node: fx.Node) -> Ref:
        """x / 6 + 1/2, clipped to [0, 1]: a 1x1 convolution, whose result saturates there."""
        shape = shape_of(node)
        if len(shape) != 4:
            raise Refused("of maps (N, C, H, W) only, it becomes a convolution")
        sixth = torch.full((shape[1],), 1 / 6)
        line = self.depthwise(self.free(f"{name}_line"), x, sixth, torch.full_like(sixth, 0.5))
        return self.write(name, UnitClip, line, quantized=True, of="unit")

    # ------------------------------------------------------------------ pooling and shapes

    def average(self, name: str, x: Ref, **options: Any) -> Ref:
        x = self.plain(x)
        return self.write(name, nn.AvgPool2d, x, of=x.kind, **options)

    def adaptive(self, name: str, x: Ref, node: fx.Node) -> Ref:
        """Adaptive average pooling, as a pooling with a fixed window."""
        old, new = shape_of(node.all_input_nodes[0])[2:], shape_of(node)[2:]
        if old == new:
            return x
        if new == (1, 1):
            x = self.quantized(x)
            return self.write(name, nn.AdaptiveAvgPool2d, x, of=x.kind, output_size=1)
        if old[0] % new[0] or old[1] % new[1]:
            raise Refused(f"average of {old[0]}x{old[1]} into {new[0]}x{new[1]}: not whole windows")
        window = (old[0] // new[0], old[1] // new[1])
        return self.average(name, x, kernel_size=window)

    def flatten(self, node: fx.Node, x: Ref) -> Ref:
        """Everything that makes (N, C, H, W) to (N, C * H * W), however it was written; and back
        to (N, C, 1, 1)."""
        old, new = shape_of(node.all_input_nodes[0]), shape_of(node)
        if old == new:
            return x
        if new == (*old, 1, 1):
            x = self.quantized(x)
            name = self.free(f"{x.step}_maps")
            return self.write(name, Maps, x, quantized=True, of=x.kind, channels=old[1])
        if new[0] != old[0] or any(size != 1 for size in new[2:]):
            raise Refused(f"shape {('N', *old[1:])} to {('N', *new[1:])}: only flattening is known")
        x = x if self.steps[x.step]["module"] == "AdaptiveAvgPool2d" else self.quantized(x)
        name = self.free(f"{x.step}_flat")
        return self.write(name, nn.Flatten, x, quantized=x.quantized, of=x.kind)

    def softmax(self, node: fx.Node, x: Ref) -> Ref:
        if [user.op for user in node.users] != ["output"]:
            raise Refused("softmax inside of a network")
        return x  # the file gives logits

    # ------------------------------------------------------------------ functions

    def function(self, node: fx.Node) -> Ref:
        target: Any = node.target
        tensors = [a for a in node.args if isinstance(a, fx.Node) and a in self.refs]
        if target in AFFINE and len(tensors) == 2:
            return self.binary(node, AFFINE[target], *(self.ref(t) for t in tensors))
        if target in AFFINE:
            return self.affine(node, AFFINE[target])
        if target is torch.cat:
            return self.concat(node)
        if target in RESHAPES:
            return self.flatten(node, self.ref(node.all_input_nodes[0]))
        if target in ("mean", torch.mean):
            return self.mean(node)
        if target in ("expand", "expand_as") and all(AFFINE.get(u.target) == "mul"
                                                     for u in node.users):  # fmt: skip
            return self.ref(node.all_input_nodes[0])  # products spread it themselves
        if target in SOFTMAXES:
            return self.softmax(node, self.ref(node.all_input_nodes[0]))
        raise Refused("it has no quantized form")

    def binary(self, node: fx.Node, kind: str, a: Ref, b: Ref) -> Ref:
        if kind not in ("add", "mul"):
            raise Refused("only sums and products of two tensors are quantized")
        if kind == "add" and len({shape_of(n) for n in node.all_input_nodes}) > 1:
            raise Refused("the two tensors of an addition have different shapes")
        a, b = self.quantized(a), self.quantized(b)
        signed: Kind = "signed" if "signed" in (a.kind, b.kind) else "unsigned"
        name = self.free(node.name)
        if kind == "mul":
            return self.write(name, Multiply, a, b, of=signed)
        flags = {"skip_is_quantized": True, "main_is_quantized": True}
        return self.write(name, Add, a, b, of=signed, **flags)

    def affine(self, node: fx.Node, kind: str) -> Ref:
        """Sums and products with constants, such as the normalization of pixels."""
        first, second = node.args[:2]
        flipped = not (isinstance(first, fx.Node) and first in self.refs)
        x, constant = (second, first) if flipped else (first, second)
        if (flipped and kind in ("sub", "div")) or not isinstance(x, fx.Node):
            raise Refused("a constant minus, or divided by, a tensor is not quantized")
        c = self.constant(constant, shape_of(x))
        one, zero = torch.ones_like(c), torch.zeros_like(c)
        scale, shift = {
            "add": (one, c), "sub": (one, -c), "mul": (c, zero), "div": (one / c, zero),
        }[kind]  # fmt: skip
        ref, name = self.ref(x), self.free(node.name)
        if f"{ref.step}.bias" in self.weights:
            # (x - mean) / std is one step
            last = self.steps.pop(ref.step)
            scale = scale * self.weights.pop(f"{ref.step}.weight").flatten()
            shift = shift + (one / c if kind == "div" else c if kind == "mul" else one) * (
                self.weights.pop(f"{ref.step}.bias")
            )
            ref = replace(ref, step=last["reads"][0], quantized=True)
        return self.depthwise(name, ref, scale, shift)

    def constant(self, given: Any, shape: tuple[int, ...]) -> Tensor:
        """A number, or a tensor with one value per channel, as (C,)."""
        if isinstance(given, fx.Node) and given.op == "get_attr":
            at = operator.attrgetter(str(given.target))(self.graph)
            given = at.detach()
        try:
            full = torch.as_tensor(given, dtype=torch.float32).expand(1, *shape[1:])
        except (TypeError, ValueError, RuntimeError):
            raise Refused("only constants with one value per channel are quantized") from None
        per_channel = full.reshape(shape[1], -1)
        if len(shape) != 4 or not bool((per_channel == per_channel[:, :1]).all()):
            raise Refused("only constants with one value per channel are quantized")
        return per_channel[:, 0].clone()

    def concat(self, node: fx.Node) -> Ref:
        parts = cast(Iterable[fx.Node], node.kwargs.get("tensors", node.args[0]))
        dim = int(cast(int, node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)))
        dim %= len(shape_of(node))
        if dim == 0:
            raise Refused("images cannot be concatenated")
        reads = [self.quantized(self.ref(part)) for part in parts]
        signed: Kind = "signed" if any(r.kind == "signed" for r in reads) else "unsigned"
        return self.write(self.free(node.name), Concat, *reads, of=signed, dim=dim)

    def mean(self, node: fx.Node) -> Ref:
        x = node.all_input_nodes[0]
        if len(shape_of(x)) != 4 or shape_of(node) not in (
            shape_of(x)[:2],
            (*shape_of(x)[:2], 1, 1),
        ):
            raise Refused("only the mean over height and width is quantized")
        source = self.quantized(self.ref(x))
        pooled = self.write(
            self.free(node.name), nn.AdaptiveAvgPool2d, source, of=source.kind, output_size=1
        )
        if len(shape_of(node)) == 4:
            return pooled
        return self.write(self.free(f"{node.name}_flat"), nn.Flatten, pooled, of=pooled.kind)

    # ------------------------------------------------------------------ the graph

    def ref(self, node: fx.Node) -> Ref:
        """What a node has become, for one of its readers."""
        if node not in self.refs:
            raise Refused(f"it reads {node.name!r}, which is not made from the images")
        readers = [u for u in node.users if u.op == "output" or is_tensor(u)]
        # A layer whose sums two readers quantize, each its way, would stay in float.
        return self.refs[node] if len(readers) < 2 else self.quantized(self.refs[node])

    def convert_node(self, node: fx.Node) -> Ref | None:
        if node.op == "placeholder":
            if self.refs:
                raise Refused("a network with one input, the images, expected")
            pixels = self.write(
                INPUT, Boundary, quantized=True, of="unit", kind="unit", plain=False
            )
            if self.normalize is None:
                return pixels
            mean, std = self.normalize
            return self.depthwise(self.free("normalize"), pixels, 1 / std, -mean / std)
        if node.op == "call_module":
            return self.module(node)
        if node.op == "get_attr":
            return None
        if node.meta.get("tensor_meta") is None:
            return None  # sizes, which reshapes read
        if node.target in PASSED:
            return self.ref(node.all_input_nodes[0])
        return self.function(node)

    def finish(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node) or len(shape_of(result)) != 2:
            raise Refused("one tensor of logits (N, n_classes) expected as output")
        ref = self.ref(result)
        self.write(OUTPUT, Boundary, ref, kind="signed", plain=True)

    def run(self) -> None:
        problems = []
        for node in self.graph.graph.nodes:
            try:
                if node.op == "output":
                    self.finish(node)
                    continue
                found = self.convert_node(node)
            except Refused as reason:
                problems.append(f"{path_of(node)}: {reason}")
                found = self.write(self.free(node.name), Value, quantized=True)  # to go on
            if found is not None:
                self.refs[node] = found
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise InputError(f"the network cannot be quantized: {'; '.join(problems[:3])}{more}")


def trace(
    net: nn.Module,
    shape: tuple[int, ...],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[list[Step], fx.GraphModule]:
    """The steps of a float network for images of shape (C, H, W), and the network itself.

    The network computes what `net` does (without a softmax at the end) of pixels in [0, 1], or of
    (pixels - mean) / std with `mean` and `std` per channel. It has the weights of `net`, under
    the same names. Raises InputError that names each module which cannot be quantized, and why.
    """
    normalize = None
    if mean is not None and std is not None:
        if not len(mean) == len(std) == shape[0]:
            raise InputError(
                f"model.mean and model.std have {len(mean)} and {len(std)} values; the images have "
                f"{shape[0]} channels"
            )
        normalize = (torch.tensor(mean), torch.tensor(std))
    training = net.training
    graph = standard_form(net.eval(), shape)
    net.train(training)
    writer = _Converter(graph, normalize)
    writer.run()
    steps = list(writer.steps.values())
    traced = assemble(steps)
    theirs = graph.state_dict()
    state = dict(traced.state_dict())
    own = {writer.name(theirs_name): theirs_name for theirs_name in theirs}
    for name in state:
        state[name] = writer.weights[name] if name in writer.weights else theirs[own[name]]
    traced.load_state_dict(state)
    return steps, traced
