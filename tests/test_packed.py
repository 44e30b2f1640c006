"""Packed 4-bit weights: half the bytes, the same network, and faults in the packed bits."""

from __future__ import annotations

from pathlib import Path

import living
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny import write_recipe
from torch import nn

from resq_deploy import artifacts, bits, memory_map, recipe, runtime
from resq_deploy.attack import bfa
from resq_deploy.attack.twin import strange_weight
from resq_deploy.data import Dataset
from resq_deploy.errors import ExportError, InputError
from resq_deploy.export import checks, export
from resq_deploy.export.packed import pack
from resq_deploy.export.qdq import qdq
from resq_deploy.inject import discovery, inject, results
from resq_deploy.inject.memory import Memory
from resq_deploy.nets import build, checkpoint, quantized
from resq_deploy.nets.quantized import quantize, weight_layers
from resq_deploy.perturb.weights import Masks, bit_errors, k_masks, random_masks, worst_masks
from resq_deploy.train import train

ROOT = Path(__file__).parents[1]
OPTIONS = {"opset": 19, "ir_version": 10}


def names(model: onnx.ModelProto) -> list[str]:
    return [t.name for t in model.graph.initializer if t.name.endswith(".weight")]


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {name: found[name].astype(np.int8) for name in names(model)}


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    """One code a byte."""
    return qdq(living.network("resnet8", 0.5, weight_bits=4), (3, 32, 32), **OPTIONS)


@pytest.fixture(scope="module")
def packed(plain: onnx.ModelProto) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    pack(model, names(model))
    return model


def logits(model: onnx.ModelProto, x: np.ndarray, level: str = "all") -> np.ndarray:
    session = runtime.session(model.SerializeToString(), level=level)
    return runtime.run(session, runtime.adapt(x, session))


def test_the_codes_are_packed_and_the_network_is_the_same(
    plain: onnx.ModelProto, packed: onnx.ModelProto
) -> None:
    stored = {t.name: t for t in packed.graph.initializer}
    for name, codes in weights(plain).items():
        assert stored[name].data_type == TensorProto.INT4
        assert len(stored[name].raw_data or stored[name].int32_data) > 0
        assert np.array_equal(weights(packed)[name], codes)
    assert packed.opset_import[0].version == 21 and plain.opset_import[0].version == 19
    x = living.images(4)
    for level in runtime.LEVELS:
        assert np.array_equal(logits(packed, x, level), logits(plain, x, level))
    checks.same_kernels(packed.SerializeToString(), runtime.kernels(plain.SerializeToString()))
    (reference,) = ReferenceEvaluator(packed).run(None, {"input": x[:1].astype(np.float32) / 255})
    assert np.abs(reference - logits(plain, x[:1])).max() < 1e-5


