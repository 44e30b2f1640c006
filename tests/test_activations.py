"""Flips between kernels: both engines agree, and the reload engine does what its definition says.

The oracle cuts the optimized graph itself, with onnx alone: the prefix up to the struck value runs,
numpy flips the bits, the suffix runs behind it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import models
from resq_deploy import runtime
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.inject import campaign, discovery, graph, inject, space
from resq_deploy.inject.discovery import Discovery, discover
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.memory import Change, Flips, Memory
from resq_deploy.inject.network import Network
from resq_deploy.inject.reload import Reload

DATA = models.data()
WITH = [name for name in models.ALL if name not in ("dynamic-matmul", "fused-matmul")]
ACTIVATIONS, BOTH = ("activation",), ("weight", "activation")
pytestmark = pytest.mark.filterwarnings("error")


def codes(name: str, rng: np.random.Generator, *shape: int) -> tuple[str, np.ndarray]:
    return name, rng.integers(-60, 60, shape).astype(np.int8)


def rows_of_tokens(dtype: str = "uint8", *, width: int = 5) -> bytes:
    """Integers from the input to the output: int8 or uint8 images (N, 6, 4), six rows for each.

    An 8-bit input, values with several rows of `width` an image, one that is read twice, and an
    8-bit output; in opset 13, which has no BitwiseXor.
    """
    rng = np.random.default_rng(8)
    kind = np.dtype(dtype)
    q = ["s", "z"]
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["flat"]),
        helper.make_node("QLinearMatMul", ["flat", *q, "m1", "sw", "zw", "s1", "z"], ["h"], "mm1"),
        helper.make_node("QLinearMatMul", ["h", "s1", "z", "m2", "sw", "zw", *q], ["g"], "mm2"),
        helper.make_node(
            "QLinearAdd", ["h", "s1", "z", "g", *q, "s1", "z"], ["a"], "sum", domain="com.microsoft"
        ),
        helper.make_node("Reshape", ["a", "images"], ["tokens"]),
        helper.make_node("QLinearMatMul", ["tokens", "s1", "z", "m3", "sw", "zw", *q], ["y"]),
    ]
    middle = kind.type(128 if dtype == "uint8" else 0)
    tensors = dict(
        [
            ("s", np.float32(0.02)),
            ("s1", np.float32(0.03)),
            ("z", middle),
            ("sw", np.float32(0.01)),
            ("zw", np.int8(0)),
            ("rows", np.array([-1, 4])),
            ("images", np.array([-1, 6 * width])),
            codes("m1", rng, 4, width),
            codes("m2", rng, width, width),
            codes("m3", rng, 6 * width, models.N_CLASSES),
        ]
    )
    code = TensorProto.UINT8 if dtype == "uint8" else TensorProto.INT8
    made = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("x", code, ["N", 6, 4])],
        [helper.make_tensor_value_info("y", code, ["N", models.N_CLASSES])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def tokens(n: int = 23, dtype: str = "uint8") -> np.ndarray:
    raw = np.random.default_rng(9).integers(0, 256, (n, 6, 4)).astype(np.uint8)
    return raw.view(dtype)


FILES: dict[str, tuple[Any, np.ndarray]] = {
    **{name: (lambda name=name: models.quantized(name), DATA.x) for name in WITH},
    "tokens-uint8": (lambda: rows_of_tokens(), tokens()),
    "tokens-int8": (lambda: rows_of_tokens("int8"), tokens(dtype="int8")),
    # some vectors of the kernels are half full
    **{f"tokens-{w}": (lambda w=w: rows_of_tokens(width=w), tokens()) for w in (17, 24, 49, 80)},
}


class Engines:
    """Both engines for the images of one file."""

    def __init__(self, name: str, targets: Sequence[str]) -> None:
        make, self.x = FILES[name]
        self.raw = make()
        self.found: Discovery = discover(runtime.parse_model(self.raw), targets)
        self.memory = Memory.of(self.found)
        self.reload = Reload(self.found.model, self.found.space, self.x)
        self.network = Network(self.found, self.x)
        assert runtime.saturates() or self.network.reloaded == {}, "only reload would be tested"
        self.fast = Fast(self.network, self.network.keep(self.x), self.x)
        self.golden = self.reload.run({})

    def check(self, flips: np.ndarray) -> np.ndarray:
        """The output under flips, from both engines."""
        change = self.memory.read(np.unique(flips))
        expected = self.reload.run(change)
        assert self.fast.run(change).tobytes() == expected.tobytes(), change
        return expected


@cache
def engines(name: str, targets: tuple[str, ...] = ACTIVATIONS) -> Engines:
    return Engines(name, targets)


# --------------------------------------------------------------------------- the space


def test_the_space_is_what_the_kernels_hand_to_each_other() -> None:
    """QuantizeLinear, Transpose, two convolutions, ... of the graph that onnxruntime runs."""
    found = engines("qdq-channel").found.space
    best = runtime.optimized(models.quantized("qdq-channel"))
    made = {name: node for node in best.graph.node for name in node.output}
    if not runtime.saturates():
        assert [(t.op_type, t.shape, t.dtype) for t in found.tensors] == [
            ("QuantizeLinear", (1, 1, 6, 6), "uint8"),
            ("Transpose", (1, 6, 6, 1), "uint8"),
            ("QLinearConv", (1, 6, 6, 4), "uint8"),
            ("QLinearConv", (1, 6, 6, 4), "uint8"),
            ("QLinearAdd", (1, 6, 6, 4), "uint8"),
            ("QLinearGlobalAveragePool", (1, 1, 1, 4), "uint8"),
            ("Transpose", (1, 4, 1, 1), "uint8"),
            ("QGemm", (1, 4), "uint8"),
        ]  # the Flatten between is the same memory
    for tensor in found.tensors:
        assert (tensor.target, tensor.absorbed, tensor.axis) == ("activation", False, None)
        assert made[tensor.name].op_type == tensor.op_type
        assert made[tensor.name].name == tensor.node


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_inputs_and_values_with_several_rows(dtype: str) -> None:
    tensors = engines(f"tokens-{dtype}").found.space.tensors
    shapes = {t.name: (t.shape, t.op_type, t.dtype) for t in tensors}
    assert shapes["x"] == ((1, 6, 4), "input", dtype)
    assert shapes["h"] == ((6, 5), "QLinearMatMul", dtype)
    assert shapes["y"] == ((1, 4), "QLinearMatMul", dtype)
    assert set(shapes) == {"x", "h", "g", "a", "y"}, "views are the memory of another value"


def test_activations_stand_behind_what_the_file_stores() -> None:
    alone = engines("qdq-channel").found.space
    weights = discover(onnx.load_model_from_string(models.quantized("qdq-channel"))).space
    both = engines("qdq-channel", BOTH).found.space
    assert both.tensors == weights.tensors + alone.tensors
    assert space.Space.from_json(both.to_json()) == both


def test_values_of_no_image_are_named() -> None:
    warnings = engines("dynamic").found.warnings
    assert any("2 8-bit values between kernels (first: x_zero_point)" in w for w in warnings)


# --------------------------------------------------------------------------- the definition


def part(
    model: onnx.ModelProto, outputs: list[str], given: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Some values of a graph in which others are given."""
    inputs = list(given)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    wanted, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output) and not set(node.output) <= set(inputs):
            wanted.update(set(node.input) - set(inputs))
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(nodes)]
    for node in copies:  # what is given is not made again beside something else
        node.output[:] = [f"{n}_again" if n in inputs else n for n in node.output]
    del probe.graph.node[:]
    probe.graph.node.extend(copies)
    feeds = {n: v for n, v in given.items() if any(n in node.input for node in copies)}
    del probe.graph.input[:]
    for name, value in feeds.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        probe.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if runtime.saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(outputs, feeds)


