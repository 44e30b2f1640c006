"""Float files that bear faults: how weights are stored and read, how activations are bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import models
from resq_deploy import artifacts, bits, bounds, floats, metrics, nets, runtime
from resq_deploy.bounds import learned, search
from resq_deploy.cli import main
from resq_deploy.data.base import Dataset
from resq_deploy.encoding.saf import TAUS
from resq_deploy.errors import InputError
from resq_deploy.export.graph import quiet
from resq_deploy.inject import discovery, memory
from resq_deploy.inject.network import Network
from resq_deploy.inject.reload import Reload
from resq_deploy.nets import checkpoint

WEIGHTS = {"w1": "Conv", "w2": "Conv", "w3": "Gemm"}
FLOATS = [f"{kind}:{how}" for kind in ("float32", "float16") for how in floats.READINGS]
EVERY = [*FLOATS, "float32:scaled:4", "q2.5", "q2.5:scaled"]


def arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


class Stored:
    """The weights of the small residual network in one storage, struck as they are stored."""

    def __init__(self, name: str) -> None:
        self.original = arrays(models.float_resnet())
        self.model = models.float_resnet()
        floats.store_as(self.model, floats.parse(name))
        self.target = "weight" if name.startswith("q") else "float"
        self.found = discovery.discover(self.model, [self.target])
        self.memory = memory.Memory.of(self.found)
        self.readers = {}
        for weight, op in WEIGHTS.items():
            (node,) = (n for n in self.model.graph.node if n.op_type == op and weight in n.input[1])
            self.readers[weight] = None
            if node.input[1] != weight:
                part = runtime.constant_part(self.found.model, [weight], [node.input[1]])
                self.readers[weight] = runtime.build(part)

    def changes(self, rate: float, seed: int) -> dict[str, Any]:
        flips = bits.random_positions(self.memory.n_bits, rate, np.random.default_rng(seed))
        return self.memory.read(flips)

    def stored(self, change: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """What stands in the memory after faults."""
        found = {n: a.copy() for n, a in arrays(self.found.model).items() if n in WEIGHTS}
        for name, (offsets, values) in change.items():
            found[name].reshape(-1)[offsets] = values
        return found

    def read(self, stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What the network computes with."""
        return {
            name: values if reader is None else reader.run(None, {name: values})[0]
            for (name, values), reader in zip(stored.items(), self.readers.values(), strict=True)
        }


MADE: dict[str, Stored] = {}


def stored_as(name: str) -> Stored:
    return MADE.setdefault(name, Stored(name))


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_read_as_they_were_and_every_stored_bit_can_flip(name: str) -> None:
    made, width = stored_as(name), {"float32": 32, "float16": 16}.get(name.split(":")[0], 8)
    assert {t.name: t.op_type for t in made.found.space.tensors} == WEIGHTS
    assert made.memory.n_bits == width * (36 + 144 + 16)
    for weight, read in made.read(made.stored({})).items():
        # a step of float16 near 1 (tau is steep where it saturates), or half a step of 1/32
        error = {32: 1e-6, 16: 3e-3, 8: 1 / 64}[width] * max(1, np.abs(made.original[weight]).max())
        assert np.abs(read - made.original[weight]).max() <= error


@pytest.mark.parametrize("name", FLOATS)
def test_what_reads_float_weights_is_folded_when_the_file_is_loaded(name: str) -> None:
    plain = runtime.kernels(models.float_resnet().SerializeToString())
    assert runtime.kernels(stored_as(name).model.SerializeToString()) == plain


@given(st.sampled_from([n for n in FLOATS if n.split(":")[1] in floats.TAUS]),
       st.floats(1e-3, 0.3), st.integers(0, 999))  # fmt: skip
def test_no_flip_takes_a_saturated_weight_beyond_the_bound_of_its_tensor(
    name: str, rate: float, seed: int
) -> None:
    made = stored_as(name)
    stored = made.stored(made.changes(rate, seed))
    for weight, read in made.read(stored).items():
        bound = floats.ROOM * np.abs(made.original[weight]).max() * (1 + 1e-5)
        assert (np.isnan(stored[weight]) | (np.abs(read) <= bound)).all()


