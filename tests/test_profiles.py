"""Profiles: with power-of-two scales every executor gives the same bits."""

from __future__ import annotations

import json
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
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.export import checks, export, output_step
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


def saved(folder: Path, profile: str) -> Path:
    """The checkpoint of a network that was calibrated in a profile."""
    net = living.network("resnet8", 0.5, profile=profile)
    path = folder / f"{profile}.safetensors"
    arguments = {"name": "resnet8", "n_classes": 10, "in_channels": 3, "width": 0.5}
    checkpoint.save(
        path, net, inputs={}, quantized=True, stage="baseline",
        net=arguments | {"profile": profile}, recipe={"seed": 1},
    )  # fmt: skip
    return path


@pytest.mark.parametrize("profile", ["po2-tensor", "float-channel"])
def test_a_converted_network_is_the_one_calibrated_in_that_profile(
    tmp_path: Path, profile: str
) -> None:
    paths = {p: saved(tmp_path, p) for p in ("float-channel", "po2-tensor")}
    (other,) = set(paths) - {profile}
    converted, facts = checkpoint.load(paths[other], profile=profile)
    as_it_was, _ = checkpoint.load(paths[other])
    calibrated, _ = checkpoint.load(paths[profile])
    assert facts["net"]["profile"] == profile
    for (name, a), b, c in zip(
        weight_layers(converted).items(), weight_layers(calibrated).values(),
        weight_layers(as_it_was).values(), strict=True,
    ):  # fmt: skip
        assert torch.equal(codes(a), codes(b)), name
        assert not torch.equal(codes(a), codes(c)), name
    for name, range_ in calibrated.state_dict().items():
        found = converted.state_dict()[name]
        assert torch.allclose(found, range_, rtol=1e-6, atol=0), name  # exp2(log2(range))
    x = images(16)
    apart = (evaluate.logits(converted, x) - evaluate.logits(calibrated, x)).abs().max()
    steps = round(float(apart) / output_step(calibrated))
    assert steps == 0 if profile == "po2-tensor" else steps <= 1


def test_export_converts_and_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path, "float-channel")
    data = Dataset(name="squares", x=images(8), y=np.arange(8))
    plain = export(path, out=tmp_path / "plain", images=data)
    before = plain.stat().st_mtime_ns
    export(path, out=plain.parent, images=data, profile="float-channel")
    assert plain.stat().st_mtime_ns == before  # nothing to convert: the same export
    made = json.loads((plain.parent / "manifest.json").read_text())
    assert made["profile"] == "float-channel" and made["inputs"]["profile"] is None
    export(path, out=tmp_path / "po2-tensor", images=data, profile="po2-tensor")
    made = json.loads((tmp_path / "po2-tensor" / "manifest.json").read_text())
    assert made["profile"] == made["inputs"]["profile"] == "po2-tensor"
    assert all(row["max_steps"] == 0 for row in made["parity"])
    card = (tmp_path / "po2-tensor" / "MODEL_CARD.md").read_text()
    assert "`po2-tensor`, converted at export: not trained with these scales" in card


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    arguments = {"name": "mobilenetv2", "n_classes": 10, "in_channels": 3, "width": 0.125}
    net = living.network("mobilenetv2", 0.125)
    checkpoint.save(path, net, inputs={}, quantized=True, net=arguments)
    with pytest.raises(InputError, match="ReLU6 saturates at 6, which no power of two does"):
        checkpoint.load(path, profile="po2-tensor")
    with pytest.raises(InputError, match="profile 'po2' is unknown"):
        checkpoint.load(path, profile="po2")


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