def oracle(raw: bytes, x: np.ndarray, change: Change, size: int) -> np.ndarray:
    """Prefix, numpy, suffix for every struck value in turn, `size` images at a time."""
    best = runtime.optimized(raw)
    source, output = best.graph.input[0].name, best.graph.output[0].name
    order = [source, *(name for node in best.graph.node for name in node.output)]
    outputs = []
    for start in range(0, len(x), size):
        feeds = {source: x[start : start + size]}
        for name in sorted(change, key=order.index):
            value = feeds[source] if name == source else part(best, [name], feeds)[0]
            flipped = np.ascontiguousarray(value).copy().view(np.uint8)
            each = flipped.reshape(len(feeds[source]), -1)
            for offset, mask in zip(*change[name], strict=True):
                for image in range(len(each)):
                    each[image, offset] = int(each[image, offset]) ^ int(mask)
            feeds[name] = flipped.view(value.dtype)
        outputs.append(feeds[output] if output in feeds else part(best, [output], feeds)[0])
    return np.concatenate(outputs)


ORACLE = ["qdq-channel", "qdq-tensor", "qdq-batch-5", "qoperator", "dynamic", "tokens-uint8"]


@pytest.mark.parametrize("n_values", [1, 3])
@pytest.mark.parametrize("name", ORACLE)
def test_reload_is_prefix_flip_suffix(name: str, n_values: int) -> None:
    both = engines(name)
    rng = np.random.default_rng(n_values)
    size = 5 if name == "qdq-batch-5" else 50
    x = both.x[: len(both.x) // size * size or len(both.x)]
    tensors = both.found.space.tensors
    different = 0
    for first in range(len(tensors)):
        hit = [(first + i) % len(tensors) for i in range(min(n_values, len(tensors)))]
        flips = [both.found.space.starts[t] + rng.integers(0, tensors[t].n_bits) for t in hit]
        change = both.memory.read(np.unique(flips))
        expected = oracle(both.raw, x, change, size)
        assert both.reload.run(change)[: len(x)].tobytes() == expected.tobytes(), change
        different += expected.tobytes() != both.golden[: len(x)].tobytes()
    assert different > len(tensors) // 2


def test_all_bits_of_a_code_and_their_masks() -> None:
    both = engines("tokens-int8")
    start = both.found.space.starts[-2]  # the output itself: the answer is the value
    change = both.memory.read(np.array([start, start + 3, start + 7, start + 9]))
    assert isinstance(change["y"], Flips)
    assert change["y"].offsets.tolist() == [0, 1] and change["y"].masks.tolist() == [0x89, 2]
    output = both.reload.run(change)
    assert output.dtype == np.int8
    flipped = both.golden.view(np.uint8) ^ np.array([0x89, 2, 0, 0], np.uint8)
    assert np.array_equal(output.view(np.uint8), flipped)


def test_the_model_is_as_before() -> None:
    both = Engines("qdq-tensor", BOTH)
    before = both.found.model.SerializeToString()
    flips = np.array([3, both.found.space.n_bits - 1])
    assert both.reload.run(both.memory.read(flips)).tobytes() != both.golden.tobytes()
    assert both.found.model.SerializeToString() == before
    assert both.reload.run({}).tobytes() == both.golden.tobytes()


@pytest.mark.parametrize("name", ["qdq-channel", "qdq-tensor"])
def test_kernels_of_cpus_that_saturate(name: str) -> None:
    found = discover(onnx.load_model_from_string(models.quantized(name)), BOTH)
    network = Network(found, DATA.x, precise=True)
    assert "VNNI" in network.why and set(network.reloaded) == {t.name for t in found.space.tensors}
    change = Memory.of(found).read(np.array([5, found.space.n_bits - 300]))
    answer = Fast(network, network.keep(DATA.x), DATA.x).run(change)
    direct = Reload(found.model, found.space, DATA.x, precise=True).run(change)
    assert answer.tobytes() == direct.tobytes()


# --------------------------------------------------------------------------- fast equals reload


@pytest.mark.parametrize("targets", [ACTIVATIONS, BOTH], ids="+".join)
@pytest.mark.parametrize("name", FILES)
def test_every_value_alone(name: str, targets: tuple[str, ...]) -> None:
    both = engines(name, targets)
    rng = np.random.default_rng(1)
    different = 0
    for start, tensor in zip(both.found.space.starts, both.found.space.tensors, strict=False):
        flips = start + rng.integers(0, tensor.size) * 8 + rng.choice([0, 6, 7])
        different += both.check(np.array([flips])).tobytes() != both.golden.tobytes()
    assert different


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    st.sampled_from(list(FILES)),
    st.booleans(),
    st.sampled_from([1, 1, 2, 5, 30, 400]),
    st.integers(0, 2**32 - 1),
)
def test_any_sites(name: str, weights: bool, n: int, seed: int) -> None:
    both = engines(name, BOTH if weights else ACTIVATIONS)
    both.check(np.random.default_rng(seed).integers(0, both.found.space.n_bits, n))


