"""The QONNX graph of a network, from which every file of an export is written.

Brevitas makes it, through torch's TorchScript exporter; docs/architecture.md says what keeps the
dynamo exporter from doing so.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from resq_deploy.encoding import Encoding
from resq_deploy.errors import ExportError
from resq_deploy.nets.quantized import UNSIGNED, value

INPUT, OUTPUT, BATCH_AXIS = "input", "logits", "N"
BIAS_BITS = 32
"""Of a Quant node behind a bias."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no prints of the exporters in here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def capture(net: nn.Module, shape: tuple[int, ...], *, opset: int) -> onnx.ModelProto:
    """The QONNX graph of a quantized network for images (C, H, W), batch dimension dynamic.

    Weights and biases are float initializers named like the parameters, each behind a Quant node
    (inputs: value, scale, zero point, bits); so are activations. ExportError when Brevitas or torch
    refuses.
    """
    from brevitas.export import export_qonnx

    example = torch.zeros(1, *shape)
    with torch.no_grad():
        n_classes = value(net.eval()(example)).shape[1]
    # A real file: given a buffer, Brevitas leaves out its passes that make initializers.
    with TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "model.onnx"
        axes = {INPUT: {0: BATCH_AXIS}, OUTPUT: {0: BATCH_AXIS}}
        try:
            export_qonnx(
                net, args=example, export_path=str(file), dynamo=False,
                input_names=[INPUT], output_names=[OUTPUT], keep_initializers_as_inputs=False,
                opset_version=opset, dynamic_axes=axes,
            )  # fmt: skip
        except RuntimeError as error:
            line = str(error).partition("\n")[0]
            raise ExportError(f"Brevitas cannot export this network: {line}") from error
        model = onnx.load(file)
    # Shape inference ends at Quant nodes, which torch does not know.
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = n_classes
    _unshare(model.graph)
    return model


def _unshare(graph: onnx.GraphProto) -> None:
    """Give every parameter an initializer of its own: a fault in one must not reach another.

    Equal ones are stored once by the exporter, the others are Identity nodes called as they are.
    """
    stored = {t.name: t for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Identity" and n.input[0] in stored]:
        own = graph.initializer.add()
        own.CopyFrom(stored[node.input[0]])
        own.name = node.output[0]
        stored[own.name] = own
        graph.node.remove(node)


def constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """The values of all initializers, by name."""
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The values of the attributes of a node, by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@dataclass(frozen=True, kw_only=True)
class Integers:
    """A weight or bias as a device stores it: real value = (codes - zero_point) * scale."""

    codes: NDArray[Any]
    """int8, or int32 for a bias; in the shape of the value."""
    scale: NDArray[np.float32]
    """(channels,) or ()."""
    zero_point: NDArray[Any]
    """In the type of the codes and the shape of the scale."""

    @property
    def values(self) -> NDArray[np.float32]:
        """What the network computes with: one rounding of the exact product to float32."""
        channels = (-1,) + (1,) * (self.codes.ndim - 1)
        scale, zero = (a.reshape(channels) if a.ndim else a for a in (self.scale, self.zero_point))
        steps = self.codes.astype(np.float64) - zero
        return np.asarray(steps * scale, np.float32)


def integers(
    quant: onnx.NodeProto, stored: Mapping[str, NDArray[Any]], encoding: Encoding
) -> Integers:
    """The codes behind a Quant node whose value is one of the constants `stored`.

    Divides in float32, rounds half to even and saturates as Brevitas does (the bias of a channel
    with next to no weights can be beyond int32); weights are rounded to the levels of `encoding`
    where these are not all integers.
    """
    from qonnx.custom_op.general.quant import max_int, min_int

    value, scale, zero, bits = (stored[name] for name in quant.input)
    facts = attributes(quant)
    signed, narrow, is_bias = bool(facts["signed"]), bool(facts["narrow"]), bits == BIAS_BITS
    low, high = min_int(signed, narrow, int(bits)), max_int(signed, narrow, int(bits))
    real = (value / scale + zero).astype(np.float64)
    if is_bias or encoding.uniform:
        codes = np.clip(np.rint(real), low, high)
    else:
        codes = encoding.nearest(real)
    dtype = np.int32 if is_bias else np.int8
    shift = 0 if signed else UNSIGNED
    shape = () if scale.size == 1 else (-1,)
    return Integers(
        codes=(codes - shift).astype(dtype),
        scale=scale.reshape(shape),
        zero_point=np.broadcast_to(zero - shift, scale.shape).astype(dtype).reshape(shape),
    )


def replace_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a tensor wherever a node reads it."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads."""
    used = {name for node in graph.node for name in node.input}
    unused = [t for t in graph.initializer if t.name not in used]
    for initializer in unused:
        graph.initializer.remove(initializer)


def finish(model: onnx.ModelProto, *, ir_version: int) -> onnx.ModelProto:
    """The metadata that must not vary; checked by onnx."""
    model.ir_version = ir_version
    model.producer_name, model.producer_version = "resq-deploy", ""
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.checker.check_model(model, full_check=False)
    return model