@pytest.mark.parametrize("name", [n for n in FLOATS if n.split(":")[1] in floats.TAUS])
def test_an_infinite_weight_is_read_as_the_bound_of_its_tensor(name: str) -> None:
    made = stored_as(name)
    stored = made.stored({})
    for values in stored.values():
        values.reshape(-1)[:2] = [np.inf, -np.inf]
    for weight, read in made.read(stored).items():
        bound = floats.ROOM * np.abs(made.original[weight]).max()
        np.testing.assert_allclose(read.reshape(-1)[:2], [bound, -bound], rtol=1e-5)


@given(st.sampled_from(["float32:scaled", "float16:scaled"]), st.floats(1e-3, 0.3),
       st.integers(0, 999))  # fmt: skip
def test_a_scaled_float_is_read_as_eight_times_the_greatest_at_most_unless_it_is_not_finite(
    name: str, rate: float, seed: int
) -> None:
    made = stored_as(name)
    stored = made.stored(made.changes(rate, seed))
    for weight, read in made.read(stored).items():
        bound = 8 * np.abs(made.original[weight]).max()
        assert (~np.isfinite(stored[weight]) | (np.abs(read) <= bound)).all()


@pytest.mark.parametrize("storage", ["float32:scaled", "float16:scaled", "float32:tanh"])
def test_tiny_weights_are_read_as_they_were(storage: str) -> None:
    """A factor of which float32 holds no reciprocal would make them 0."""
    tiny = models.float_resnet()
    for tensor in tiny.graph.initializer:
        if tensor.name == "w1":
            w = np.ldexp(numpy_helper.to_array(tensor), -30)
            tensor.CopyFrom(numpy_helper.from_array(w, "w1"))
    floats.store_as(tiny, floats.parse(storage))
    (name,) = {n.input[1] for n in tiny.graph.node if n.op_type == "Conv"} & {
        o for n in tiny.graph.node for o in n.output if o.startswith("w1.read")
    }
    (read,) = inner(tiny, [name], data().x)
    np.testing.assert_allclose(read, w, rtol=2e-3)


@given(st.integers(0, 7), st.integers(0, 999))
def test_scaling_shrinks_what_a_flip_does_to_a_fixed_point_weight(bit: int, seed: int) -> None:
    """The same bit of the same code moves a weight by 2^bit steps, and the steps are smaller."""
    moved = {}
    for name in ("q2.5", "q2.5:scaled"):
        made = stored_as(name)
        at = np.random.default_rng(seed).integers(0, 144)
        before = made.stored({})
        after = {**before, "w2": before["w2"].copy()}
        after["w2"].view(np.uint8).reshape(-1)[at] ^= np.uint8(1 << bit)
        moved[name] = np.abs(made.read(after)["w2"] - made.read(before)["w2"]).max()
    assert moved["q2.5"] == 2**bit / 32
    greatest = np.abs(stored_as("q2.5").original["w2"]).max()
    assert moved["q2.5:scaled"] <= 2**bit * 2 * greatest / 127


def test_the_engine_computes_with_what_is_read() -> None:
    """Against a file that holds what was read."""
    made = stored_as("float32:tanh")
    change = made.changes(0.01, 1)
    plain = models.float_resnet()
    for tensor in plain.graph.initializer:
        if tensor.name in WEIGHTS:
            read = made.read(made.stored(change))[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(read, tensor.name))
    x = models.data().x
    expected = runtime.run(runtime.session(plain.SerializeToString(), level="off"), x)
    engine = Reload(made.found.model, made.found.space, x)
    np.testing.assert_allclose(engine.run(change), expected, rtol=1e-4, atol=1e-5)
    faultless = runtime.run(runtime.session(made.found.model.SerializeToString()), x)
    assert not np.allclose(engine.run(change), faultless)
    assert "float weights" in Network(made.found, x).why