@pytest.mark.parametrize("name", ["qdq-channel", "qdq-batch-5", "dynamic", "tokens-int8"])
@pytest.mark.parametrize("many", [0, 10**9], ids=["whole", "units"])
def test_both_ways_of_fast(name: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from resq_deploy.inject import fast

    monkeypatch.setattr(fast, "MANY", many)
    monkeypatch.setattr(fast, "WHOLE", -1.0)
    both = engines(name, BOTH)
    rng = np.random.default_rng(2)
    for n in (1, 3, 60):
        both.check(rng.integers(0, both.found.space.n_bits, n))
    both.check(np.array([both.found.space.n_bits - 1]))  # behind which little or nothing runs


def test_what_runs_behind_a_value() -> None:
    if runtime.saturates():
        pytest.skip("everything is reloaded on this CPU")
    network = engines("tokens-uint8").network
    assert network.share_behind(["x"]) == pytest.approx(1.0)
    assert 0 < network.share_behind(["a"]) < network.share_behind(["h"]) < 1
    assert network.share_behind(["y"]) == 0


def test_memory_for_values_in_front_of_all_weights_is_counted() -> None:
    if runtime.saturates():
        pytest.skip("everything is reloaded on this CPU")
    weights = discover(onnx.load_model_from_string(models.quantized("qdq-channel")))
    network = Network(weights, DATA.x)
    more = engines("qdq-channel").network
    assert "x_QuantizeLinear_Output" in more.kept_values
    assert "x_QuantizeLinear_Output" not in network.kept_values
    assert more.bytes_per_image() > network.bytes_per_image()


def test_what_cannot_be_cut_is_reloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise InputError("it has a knot")

    found = engines("qdq-channel").found
    monkeypatch.setattr(graph, "cut", fail)
    network = Network(found, DATA.x)
    if not runtime.saturates():
        assert set(network.reloaded.values()) == {"it has a knot"}
    change = Memory.of(found).read(np.array([77]))
    answer = Fast(network, network.keep(DATA.x), DATA.x).run(change)
    assert answer.tobytes() == engines("qdq-channel").reload.run(change).tobytes()


# --------------------------------------------------------------------------- campaigns


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    return file


SAME = ("outcomes", "per_layer", "per_bit", "per_layer_bit", "sdc_rate", "n_bits", "fault_accuracy")


def test_a_campaign_of_any_engine_workers_and_chunks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = models.data(130)
    options: dict[str, Any] = {"targets": ACTIVATIONS, "trials": 24, "seed": 3}
    plain = inject(model, data, out=tmp_path / "a", **options)
    reloaded = inject(model, data, out=tmp_path / "b", engine="reload", **options)
    network = engines("qdq-channel").network
    monkeypatch.setattr(campaign, "held", lambda: 0)
    monkeypatch.setattr(campaign, "WORKER", -data.x.nbytes)
    memory = 60 * network.bytes_per_image(2)  # of 130 images
    chunked = inject(model, data, out=tmp_path / "c", workers=2, memory=memory, **options)
    for other in (reloaded, chunked):
        assert {key: other[key] for key in SAME} == {key: plain[key] for key in SAME}
    names = [tensor.name for tensor in engines("qdq-channel").found.space.tensors]
    assert plain["targets"] == ["activation"]
    struck = [row["tensor"] for row in plain["per_layer"]]
    assert struck == [name for name in names if name in struck] and len(struck) > 3
    assert plain["n_bits"] == engines("qdq-channel").found.space.n_bits
    assert plain["outcomes"]["masked"] < 24
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    "options",
    [
        {"fault": "k:3", "trials": 5},
        {"fault": "byte", "trials": 5},
        {"fault": "adjacent:3", "trials": 5},
        {"fault": "burst:5", "trials": 5},
        {"rates": [1e-3, 0.1], "draws": 3},
        {"margin": 0.5, "per_layer": True},
    ],
    ids=lambda options: str(options.get("fault", next(iter(options)))),
)
def test_every_fault_that_flips(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    small = Dataset(name="noise", x=DATA.x[:7], y=DATA.y[:7])
    found = [
        inject(model, small, out=tmp_path / engine, engine=engine, targets=BOTH, **options)
        for engine in ("fast", "reload")
    ]
    assert {key: found[0][key] for key in SAME} == {key: found[1][key] for key in SAME}


@pytest.mark.parametrize("fault", ["stuck0", "stuck1", "0to1", "1to0"])
def test_faults_that_read_what_is_stored_are_refused(
    model: Path, tmp_path: Path, fault: str
) -> None:
    plan: dict[str, Any] = {"trials": 3} if "stuck" in fault else {"rates": [0.1]}
    with pytest.raises(InputError, match=f"--fault {fault} with --target activation"):
        inject(model, DATA, out=tmp_path / "s", fault=fault, targets=BOTH, **plan)
    assert not (tmp_path / "s").exists()


def test_the_memory_does_not_know_activations() -> None:
    with pytest.raises(InputError, match="depends on the image"):
        engines("qdq-channel").memory.bits(np.array([3]))


@pytest.mark.parametrize("protection", ["parity", "secded", "top:2"])
def test_protections_are_refused(model: Path, tmp_path: Path, protection: str) -> None:
    with pytest.raises(InputError, match=f"--protect {protection} with --target activation"):
        inject(
            model, DATA, out=tmp_path / "s", targets=BOTH, protection=protection, trials=1
        )  # fmt: skip


@pytest.mark.parametrize("target", ["scale", "zero-point"])
def test_targets_that_steer_the_optimizer_are_refused(target: str) -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    with pytest.raises(InputError, match=f"another {target} onnxruntime may run other kernels"):
        discover(model, ["activation", target])


@pytest.mark.parametrize("name", ["dynamic-matmul", "fused-matmul"])
def test_models_without_8_bit_values_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="no 8-bit values pass between"):
        discover(onnx.load_model_from_string(models.quantized(name)), ACTIVATIONS)


def test_open_sizes_are_refused() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(UnsupportedModel, match="sizes"):
        discover(model, ACTIVATIONS)


def test_a_graph_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = runtime.optimized(models.quantized("qdq-uint8"))
    monkeypatch.setattr(runtime, "optimized", lambda *args, **kwargs: other)
    with pytest.raises(UnsupportedModel, match="answers otherwise"):
        discover(onnx.load_model_from_string(models.quantized("qdq-channel")), ACTIVATIONS)


def test_inspect_shows_them() -> None:
    found = discovery.inspect(models.quantized("qoperator"), targets=["activation"])
    assert {tensor["target"] for tensor in found["tensors"]} == {"activation"}
    assert found["n_bits"] == 8 * found["n_bytes"]
    assert found["n_tensors"] == len(engines("qoperator").found.space.tensors)
