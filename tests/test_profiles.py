"""Profiles: with power-of-two scales every executor gives the same bits."""

from __future__ import annotations

from pathlib import Path

import living
import numpy as np
import onnxruntime
import pytest
import torch
from living import images
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from resq_deploy import evaluate, recipe, runtime
from resq_deploy.errors import InputError
from resq_deploy.export import checks
from resq_deploy.export.qdq import qdq
from resq_deploy.export.qonnx import execute, qonnx
from resq_deploy.nets import build, checkpoint
from resq_deploy.nets.quantized import codes, encoding_of, quantize, weight_layers

OPTIONS = {"opset": 19, "ir_version": 10}


def network(name: str, width: float, **options: object) -> torch.nn.Module:
    return living.network(name, width, profile="po2-tensor", **options)


@pytest.fixture(scope="module", params=[("resnet8", 0.5), ("vgg16", 0.125)], ids=lambda p: p[0])
def net(request: pytest.FixtureRequest) -> torch.nn.Module:
    return network(*request.param)


def test_every_scale_is_one_power_of_two(net: torch.nn.Module) -> None:
    model = qdq(net, (3, 32, 32), **OPTIONS)
    checks.integer_kernels(model.SerializeToString())
    expected = {name: codes(layer).numpy() for name, layer in weight_layers(net).items()}
    checks.structure(model, expected, encoding_of(net))
    scales = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert len(scales) > 20
    for tensor in scales:
        scale = numpy_helper.to_array(tensor)
        assert scale.size == 1 and np.frexp(scale)[0] == 0.5, tensor.name


def test_all_executions_are_equal_to_the_last_bit(net: torch.nn.Module) -> None:
    """Not within a step: equal, ReferenceEvaluator (no kernels at all) on one image included."""
    x = images(16)
    expected = evaluate.logits(net, x).numpy()
    assert len(np.unique(expected)) > 20
    model = qdq(net, (3, 32, 32), **OPTIONS)
    pixels = x.astype(np.float32) / 255
    for level in onnxruntime.GraphOptimizationLevel.__members__.values():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        assert np.array_equal(session.run(None, {"input": pixels})[0], expected), level
    assert np.array_equal(execute(qonnx(net, (3, 32, 32), **OPTIONS), pixels), expected)
    (reference,) = ReferenceEvaluator(model).run(None, {"input": pixels[:1]})
    assert np.array_equal(reference, expected[:1])


def test_pixels_are_bytes_with_one_step_more_from_128_on() -> None:
    """What models/README.md tells the device's programmer to feed."""
    byte = np.arange(256)
    pixels = (byte.astype(np.uint8).astype(np.float32) / np.float32(255)) * np.float32(256)
    assert np.array_equal(np.clip(np.rint(pixels), 0, 255), np.minimum(byte + (byte >> 7), 255))


def test_a_checkpoint_keeps_its_profile(tmp_path: Path) -> None:
    net = network("resnet8", 0.5)
    arguments = {"name": "resnet8", "n_classes": 10, "in_channels": 3, "width": 0.5}
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, net, inputs={}, quantized=True, net=arguments | {"profile": "po2-tensor"})
    loaded, facts = checkpoint.load(path)
    x = images(4)
    assert torch.equal(evaluate.logits(loaded, x), evaluate.logits(net, x))
    assert facts["net"]["profile"] == "po2-tensor"


def test_four_bits_and_shifts_go_together() -> None:
    net = network("resnet8", 0.5, weight_bits=4)
    assert max(int(codes(layer).abs().max()) for layer in weight_layers(net).values()) == 7
    model = qdq(net, (3, 32, 32), **OPTIONS)
    session = runtime.session(model.SerializeToString())
    x = images(4)
    got = runtime.run(session, runtime.adapt(x, session))
    assert np.array_equal(got, evaluate.logits(net, x).numpy())


def test_what_a_profile_cannot_do_is_refused() -> None:
    net = build("mobilenetv2", n_classes=10, in_channels=3, width=0.125)
    with pytest.raises(InputError, match="ReLU6 saturates at 6, which no power of two does"):
        quantize(net, profile="po2-tensor")
    with pytest.raises(InputError, match="profile 'po2' is unknown; expected one of float-channel"):
        quantize(net, profile="po2")


@pytest.mark.parametrize("name", ["cifar10-resnet20", "digits-resnet8"])
def test_a_recipe_read_back_from_a_sidecar_is_valid(name: str) -> None:
    """It names every field, those left at their defaults too; `export` takes its options there."""
    raw = recipe.load(Path(__file__).parents[1] / f"models/{name}.toml").portable()
    raw["data"]["calibration"] = ""
    assert recipe.parse(raw).model.profile == "float-channel"