@pytest.mark.parametrize("tau", TAUS)
def test_functions_are_those_of_the_int8_encoding(tau: str) -> None:
    """Stored v is read as tau(v), up to the factor of the tensor."""
    assert set(floats.TAUS) == set(TAUS)
    kind, v = floats.TAUS[tau], np.linspace(-0.9, 0.9, 19)
    end = TAUS[tau](np.array(1e9))
    np.testing.assert_allclose(kind.inverse(TAUS[tau](v) / end * kind.bound) / kind.slope, v)


@pytest.mark.parametrize("how", ["transposed", "constant"])
def test_weights_that_are_not_read_directly_are_stored_too(how: str) -> None:
    """Every weight that `inject --target float` strikes: none is left as it was, silently."""
    model = models.float_resnet()
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    (w3,) = (t for t in model.graph.initializer if t.name == "w3")
    if how == "transposed":
        gemm.input[1] = "w3.t"
        gemm.attribute[0].i = 0
        before = helper.make_node("Transpose", ["w3"], ["w3.t"], perm=[1, 0])
    else:
        before = helper.make_node("Constant", [], ["w3"], value=w3)
        model.graph.initializer.remove(w3)
    model.graph.node.insert(0, before)
    x = models.data().x
    expected = runtime.run(runtime.session(model.SerializeToString()), x)
    floats.store_as(model, floats.parse("float32:tanh"))
    stored = arrays(model)["w3"]
    assert np.abs(stored - arrays(models.float_resnet())["w3"]).max() > 0.1
    found = runtime.run(runtime.session(model.SerializeToString()), x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def data() -> Dataset:
    return models.data(200)


def inner(model: onnx.ModelProto, names: list[str], x: NDArray[Any]) -> list[NDArray[Any]]:
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.session(probed.SerializeToString())
    return [np.asarray(v) for v in session.run(names, {session.get_inputs()[0].name: x})]


@settings(max_examples=20)
@given(st.sampled_from(bounds.BOUNDS), st.integers(0, 999))
def test_bounds_hold_under_faults_and_change_nothing_on_the_images_they_come_from(
    how: str, seed: int
) -> None:
    plain, bounded = models.float_resnet(), models.float_resnet()
    bounds.bound(bounded, how, data())
    relus, x = ["r1", "r2"], data().x
    for before, after in zip(inner(plain, relus, x), inner(bounded, relus, x), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)  # kernels differ
    limits = [arrays(bounded)[f"{name}.bound"] for name in relus]
    each = how in ("neuron", "learned")
    assert [limit.ndim for limit in limits] == ([3, 3] if each else [0, 0])
    rng = np.random.default_rng(seed)
    for tensor in bounded.graph.initializer:
        if tensor.name == "w1":
            w = numpy_helper.to_array(tensor).copy()
            w.reshape(-1)[rng.integers(0, w.size, 3)] = 1e6
            tensor.CopyFrom(numpy_helper.from_array(w, "w1"))
    free, kept = inner(bounded, ["r1.free", "r1"], x)
    assert (kept <= limits[0]).all()
    expected = (
        np.where(free <= limits[0], free, 0)
        if how in bounds.TO_ZERO
        else np.minimum(free, limits[0])
    )
    np.testing.assert_array_equal(kept, expected)
    assert (free > limits[0]).any()


@pytest.mark.parametrize("storage", ["float32", "q2.5"])
def test_searched_bounds_are_better_on_the_faults_of_the_search(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = dict.fromkeys(search.RATES, (3e-3, 1e-2))  # what hurts a network this small
    monkeypatch.setattr(search, "RATES", rates)
    source, x = tmp_path / "float.onnx", models.data(100).x
    source.write_bytes(models.float_resnet().SerializeToString())
    answers = runtime.run(runtime.session(source.read_bytes()), x)
    images = Dataset(name="own answers", x=x, y=metrics.top1(answers))
    files, found = {}, {}
    for how in ("zero", "searched"):
        files[how] = tmp_path / f"{how}.onnx"
        found[how] = floats.store(source, out=files[how], storage=storage, how=how, images=images)
    at_peak, lowered = (arrays(onnx.load(files[how])) for how in ("zero", "searched"))
    limits = [name for name in at_peak if name.endswith(".bound")]
    assert all(0 < lowered[name] <= at_peak[name] for name in limits)
    assert any(lowered[name] < at_peak[name] for name in limits)
    for name in at_peak.keys() - set(limits):
        np.testing.assert_array_equal(at_peak[name], lowered[name])
    said = found["searched"]["search"]
    assert said["area"] > said["area_before"]
    for how, area in (("zero", "area_before"), ("searched", "area")):
        again = search.search(onnx.load(files[how]), images, found[how]["target"])
        assert again["area_before"] == said[area]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of fresh weights; beside it what it computes, as float.onnx, and another
    checkpoint of the same network."""
    folder = tmp_path_factory.mktemp("twin")
    made = {"name": "resnet8", "n_classes": 10, "in_channels": 1, "width": 0.25}
    for seed, name in enumerate(("twin", "other")):
        net = nets.build(**made, seed=seed).eval()
        path = folder / f"{name}.safetensors"
        checkpoint.save(path, net, inputs={}, quantized=False, net=made)
    loaded, _ = checkpoint.load(folder / "twin.safetensors")
    with quiet():
        torch.onnx.export(
            loaded, (torch.zeros(1, 1, 32, 32),), str(folder / "float.onnx"), dynamo=False,
            input_names=["x"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    return folder / "twin.safetensors"


def own_answers(model: Path, n: int) -> Dataset:
    """Noise, labelled with what the model makes of it."""
    x = np.random.default_rng(0).random((n, 1, 32, 32)).astype(np.float32)
    answers = runtime.run(runtime.session(model.read_bytes()), x)
    return Dataset(name="own answers", x=x, y=metrics.top1(answers))


@pytest.mark.parametrize("lost", [1.0, -1.0])  # every accuracy will do; none will
def test_learned_bounds_lie_below_the_peaks_and_the_file_computes_with_them(
    lost: float, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "LOST", lost)
    source, out = twin.with_name("float.onnx"), tmp_path / "learned.onnx"
    images = own_answers(source, 256)
    at_peak = onnx.load(source)
    bounds.bound(at_peak, "learned", images)
    found = floats.store(
        source, out=out, storage="float32", how="learned", images=images, twin=twin
    )
    before, after = arrays(at_peak), arrays(onnx.load(out))
    assert before.keys() == after.keys()
    limits = [t.name for t in bounds.limits(at_peak)]
    assert len(limits) == 7
    for name in before.keys() - set(limits):
        np.testing.assert_array_equal(before[name], after[name])
    assert all((after[n] >= 0).all() and (after[n] <= before[n]).all() for n in limits)
    said = found["learned"]
    peaks, lowered = (np.concatenate([a[n].ravel() for n in limits]) for a in (before, after))
    alive = peaks > 0
    assert said["mean_ratio"] == pytest.approx((lowered[alive] / peaks[alive]).mean(), abs=0.02)
    assert said["epochs"] == (learned.EPOCHS if lost > 0 else 0)
    assert (said["mean_ratio"] < 0.99) == (lost > 0)
    kept_back = images.first(said["n_kept_back"])
    right = metrics.top1(runtime.run(runtime.session(out.read_bytes()), kept_back.x)) == kept_back.y
    assert said["accuracy"] == pytest.approx(right.mean(), abs=1.5 / len(kept_back))
    assert found["inputs"]["twin_sha256"] == artifacts.sha256(twin)
    first = out.read_bytes()
    floats.store(source, out=out, storage="float32", how="learned", images=images, twin=twin)
    assert out.read_bytes() == first


@given(st.floats(0, 1), st.floats(0.01, 100), st.floats(0, 2))
def test_the_smooth_bound_is_that_of_fitact(ratio: float, peak: float, relative: float) -> None:
    """x - x sigmoid(k (x - bound)) over the range of the neuron, beside the hard one."""
    net = learned._Bounded(torch.nn.ReLU(), [torch.tensor([peak])])
    with torch.no_grad():
        net.ratios[0].fill_(ratio)
    x = torch.tensor([[relative * peak]], dtype=torch.float32)
    outside = 1 / (1 + np.exp(-learned.STEEPNESS * (relative - ratio)))
    smooth, hard = (float(net.run(x, how)) for how in ("soft", "hard"))
    assert smooth == pytest.approx(float(x) * (1 - outside), rel=1e-3, abs=1e-5 * peak)
    if abs(relative - ratio) > 1e-4:
        assert hard == (float(x) if relative < ratio else 0)
    assert float(net.run(x, "free")) == float(x)


@pytest.mark.parametrize(
    ("how", "name", "message"),
    [
        ("learned", None, "--bound learned goes with --twin CHECKPOINT.*got --bound learned and -"),
        ("zero", "twin", "--bound learned goes with --twin CHECKPOINT.*got --bound zero and --twi"),
        ("learned", "other", "other.safetensors is not the twin of the model: what its ReLUs give"),
    ],
)
def test_bounds_are_learned_from_the_twin_of_the_model_only(
    how: str, name: str | None, message: str, twin: Path, tmp_path: Path
) -> None:
    source, given_twin = twin.with_name("float.onnx"), None
    if name is not None:
        given_twin = twin.with_name(f"{name}.safetensors")
    with pytest.raises(InputError, match=message):
        floats.store(
            source, out=tmp_path / "out.onnx", storage="float32", how=how,
            images=own_answers(source, 64), twin=given_twin,
        )  # fmt: skip
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("float64", r"format 'float64' is unknown; expected float32, float16, or qM.N with M \+ N"),
        ("q3.5", "format 'q3.5' is unknown"),
        ("float32:relu", "reading 'relu' is unknown for float32; expected one of plain, scaled, t"),
        ("float16:scaled:99", "reading 'scaled:99' is unknown for float16"),
        ("q2.5:tanh", "reading 'tanh' is unknown for q2.5; expected one of plain, scaled$"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        floats.parse(name)


def test_models_that_have_nothing_to_store_or_to_bound_are_refused() -> None:
    with pytest.raises(InputError, match="no float weights"):
        quantized = onnx.load_model_from_string(models.quantized("qdq-channel"))
        floats.store_as(quantized, floats.parse("float32:tanh"))
    with pytest.raises(InputError, match="no Relu"):
        smooth = models.float_resnet()
        for node in smooth.graph.node:
            node.op_type = node.op_type.replace("Relu", "Sigmoid")
        bounds.bound(smooth, "ranger", data())
    with pytest.raises(InputError, match="bound 'clip' is unknown; expected one of ranger, zero"):
        bounds.bound(models.float_resnet(), "clip", data())


def test_the_command_writes_a_file_that_campaigns_take(tmp_path: Path) -> None:
    source, out, pixels = (tmp_path / n for n in ("float.onnx", "stored.onnx", "pixels.npz"))
    source.write_bytes(models.float_resnet().SerializeToString())
    images = models.data(50, dtype=np.uint8)
    np.savez(pixels, x=images.x, y=images.y)
    arguments = ["store", str(source), "--as", "float16:arctan", "--out", str(out)]
    bounded = ["--bound", "neuron", "--data", str(pixels)]
    found = CliRunner().invoke(main, [*arguments, *bounded], catch_exceptions=False)
    assert found.exit_code == 0 and "faults: inject --target float" in found.output
    first = out.read_bytes()
    assert CliRunner().invoke(main, [*arguments, *bounded]).exit_code == 0
    assert out.read_bytes() == first
    campaign = ["inject", str(out), "--data", str(pixels), "--target", "float", "--trials", "5"]
    json_file = tmp_path / "found.json"
    result = CliRunner().invoke(
        main, [*campaign, "--out", str(tmp_path / "s.store"), "--json", str(json_file)]
    )
    assert result.exit_code == 0 and json.loads(json_file.read_text())["n_trials"] == 5
    refused = CliRunner().invoke(main, [*arguments, "--bound", "ranger"])
    assert refused.exit_code == 2 and "bounds of activations need images" in refused.output
