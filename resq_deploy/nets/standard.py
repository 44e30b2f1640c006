"""The user's network as a graph in a standard form: traced by torch.fx, then Brevitas' passes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from brevitas.graph.standardize import RemoveStochasticModules, TorchFunctionalToModule
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from resq_deploy.errors import InputError

ACTIVATIONS = {
    torch.relu: nn.ReLU, torch.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.silu: nn.SiLU, F.gelu: nn.GELU, F.hardswish: nn.Hardswish, F.hardsigmoid: nn.Hardsigmoid,
    F.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
}  # fmt: skip
"""Functions and methods that Brevitas' TorchFunctionalToModule does not know."""


class Refused(Exception):
    """Why one node cannot be quantized."""


def _where(error: BaseException, net: nn.Module) -> str:
    """Path of the innermost module of `net` in the traceback of an error."""
    names = {id(m): n for n, m in net.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = names.get(id(frame.tb_frame.f_locals.get("self")), found)
        frame = frame.tb_next
    return found or type(net).__name__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _functions_to_modules(graph: Any) -> None:
    """Functions and methods with a counterpart in torch.nn become modules of their own."""
    for node in graph.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node.name in dict(graph.named_modules()):
            node._rename(f"{node.name}_fn")  # the module is called like the node
        if node.target in ACTIVATIONS:
            kept = {k: v for k, v in node.kwargs.items() if k == "approximate"}  # of GELU
            graph.add_submodule(node.name, ACTIVATIONS[node.target](**kept))
            node.op, node.target = "call_module", node.name
            node.args, node.kwargs = tuple(node.all_input_nodes), {}
    table = (*TorchFunctionalToModule.FN_TO_MODULE_MAP, (F.dropout2d, nn.Dropout2d))
    TorchFunctionalToModule(table).apply(graph)


def _own_copies(graph: Any) -> None:
    """A module without weights that is called twice becomes two: each call has its own scale."""
    seen, names = set(), {n for n, _ in graph.named_modules()}
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph.get_submodule(node.target)
        if node.target in seen and not list(module.parameters()) + list(module.buffers()):
            name = node.target
            while name in names:
                name += "_"
            names.add(name)
            graph.add_submodule(name, copy.deepcopy(module))
            node.target = name
        seen.add(node.target)


def standard_form(net: nn.Module, shape: tuple[int, ...]) -> Any:
    """A GraphModule that shares the weights of `net` (in eval mode), for images of shape (C, H, W).

    Nodes carry the shape of their value. InputError names the module that does not take such
    images, or that cannot be traced.
    """
    try:
        net(torch.zeros(2, *shape))
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"module {_where(error, net)!r} does not take images of shape {shape}: {_line(error)}"
        ) from None
    try:
        graph: Any = fx.GraphModule(net, fx.Tracer().trace(net))
    except Exception as error:  # the user's code may raise anything when it meets proxies
        raise InputError(
            f"module {_where(error, net)!r} cannot be traced (control flow that depends on values "
            f"has no graph): {_line(error)}"
        ) from None
    _functions_to_modules(graph)
    _own_copies(graph)
    graph = RemoveStochasticModules().apply(graph)
    graph.recompile()
    ShapeProp(graph).propagate(torch.zeros(2, *shape))
    return graph


def is_tensor(node: fx.Node) -> bool:
    """Whether the value of a node is one tensor."""
    return hasattr(node.meta.get("tensor_meta"), "shape")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the value of a node for two images; Refused when it is not one tensor."""
    if not is_tensor(node):
        raise Refused("one tensor expected")
    return tuple(node.meta["tensor_meta"].shape)


def path_of(node: fx.Node) -> str:
    """Where a node stands in the user's network, and what it calls."""
    if node.op == "call_module":
        return f"module {str(node.target)!r}"
    inside = [str(p).partition("@")[0] for p in node.meta.get("nn_module_stack", {}) if p]
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    return f"module {inside[-1]!r} calls {called}" if inside else f"the network calls {called}"
