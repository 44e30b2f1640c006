"""The QONNX file as the front ends of other tools take it."""

from __future__ import annotations

import living
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.qonnx_to_qcdq import QuantToQCDQ
from torch import nn

from resq_deploy import evaluate
from resq_deploy.export.qdq import qdq
from resq_deploy.export.qonnx import qonnx

OPTIONS = {"opset": 19, "ir_version": 10}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return living.network("resnet8", 0.5)


@pytest.fixture(scope="module")
def model(net: nn.Module) -> onnx.ModelProto:
    return qonnx(net, (3, 32, 32), **OPTIONS)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """By qonnx's executor, on the file as it is: it asks for the shape of every tensor."""
    return execute_onnx(ModelWrapper(model), {"global_in": x.astype(np.float32) / 255})[
        "global_out"
    ]


def test_the_executor_takes_the_file_as_it_is(net: nn.Module, model: onnx.ModelProto) -> None:
    x = living.images(1)
    expected = evaluate.logits(net, x).numpy()
    # float32 sums in another order: the last bits
    assert np.abs(run(model, x) - expected).max() < 1e-5 < np.ptp(expected)


def test_quant_to_qcdq_takes_every_quantizer(model: onnx.ModelProto) -> None:
    """A Quant node of an int32 bias would be refused there, and by FINN's front end."""
    quantizers = [n for n in model.graph.node if n.op_type == "Quant"]
    assert len(quantizers) == 10 + 15  # weights, activations; no bias
    converted = ModelWrapper(model).transform(QuantToQCDQ())
    assert not [n for n in converted.graph.node if n.op_type == "Quant"]
    x = living.images(1)
    session = onnxruntime.InferenceSession(converted.model.SerializeToString())
    (found,) = session.run(None, {"global_in": x.astype(np.float32) / 255})
    assert np.abs(found - run(model, x)).max() < 1e-5


def test_biases_are_the_exact_values_of_the_integers(
    net: nn.Module, model: onnx.ModelProto
) -> None:
    def stored(made: onnx.ModelProto) -> dict[str, np.ndarray]:
        return {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}

    integers, floats = stored(qdq(net, (3, 32, 32), **OPTIONS)), stored(model)
    names = [n for n in integers if n.endswith(".bias")]
    exact = [(integers[n] * integers[f"{n}_scale"]).astype(np.float32) for n in names]
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(layers) == len(names) == 10
    for layer in layers:
        assert any(np.array_equal(floats[layer.input[2]], e) for e in exact), layer.name
