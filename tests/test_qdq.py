"""The writer of QDQ files against numpy, and what it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import living
import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from resq_deploy import evaluate, quantize, runtime
from resq_deploy.encoding import Encoding
from resq_deploy.errors import ExportError
from resq_deploy.export import output_step
from resq_deploy.export.graph import attributes, capture, constants, integers
from resq_deploy.export.qdq import to_qdq
from resq_deploy.export.qonnx import execute, to_qonnx
from resq_deploy.nets.quantized import weight_layers

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return living.network("resnet8", 0.5)


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> onnx.ModelProto:
    return capture(net, SHAPE, opset=19)


def written(graph: onnx.ModelProto, net: nn.Module) -> onnx.ModelProto:
    return to_qdq(graph, net, ir_version=10)


def scales_of_inputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The scale of what a layer reads, by the name of the layer."""
    stored = constants(model.graph)
    producer = {out: node for node in model.graph.node for out in node.output}
    return {
        producer[node.input[1]].input[0].removesuffix(".weight"):
            stored[producer[node.input[0]].input[1]]
        for node in model.graph.node if node.op_type in ("Conv", "Gemm")
    }  # fmt: skip


def test_codes_and_scales_are_those_that_numpy_computes_from_the_checkpoint(
    net: nn.Module, graph: onnx.ModelProto
) -> None:
    model = written(graph, net)
    stored, inputs = constants(model.graph), scales_of_inputs(model)
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    assert inputs.keys() == weight_layers(net).keys()
    for name, x_scale in inputs.items():
        w, b = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        scale = quantize.weight_scale(w)
        np.testing.assert_allclose(stored[f"{name}.weight_scale"], scale, rtol=1e-6)
        scale = stored[f"{name}.weight_scale"]
        codes = quantize.quantize(w, scale, axis=0)
        assert np.array_equal(stored[f"{name}.weight"], codes) and np.abs(codes).max() == 127
        steps = np.float32(x_scale) * scale
        np.testing.assert_allclose(stored[f"{name}.bias_scale"], steps, rtol=1e-6)
        steps = stored[f"{name}.bias_scale"]
        codes = quantize.quantize(b, steps, dtype=np.int32, axis=0)
        assert np.array_equal(stored[f"{name}.bias"], codes) and codes.any()


def test_activations_have_the_scales_of_the_network(net: nn.Module, graph: onnx.ModelProto) -> None:
    model = written(graph, net)
    stored = constants(model.graph)
    found = [
        (float(stored[node.input[1]]), int(stored[node.input[2]]))
        for node in model.graph.node if node.op_type == "QuantizeLinear"
    ]  # fmt: skip
    quantizers = [
        m for n, m in net.named_modules()
        if n.endswith("act_quant") and getattr(m, "is_quant_enabled", False)
    ]  # fmt: skip
    expected = [(float(q.scale()), 128 if q.is_signed else 0) for q in quantizers]  # type: ignore[operator]
    assert sorted(found) == sorted(expected) and len(found) == 15


