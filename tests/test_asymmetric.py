"""The profile asymmetric-tensor: robust quantization, one scale and zero point for a layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import brevitas.nn as qnn
import living
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from resq_deploy import artifacts, evaluate, runtime
from resq_deploy.data.base import Dataset
from resq_deploy.encoding import Encoding
from resq_deploy.errors import InputError
from resq_deploy.export import export
from resq_deploy.inject import discovery, memory
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.network import Network
from resq_deploy.inject.reload import Reload
from resq_deploy.nets import build, checkpoint
from resq_deploy.nets.quantized import codes, quantize, weight_layers, zero_point
from resq_deploy.nets.quantizers import profile, weight_quantizer
from resq_deploy.perturb.weights import bit_errors, random_masks

PROFILE = "asymmetric-tensor"


@cache
def network() -> nn.Module:
    return living.network("resnet8", 0.5, profile=PROFILE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asymmetric")
    net = {"name": "resnet8", "n_classes": 10, "in_channels": 3, "width": 0.5, "profile": PROFILE}
    path = folder / "checkpoint.safetensors"
    checkpoint.save(
        path, network(), inputs={}, quantized=True, stage="baseline", net=net, recipe={"seed": 1}
    )
    images = Dataset(name="squares", x=living.images(50), y=np.arange(50) % 10)
    return export(path, out=folder / "out", images=images)


@settings(max_examples=20)
@given(st.floats(-2, 0), st.floats(0.01, 2), st.integers(0, 999))
def test_the_codes_of_a_layer_span_its_weights_rounded_to_the_nearest(
    low: float, high: float, seed: int
) -> None:
    """From min(w, 0) to max(w, 0): 0 is a code."""
    quantizer = weight_quantizer(profile(PROFILE), 8, Encoding())
    layer = qnn.QuantLinear(64, 10, bias=False, weight_quant=quantizer)
    w = torch.rand(10, 64, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    layer.weight.data.copy_(w)
    weight = layer.quant_weight()
    code, zero, scale = codes(layer).double(), zero_point(weight), weight.scale.double()
    assert code.min() <= -126 and code.max() >= 126
    assert torch.allclose((code - zero) * scale, weight.value.double(), atol=1e-6)
    span = float(w.max().clamp(min=0) - w.min().clamp(max=0))
    assert float(scale) == pytest.approx(span / 255, rel=1e-4)
    assert float((weight.value - w).abs().max()) <= 1.01 * float(scale)  # the zero point rounds
    assert -128 <= int(zero) <= 127


def test_the_file_stores_these_codes_and_every_kernel_is_an_integer_one(exported: Path) -> None:
    model = runtime.parse_model(exported.read_bytes())
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, layer in weight_layers(network()).items():
        np.testing.assert_array_equal(stored[f"{name}.weight"], codes(layer).numpy())
        zero = stored[f"{name}.weight_zero_point"]
        assert zero.dtype == np.int8 and zero == zero_point(layer.quant_weight())  # type: ignore[operator]
        assert stored[f"{name}.weight_scale"].size == 1
    assert any(stored[name].any() for name in stored if name.endswith("weight_zero_point"))
    made = artifacts.read_json(exported.parent / "manifest.json")
    assert made["kernels"]["QLinearConv"] == 9 and made["kernels"]["QGemm"] == 1
    assert made["profile"] == PROFILE
    assert "zero point" in made["tflite"]["reason"]


@settings(max_examples=8, deadline=None)
@given(st.floats(1e-4, 0.03), st.integers(0, 999))
def test_flips_in_the_twin_are_those_in_the_file(exported: Path, rate: float, seed: int) -> None:
    net, x = network(), living.images(16)
    masks = random_masks(net, rate, np.random.default_rng(seed))
    found = discovery.discover(runtime.parse_model(exported.read_bytes()))
    change = {}
    for name, mask in masks.items():
        layer = weight_layers(net)[name]
        before, stored = layer.quant_weight(), codes(layer)  # type: ignore[operator]
        with bit_errors(net, masks):
            moved = layer.quant_weight().value - before.value  # type: ignore[operator]
        steps = (stored ^ mask).double() - stored.double()
        assert torch.allclose(moved.double(), steps * before.scale, atol=1e-5)
        offsets = np.flatnonzero(mask.numpy().reshape(-1))
        change[f"{name}.weight"] = (offsets, (stored ^ mask).numpy().reshape(-1)[offsets])
    twin = evaluate.logits(net, x, masks=masks).numpy()
    file = Reload(found.model, found.space, x).run(change)
    step = float(net.get_submodule("output.act_quant").scale())  # type: ignore[operator]
    assert np.abs(np.rint((twin - file) / step)).max() <= 2
    assert (np.abs(np.rint((twin - file) / step)).max(axis=1) <= 1).mean() >= 0.9


def test_both_engines_agree(exported: Path) -> None:
    found = discovery.discover(runtime.parse_model(exported.read_bytes()))
    x = living.images(8)
    slow, whole = Reload(found.model, found.space, x), Network(found, x)
    fast = Fast(whole, whole.keep(x), x)
    struck = memory.Memory.of(found)
    rng = np.random.default_rng(0)
    for n in (1, 1, 1, 2, 50):
        flips = np.sort(rng.choice(struck.n_bits, n, replace=False))
        change = struck.read(flips)
        np.testing.assert_array_equal(slow.run(change), fast.run(change))


def test_what_has_no_asymmetric_form_is_refused() -> None:
    net = build("resnet8", n_classes=10, in_channels=3, seed=0)
    for options in ({"weight_bits": 4}, {"encoding": "parity:zero"}):
        with pytest.raises(InputError, match="asymmetric-tensor is for 8-bit weights that are sto"):
            quantize(net, profile=PROFILE, **options)