def test_the_memory_map_has_two_codes_a_byte(packed: onnx.ModelProto) -> None:
    mapped, image = memory_map.of(packed, name="m.onnx", sha256="0" * 64)
    found = {t.name: t for t in mapped.tensors if t.target == "weight"}
    assert set(found) == set(names(packed))
    for name, codes in weights(packed).items():
        entry = found[name]
        assert entry.dtype == "int4" and entry.bytes == -(-codes.size // 2)
        raw = np.frombuffer(image, np.uint8)[entry.address : entry.address + entry.bytes]
        assert np.array_equal(bits.unpack(raw, codes.size, "int4"), codes.reshape(-1))


def test_campaigns_hit_the_packed_bits(packed: onnx.ModelProto, tmp_path: Path) -> None:
    """4 bits a code, not 8; every flip makes another code, so not all are masked."""
    found = discovery.discover(packed).space
    assert found.n_bits == 4 * sum(codes.size for codes in weights(packed).values())
    model = tmp_path / "m.onnx"
    model.write_bytes(packed.SerializeToString())
    images = Dataset(name="squares", x=living.images(4), y=np.zeros(4, np.int64))
    for engine in ("fast", "reload"):
        inject(model, images, out=tmp_path / engine, trials=10, engine=engine)
    outcomes = [results([tmp_path / engine])["outcomes"] for engine in ("fast", "reload")]
    assert outcomes[0] == outcomes[1] and outcomes[0]["masked"] < 10


def test_wider_codes_are_refused_and_nothing_is_changed() -> None:
    model = qdq(living.network("resnet8", 0.5), (3, 32, 32), **OPTIONS)
    before = model.SerializeToString()
    with pytest.raises(ExportError, match=r"packed 4-bit weights hold -8 to 7: train with"):
        pack(model, names(model))
    assert model.SerializeToString() == before


def test_export_says_how_weights_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(
        path, living.network("resnet8", 0.5, weight_bits=4), inputs={}, quantized=True,
        stage="baseline", recipe=recipe.load(ROOT / "models/digits-resnet8.toml").portable(),
        net={"name": "resnet8", "n_classes": 10, "in_channels": 3, "width": 0.5, "weight_bits": 4},
    )  # fmt: skip
    images = Dataset(name="squares", x=living.images(10), y=np.zeros(10, np.int64))
    config = recipe.Export(parity_images=10, weights="int4")
    model = runtime.read_model(export(path, out=tmp_path / "out", images=images, config=config))
    manifest = artifacts.read_json(tmp_path / "out/manifest.json")
    assert manifest["weights"]["n_bytes"] == 19_608 // 2
    assert manifest["weights"]["storage"].startswith("two int4 codes per byte")
    assert manifest["opset"] == runtime.parse_model(model).opset_import[0].version == 21
    assert manifest["tflite"]["written"] is True  # there a code has a byte of its own


def test_attacks_know_the_twin_of_packed_weights_and_bit_search_refuses_them(
    packed: onnx.ModelProto,
) -> None:
    twin, raw = living.network("resnet8", 0.5, weight_bits=4), packed.SerializeToString()
    memory = Memory.of(discovery.discover(runtime.parse_model(raw)))
    assert strange_weight(memory, twin) is None
    assert strange_weight(memory, living.network("resnet8", 0.5)) == "conv1.weight"
    images = Dataset(name="noise", x=np.zeros((2, 3, 32, 32), np.uint8), y=np.arange(2))
    with pytest.raises(InputError, match="stores two 4-bit codes of conv1.weight in a byte"):
        bfa._File(raw, twin, images)


@pytest.fixture(scope="module")
def stored_packed() -> nn.Module:
    return living.network("resnet8", 0.5, weight_bits=4, packed=True)


def struck(net: nn.Module, masks: Masks) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the packed file would read under masks, and its bytes that flip, by layer."""
    found = {}
    for name, mask in masks.items():
        code = quantized.codes(weight_layers(net)[name]).numpy()
        flips = bits.pack(mask.numpy().reshape(-1))
        read = bits.unpack(bits.pack(code.reshape(-1)) ^ flips, code.size, "int4")
        found[name] = read.reshape(code.shape), flips
    return found


@pytest.mark.parametrize("method", ["random", "k", "worst"])
def test_training_flips_are_those_of_the_packed_file(stored_packed: nn.Module, method: str) -> None:
    net, rng = stored_packed, np.random.default_rng(0)
    layers = weight_layers(net)
    if method == "random":
        masks = random_masks(net, 0.05, rng)
    elif method == "k":
        masks = k_masks(net, 100, dict.fromkeys(layers, 0.1), rng)
    else:
        masks = worst_masks(net, 100, {n: torch.ones_like(m.weight) for n, m in layers.items()})
    found = struck(net, masks)
    with bit_errors(net, masks):
        for name, (read, _) in found.items():
            faulty = layers[name].quant_weight()
            scaled = torch.round(faulty.value / faulty.scale).detach().numpy()
            assert np.array_equal(scaled, read) and read.min() >= -8 and read.max() <= 7
    n_flips = sum(int(np.bitwise_count(flips).sum()) for _, flips in found.values())
    n_bits = 4 * sum(m.weight.numel() for m in layers.values())
    if method == "random":
        assert abs(n_flips - 0.05 * n_bits) < 5 * (n_bits * 0.05 * 0.95) ** 0.5
    else:
        assert n_flips == 100


def test_a_recipe_that_packs_trains_with_packed_faults(tmp_path: Path) -> None:
    packing = recipe.load(
        write_recipe(
            tmp_path,
            model={"weight_bits": 4},
            export={"weights": "int4"},
            float={"epochs": 0},
            baseline={"epochs": 0},
        )
    )
    twice = recipe.load(
        write_recipe(
            tmp_path / "int8", model={"weight_bits": 4}, float={"epochs": 0}, baseline={"epochs": 0}
        )
    )
    for loaded, width in ((packing, 4), (twice, 8)):
        out = tmp_path / str(width)
        start = train(loaded, "float", out=out / "float")
        net, facts = checkpoint.load(train(loaded, "baseline", out=out / "baseline", start=start))
        assert {layer.stored_bits for layer in weight_layers(net).values()} == {width}
        assert facts["net"].get("packed", False) == (width == 4)
    with pytest.raises(InputError, match="codes of 8 bits cannot be packed"):
        quantize(build("resnet8", n_classes=2, in_channels=1), packed=True)