def test_biases_of_both_files_are_rounded_once_and_alike() -> None:
    """Quotients in float64 round other ties: a bias of one file was a step off the other's."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=1_000_000).astype(np.float32)
    scale = rng.uniform(5e-5, 1e-4, b.size).astype(np.float32)
    tie = np.rint(b / scale) != np.rint(b.astype(np.float64) / scale)
    b, scale = b[tie], scale[tie]
    assert len(b) > 10
    node = helper.make_node("Quant", ["b", "s", "z", "n"], ["y"], signed=1, narrow=0)
    given = {"b": b, "s": scale, "z": np.float32(0), "n": np.float32(32)}
    found = integers(node, given, Encoding())
    torchs = torch.round(torch.from_numpy(b) / torch.from_numpy(scale)).numpy()
    assert found.codes.dtype == np.int32 and np.array_equal(found.codes, torchs)
    assert np.array_equal(found.codes, quantize.quantize(b, scale, dtype=np.int32, axis=0))
    assert np.array_equal(found.values, quantize.dequantize(found.codes, scale, axis=0))


def test_layers_with_equal_parameters_have_initializers_of_their_own(net: nn.Module) -> None:
    """The exporter stores them once; a fault in one must not reach the other."""
    net = copy.deepcopy(net)
    one, other = (weight_layers(net)[f"layer1.0.conv{i}"] for i in (1, 2))
    other.load_state_dict(one.state_dict())
    graph = capture(net, SHAPE, opset=19)
    stored = constants(written(graph, net).graph)
    names = {name.rpartition(".")[0] for name in stored if name.endswith(".weight")}
    assert names == weight_layers(net).keys()
    assert np.array_equal(stored["layer1.0.conv1.weight"], stored["layer1.0.conv2.weight"])
    quants = [n for n in to_qonnx(graph, net, ir_version=10).graph.node if n.op_type == "Quant"]
    values = constants(graph.graph)
    assert len({n.input[0] for n in quants}) == len(quants) and "layer1.0.conv2.bias" in values


def test_a_bias_beyond_int32_saturates_as_in_the_network(net: nn.Module) -> None:
    """In a channel with next to no weights; the QDQ file once had -2^31 for 2^31 - 1."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        layer = weight_layers(net)["layer2.0.conv1"]
        layer.weight[:2] *= 1e-12  # type: ignore[index,operator]
        layer.bias[:2] = torch.tensor([1.0, -1.0])  # type: ignore[index,operator]
    graph = capture(net, SHAPE, opset=19)
    model = written(graph, net)
    bias, ends = constants(model.graph)["layer2.0.conv1.bias"], np.iinfo(np.int32)
    assert bias[:2].tolist() == [ends.max, ends.min] and np.abs(bias[2:]).max() < 1e6
    x = living.images(8)
    session = runtime.session(model.SerializeToString())
    found = runtime.run(session, runtime.adapt(x, session))
    theirs = execute(to_qonnx(graph, net, ir_version=10), x.astype(np.float32) / 255)
    for other in (found, theirs):
        apart = np.abs(other - evaluate.logits(net, x).numpy()).max() / output_step(net)
        assert apart < 1.5


def _narrow(quant: onnx.NodeProto) -> None:
    next(a for a in quant.attribute if a.name == "narrow").i = 1


def _rounding(quant: onnx.NodeProto) -> None:
    next(a for a in quant.attribute if a.name == "rounding_mode").s = b"FLOOR"


@pytest.mark.parametrize("change", [_narrow, _rounding])
def test_activations_without_a_form_in_the_file_are_refused(
    net: nn.Module, graph: onnx.ModelProto, change: Callable[[onnx.NodeProto], None]
) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    change(next(n for n in changed.graph.node if n.name == "/relu/act_quant/export_handler/Quant"))
    with pytest.raises(ExportError, match="^quantizer '/relu/act_quant/.*' has no form in the fil"):
        written(changed, net)


def test_weights_of_another_network_are_refused(graph: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match=r"weights missing .* or not its own: \['layer1.1.conv1"):
        written(graph, living.network("resnet20", 0.5))


def test_a_zero_that_is_read_as_a_float_too_stays_one(
    net: nn.Module, graph: onnx.ModelProto
) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    first = changed.graph.node[0]
    assert first.op_type == "Quant" and attributes(first)["signed"] == 0
    added = helper.make_node("Add", [first.input[0], first.input[2]], ["same"], "Add")
    first.input[0] = "same"
    changed.graph.node.insert(0, added)
    x = living.images(4)
    logits = []
    for model in (graph, changed):
        session = runtime.session(written(model, net).SerializeToString())
        logits.append(runtime.run(session, runtime.adapt(x, session)))
    assert np.array_equal(logits[0], logits[1])
    assert len(np.unique(logits[0])) > 10


def test_every_initializer_is_read_and_has_a_name_of_its_own(
    net: nn.Module, graph: onnx.ModelProto
) -> None:
    model = written(graph, net)
    names = [t.name for t in model.graph.initializer]
    read = {name for node in model.graph.node for name in node.input}
    assert len(set(names)) == len(names) and set(names) <= read
    assert [entry.domain for entry in model.opset_import] == [""]
