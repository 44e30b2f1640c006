"""The fast engine equals the reload engine byte for byte, and its kernels equal plain integers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numba import njit
from onnx import TensorProto, helper, numpy_helper

import models
from resq_deploy import runtime, store
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError, Refused
from resq_deploy.inject import (
    campaign,
    evaluator,
    faults,
    inject,
    kernels,
    layers,
    observers,
    results,
    simd,
)
from resq_deploy.inject.discovery import Discovery, discover
from resq_deploy.inject.evaluator import Chunk, Evaluator
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.graph import Cut, Unit, Value
from resq_deploy.inject.memory import Change, Memory
from resq_deploy.inject.network import Network, Pace
from resq_deploy.inject.observers import Processes
from resq_deploy.inject.protect import PROTECTIONS
from resq_deploy.inject.reload import Reload
from resq_deploy.inject.shared import Shared
from resq_deploy.inject.space import TARGETS

# A few examples each, always the same; those that failed elsewhere are not looked up.
settings.register_profile(
    "exact", deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
EXACT = settings.get_profile("exact")
numbers = st.integers(0, 2**32 - 1)


class Patient(Pace):
    def slower(self, seconds: float) -> bool:
        return False


class Hurried(Pace):
    def slower(self, seconds: float) -> bool:
        return True


WAYS: dict[str, dict[str, Any]] = {
    "timed": {},
    "sums": {"FEW": 10**9, "MANY": 10**9, "Pace": Patient},
    "apart": {"FEW": 10**9, "MANY": 10**9, "Pace": Patient},
    "dense": {"FEW": 0, "MANY": 10**9, "Pace": Patient},
    "end": {"MANY": 10**9, "Pace": Hurried},
    "whole": {"MANY": 0, "WHOLE": -1.0},
}
"""What chooses the fast engine's way to a result: by measured times, always from the kept sums, the
same without copies by channel, always unit by unit, the rest in one as soon as possible, always the
whole network."""


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "held", lambda: 0)  # the networks here are smaller than numpy
    monkeypatch.setattr(campaign, "WORKER", -dataset().x.nbytes)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # of onnxruntime.quantization
    yield
    logging.disable(logging.NOTSET)


def answer(engine: Fast | Reload, change: Change) -> bytes:
    """The output under a change; b"refused" when onnxruntime refuses the file."""
    try:
        return engine.run(change).tobytes()
    except Refused:
        return b"refused"


class Both:
    """Both engines for the same images of one file."""

    def __init__(
        self, raw: bytes, x: np.ndarray, targets: tuple[str, ...] = ("weight",), *, cut: bool = True
    ) -> None:
        self.found: Discovery = discover(runtime.parse_model(raw), targets)
        self.x = x
        self.network = Network(self.found, x)
        if cut and not runtime.saturates():
            assert self.network.why == "", "nothing but reload would be tested"
        self.fast = Fast(self.network, self.network.keep(x), x)
        self.reload = Reload(self.found.model, self.found.space, x)
        self.seen: Counter[str] = Counter()

    def fast_answer(self, change: Change, way: str = "timed") -> bytes:
        """What the fast engine answers on one of WAYS."""
        limits = dict(self.network.limits)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in WAYS[way].items():
                module = "network" if name == "Pace" else "fast"
                patch.setattr(f"resq_deploy.inject.{module}.{name}", value)
            patch.setattr(self.network, "_paces", {})
            if way == "apart":
                kept = replace(self.fast._kept, inputs_by_channel={}, sums_by_channel={})
                patch.setattr(self.fast, "_kept", kept)
            if way in ("sums", "apart", "dense"):
                limit = 0 if way == "dense" else 10**9
                patch.setattr(self.network, "limits", dict.fromkeys(limits, limit))
            return answer(self.fast, change)

    def check(self, change: Change, *ways: str) -> bool:
        """Compare the engines under a change; does it change the output?"""
        expected = answer(self.reload, change)
        for way in ways or WAYS:
            assert self.fast_answer(change, way) == expected, (way, change)
        self.seen["refused"] += expected == b"refused"
        different = expected != answer(self.reload, {})
        self.seen["changed" if different else "same"] += 1
        return different

    def memory(self, protection: str = "none") -> Memory:
        return Memory.of(self.found, protection)

    def single(self, tensor: int, offset: int, bit: int) -> Change:
        """One flipped bit."""
        space = self.found.space
        flat = space.starts[tensor] + offset % space.tensors[tensor].size * 8 + bit
        return self.memory().read(np.array([flat]))


def stored(raw: bytes) -> tuple[str, ...]:
    """The targets that a file has."""
    present = []
    for target in TARGETS:
        try:
            discover(runtime.parse_model(raw), (target,))
            present.append(target)
        except InputError:
            pass
    return tuple(present)


RATES = (1e-3, 0.02, 0.3)


def patterns(memory: Memory, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Flips of every fault model there is; those with rates at several rates."""
    for row in faults.MODELS:
        for size in (2, 9) if ":" in row else (0,):
            fault = faults.parse(row.split(":")[0] + (f":{size}" if size else ""))
            rates: list[float | None] = list(RATES) if "--rates" in fault.plans else []
            if "--trials" in fault.plans:
                rates += [None]
            for rate in rates:
                cells = fault.sample(memory.space, seed=seed, draw=0, rate=rate)
                yield f"{fault.name} {rate}", fault.flips(cells, memory)


# ------------------------------------------------------------------ fast equals reload


def expected_layers(network: Network) -> set[int]:
    """Units that must be computed from kept sums."""
    assert network.cut is not None
    return {
        index
        for index, unit in enumerate(network.cut.units)
        if len(unit.nodes) == 1
        and unit.nodes[0].op_type in ("QLinearConv", "QGemm", "QLinearMatMul")
        and unit.nodes[0].input[3] in network.cut.initializers
    }


@settings(EXACT, max_examples=10)
@given(numbers)
def test_every_fault_on_random_graphs(number: int) -> None:
    spec, rng = graphs.spec(number), np.random.default_rng(number)
    raw = graphs.build(spec)
    # a change of scales is reloaded as a whole: not in most examples
    rest = stored(raw)[1:] if rng.random() < 0.3 else {"bias"} & set(stored(raw))
    targets = ["weight", *(t for t in rest if rng.integers(3))]
    both = Both(raw, graphs.images(int(rng.choice([1, 7, 53, 53]))), tuple(targets))
    protection = str(rng.choice(list(PROTECTIONS))).replace(":K", ":1")
    assert not both.check({})
    ways = [way for way in WAYS if way != "sums"]
    for i, (name, flips) in enumerate(patterns(both.memory(), number)):
        assert len(flips) == len(set(flips.tolist())), name
        both.check(both.memory().read(flips), "sums", ways[i % len(ways)])
    for name, flips in list(patterns(both.memory(protection), number + 1))[number % 3 :: 3]:
        assert len(flips) == len(set(flips.tolist())), name
        both.check(both.memory(protection).read(flips), "sums", "timed")
    assert both.seen["changed"] > 3


@settings(EXACT, max_examples=10)
@given(numbers)
def test_few_weights_on_random_graphs(number: int) -> None:
    """Changes that most campaigns make: few elements, of one layer or of several at once."""
    spec, rng = graphs.spec(number), np.random.default_rng(number)
    both = Both(graphs.build(spec), graphs.images(53))
    network, space = both.network, both.found.space
    if not runtime.saturates() and network.group is None:
        if spec.symmetric or not spec.per_channel:  # else zero points may differ too much
            assert set(network.layers) == expected_layers(network)
        assert set(network.reloaded) <= {t.name for t in space.tensors if t.op_type == "Mul"}
    for index in range(len(space.tensors)):
        both.check(both.single(index, int(rng.integers(10**6)), 7), "sums", "timed", "dense")
        both.check(both.single(index, int(rng.integers(10**6)), int(rng.integers(7))), "sums")
    for n in (2, 3, 6):  # layers whose input changes as well
        flips = np.concatenate(
            [space.starts[t] + rng.integers(0, space.tensors[t].n_bits, n)
             for t in rng.integers(0, len(space.tensors), 3)]
        )  # fmt: skip
        both.check(both.memory().read(np.unique(flips)))
    low = np.arange(0, space.n_bits, 8 * 7)  # changes that mostly end at the next rounding
    both.check(both.memory().read(low), "sums", "whole")


def check_holding(network: Network, x: np.ndarray, rng: np.random.Generator) -> int:
    """Flips that stay, thrice; returns how many further ones were run in place.

    The oracle is the file that stores what has flipped so far, opened anew.
    """
    in_place = 0
    for _ in range(3):
        memory = Memory.of(network.found)
        lasting = memory.read(np.unique(rng.integers(0, memory.n_bits, 5)))
        expected = Reload(network.found.model, network.found.space, x).run(lasting).tobytes()
        network = network.holding(lasting)
        fast = Fast(network, network.keep(x), x)
        fresh = discover(onnx.load_from_string(network.found.model.SerializeToString()))
        reload = Reload(fresh.model, fresh.space, x)
        assert answer(fast, {}) == answer(reload, {}) == expected
        memory = Memory.of(network.found)
        for n in (1, 1, 3, 40):
            change = memory.read(np.unique(rng.integers(0, memory.n_bits, n)))
            assert answer(fast, change) == answer(reload, change)
            in_place += network.in_place(change)
    return in_place


@settings(EXACT, max_examples=10)
@given(numbers)
def test_faults_behind_others_that_stay_on_random_graphs(number: int) -> None:
    spec, rng = graphs.spec(number), np.random.default_rng(number)
    x = graphs.images(13)
    network = Network(discover(runtime.parse_model(graphs.build(spec))), x)
    before = answer(Fast(network, network.keep(x), x), {})
    in_place = check_holding(network, x, rng)
    if not network.reloaded:
        assert in_place == 12
    assert answer(Fast(network, network.keep(x), x), {}) == before  # it has not changed itself


def every_kind() -> dict[str, graphs.Spec]:
    """Graphs in which every kernel has something to do."""
    blocks: dict[str, tuple[graphs.Block, ...]] = {
        "plain": (("conv", 5, 3, (1, 1), (1, 1, 1, 1), (1, 1), "one", "relu"), ("residual", 3)),
        "strided": (
            ("conv", 17, 3, (2, 1), (0, 1, 2, 0), (1, 2), "one", "relu"),
            ("conv", 16, 5, (1, 2), (2, 2, 2, 2), (1, 1), "one", "clip"),
        ),
        "groups": (
            ("conv", 10, 3, (1, 1), (1, 1, 1, 1), (1, 1), "grouped", "relu"),
            ("conv", 10, 3, (2, 2), (1, 0, 1, 0), (2, 1), "depthwise", "leaky"),
            ("conv", 10, 1, (1, 1), (0, 0, 0, 0), (1, 1), "grouped", "silu"),
        ),
        "wide": (
            ("conv", 130, 1, (1, 1), (0, 0, 0, 0), (1, 1), "one", "relu"),
            ("conv", 67, 3, (2, 2), (1, 1, 1, 1), (1, 1), "one", "relu"),
        ),
        "pools": (("max",), ("concat", 5), ("average",), ("double",)),
        "gates": (("gate",), ("scale",), ("excite",)),
    }
    heads = ["gemm", "matmul", "tokens", "attention", "rows", "gemm"]
    return {
        name: graphs.Spec(blocks=made, head=head)
        for (name, made), head in zip(blocks.items(), heads, strict=True)
    }


KINDS = every_kind()


@pytest.mark.skipif(runtime.saturates(), reason="this CPU cannot run the fast engine")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", ["u8s8", "u8u8"])
def test_layers_and_tables_are_found_and_exact(kind: str, signed: str) -> None:
    """What the engine would silently do the slow way is an error here."""
    spec = graphs.Spec(blocks=KINDS[kind].blocks, head=KINDS[kind].head, signed=signed)
    both = Both(graphs.build(spec), graphs.images(53))
    network = both.network
    assert network.group is None and network.reloaded == {}
    assert set(network.layers) == expected_layers(network)
    tables = {"plain": 1, "strided": 0, "groups": 1, "wide": 0, "pools": 1, "gates": 2}
    assert len(network.tables) >= tables[kind]
    rng = np.random.default_rng(1)
    for index in range(len(both.found.space.tensors)):
        for _ in range(4):
            offset = int(rng.integers(10**6))
            both.check(both.single(index, offset, 7), "sums", "timed")
            both.check(both.single(index, offset, 1), "sums")
    assert both.seen["changed"] > len(both.found.space.tensors)


@pytest.mark.parametrize("name", models.ALL)
def test_every_fault_on_the_tiny_models(name: str) -> None:
    raw = models.quantized(name)
    x = models.data(53, dtype=np.uint8 if name == "qdq-tensor" else np.float32).x
    both = Both(raw, x, stored(raw))
    for seed in range(2):
        for _, flips in patterns(both.memory(), seed):
            both.check(both.memory().read(flips), "sums", "timed")
    only = Both(raw, x, tuple(t for t in stored(raw) if t in ("weight", "bias")))
    for _, flips in patterns(only.memory(), 3):
        only.check(only.memory().read(flips))
    assert only.seen["changed"] > 5


def test_packed_int4_weights() -> None:
    """Layers that compute in float32: they may not repeat, and must still agree."""
    both = Both(models.quantized("qdq-int4"), models.data(53).x, cut=False)
    for _, flips in patterns(both.memory(), 0):
        both.check(both.memory().read(flips), "sums", "timed")


def test_a_bit_of_every_weight() -> None:
    """All taps of a convolution and all entries of a matrix, in one tiny network each."""
    for name in ("qdq-channel", "qoperator-matmul"):
        both = Both(models.quantized(name), models.data(11).x)
        bits = np.random.default_rng(0).integers(0, 8, both.found.space.n_bits // 8)
        for element, bit in enumerate(bits):
            both.check(both.memory().read(np.array([8 * element + bit])), "sums")
        assert both.seen["changed"] > 50


@pytest.mark.parametrize("n", [1, 2, 49, 50, 51, 103])
@pytest.mark.parametrize("name", ["qdq-channel", "qdq-batch-5", "dynamic"])
def test_any_number_of_images(name: str, n: int) -> None:
    both = Both(models.quantized(name), models.data(n).x)
    for index in range(3):
        both.check(both.single(index, 5, 6))


def test_the_rest_runs_in_one_where_going_on_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(models.quantized("qdq-channel"), models.data(53).x)
    if runtime.saturates():
        return
    network, ended = both.network, []
    inner = Fast._ended

    def spy(self: Fast, end: Unit, *rest: Any) -> Any:
        ended.append(end)
        return inner(self, end, *rest)

    monkeypatch.setattr(Fast, "_ended", spy)
    change = both.single(0, 3, 6)
    struck = network.last_struck(change)
    expected = next(end for index, end in network.ends.items() if index > struck)
    assert both.check(change, "end") and ended == [expected]
    for index, end in network.ends.items():
        assert end.outputs == [network.cut.output]
        assert len(end.nodes) > len(network.cut.units[index].nodes)
    monkeypatch.setattr(network, "_seconds", dict.fromkeys(network._seconds, 0.0))
    monkeypatch.setattr(network, "_paces", {})
    ended.clear()
    both.fast.run(change)
    assert not ended  # nothing is known yet
    both.fast.run(change)
    assert ended == [expected]


def test_what_is_not_known_is_tried_and_tried_again() -> None:
    pace, answers = Pace(), []
    for _ in range(20):
        answers.append(pace.slower(1.0))
        if not answers[-1]:
            pace.add(images=10, seconds=30.0)  # 3 seconds an image
    assert [i + 1 for i, slower in enumerate(answers) if not slower] == [1, 4, 16]
    assert not any(pace.slower(4.0) for _ in range(20))


def test_changed_names_all_images_that_change_once() -> None:
    both = Both(graphs.build(KINDS["plain"]), graphs.images(53))
    golden = both.reload.run({})
    some = 0
    for offset in range(20):
        change = both.single(0, offset, 3)
        images, rows = both.fast.changed(change)
        expected = both.reload.run(change)
        assert len(set(images.tolist())) == len(images) == len(rows)
        different = {i for i in range(53) if golden[i].tobytes() != expected[i].tobytes()}
        assert different <= set(images.tolist())
        assert rows.tobytes() == expected[images].tobytes()
        some += 0 < len(images) < 53
    if not runtime.saturates():
        assert some, "images that do not change should be left out"


# ------------------------------------------------------------------ graphs of other shapes


def graph(
    nodes: list, tensors: dict[str, Any], outputs: dict[str, tuple[int, list]],
    source: tuple[int, list] = (TensorProto.FLOAT, ["N", *graphs.SHAPE]),
) -> bytes:  # fmt: skip
    """A file written by hand."""
    made = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", *source)],
        [helper.make_tensor_value_info(name, *info) for name, info in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


class Qdq:
    """QDQ nodes and their tensors, written by hand."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, Any] = {"zero": np.uint8(100), "s_zero": np.int8(0)}

    def node(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def scale(self, value: float) -> str:
        name = f"s{len(self.tensors)}"
        self.tensors[name] = np.float32(value)
        return name

    def values(self, at: str, scale: float = 0.02, to: str = "") -> str:
        """Quantize and dequantize."""
        s = self.scale(scale)
        return self.node(
            "DequantizeLinear", self.node("QuantizeLinear", at, s, "zero"), s, "zero", to=to
        )

    def weight(self, name: str, *shape: int, scale: float = 0.01) -> str:
        self.tensors[name] = self.rng.integers(-127, 128, shape).astype(np.int8)
        return self.node("DequantizeLinear", name, self.scale(scale), "s_zero")

    def matrix(self, at: str, name: str, rows: int, columns: int) -> str:
        return self.values(self.node("MatMul", at, self.weight(name, rows, columns)))


FLAT = int(np.prod(graphs.SHAPE))
FLOATS = (TensorProto.FLOAT, ["N", 4])


def _second_output() -> bytes:
    """A second output with weights of its own, which no fault in the first one shows."""
    q = Qdq()
    flat = q.values(q.node("Flatten", "x"))
    hidden = q.matrix(flat, "m1", FLAT, 8)
    other = q.matrix(hidden, "aux", 8, 8)
    logits = q.matrix(hidden, "m2", 8, 4)
    q.node("Identity", logits, to="logits")
    q.node("Identity", other, to="other")
    outputs = {"logits": FLOATS, "other": (TensorProto.FLOAT, ["N", 8])}
    return graph(q.nodes, q.tensors, outputs)


def _shared_weight() -> bytes:
    """One square matrix read by two layers, the second time transposed; four others."""
    q = Qdq()
    at = q.values(q.node("Flatten", "x"))
    at = q.matrix(at, "m0", FLAT, 8)
    at = q.values(q.node("MatMul", at, q.weight("tied", 8, 8)))
    turned = q.node("Transpose", "tied", perm=[1, 0])
    turned = q.node("DequantizeLinear", turned, q.scale(0.01), "s_zero")
    at = q.values(q.node("MatMul", at, turned))
    for name in ("m1", "m2", "m3"):
        at = q.matrix(at, name, 8, 8)
    q.node("Identity", q.matrix(at, "m4", 8, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _same_weight_twice() -> bytes:
    """One matrix read by two layers as it is."""
    q = Qdq()
    at = q.matrix(q.values(q.node("Flatten", "x")), "m0", FLAT, 8)
    tied = q.weight("tied", 8, 8)
    for _ in range(2):
        at = q.values(q.node("MatMul", at, tied))
    q.node("Identity", q.matrix(at, "m4", 8, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _weight_first() -> bytes:
    """Weights on the left of a product, and three-dimensional ones."""
    q = Qdq()
    c, h, w = graphs.SHAPE
    q.tensors["to"] = np.array([0, c, h * w])
    at = q.values(q.node("Reshape", "x", "to"))
    at = q.values(q.node("MatMul", q.weight("left", 5, c), at))
    at = q.values(q.node("MatMul", at, q.weight("cube", 1, h * w, 6)))
    q.node("Identity", q.matrix(q.node("Flatten", at), "m", 30, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _tokens_first() -> bytes:
    """Rows (token, image) instead of (image, token): no image has rows of its own."""
    q = Qdq()
    c, h, w = graphs.SHAPE
    q.tensors |= {
        "to": np.array([0, c, h * w]), "rows": np.array([-1, c]), "back": np.array([h * w, -1, 5]),
        "axis": np.array([0]),
    }  # fmt: skip
    at = q.values(q.node("Reshape", "x", "to"))
    at = q.node("Transpose", at, perm=[2, 0, 1])
    at = q.matrix(q.node("Reshape", at, "rows"), "m0", c, 5)
    at = q.values(q.node("ReduceMean", q.node("Reshape", at, "back"), "axis", keepdims=0))
    q.node("Identity", q.matrix(at, "m1", 5, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _mixed_images() -> bytes:
    """The mean over the images that run together is taken away: no image stands alone."""
    q = Qdq()
    q.tensors["axis"] = np.array([0])
    at = q.matrix(q.values(q.node("Flatten", "x")), "m0", FLAT, 8)
    at = q.values(q.node("Sub", at, q.node("ReduceMean", at, "axis", keepdims=1)))
    q.node("Identity", q.matrix(at, "m1", 8, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _one_dimension() -> bytes:
    q = Qdq()
    c, h, w = graphs.SHAPE
    q.tensors["to"] = np.array([0, c, h * w])
    at = q.values(q.node("Reshape", "x", "to"))
    at = q.values(q.node("Conv", at, q.weight("w", 5, c, 3), pads=[1, 1]))
    at = q.values(q.node("GlobalAveragePool", at))
    q.node("Identity", q.matrix(q.node("Flatten", at), "m", 5, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _same_padding() -> bytes:
    q = Qdq()
    at = q.values("x")
    weight = q.weight("w", 5, graphs.SHAPE[0], 3, 3)
    at = q.values(q.node("Conv", at, weight, auto_pad="SAME_UPPER", strides=[2, 2]))
    at = q.values(q.node("GlobalAveragePool", at))
    q.node("Identity", q.matrix(q.node("Flatten", at), "m", 5, 4), to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _codes_out() -> bytes:
    """The last value is answered as codes."""
    q = Qdq()
    at = q.matrix(q.values(q.node("Flatten", "x")), "m0", FLAT, 8)
    product = q.node("MatMul", at, q.weight("m1", 8, 4))
    q.node("QuantizeLinear", product, q.scale(0.02), "zero", to="logits")
    return graph(q.nodes, q.tensors, {"logits": (TensorProto.UINT8, ["N", 4])})


def _codes_in() -> bytes:
    """The pixels are the codes of the first layer."""
    q = Qdq()
    q.tensors["none"] = np.uint8(0)
    at = q.node("DequantizeLinear", "x", q.scale(1 / 255), "none")
    at = q.values(q.node("Conv", at, q.weight("w", 5, graphs.SHAPE[0], 3, 3)))
    at = q.values(q.node("GlobalAveragePool", at))
    q.node("Identity", q.matrix(q.node("Flatten", at), "m", 5, 4), to="logits")
    source = (TensorProto.UINT8, ["N", *graphs.SHAPE])
    return graph(q.nodes, q.tensors, {"logits": FLOATS}, source)


def _subgraph() -> bytes:
    """A branch chosen at run time: such a graph is not cut."""
    q = Qdq()
    at = q.matrix(q.values(q.node("Flatten", "x")), "m0", FLAT, 4)
    total = q.node("ReduceSum", at, keepdims=0)
    q.tensors["limit"] = np.float32(0)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(kind, [at], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, *FLOATS)],
        )
        for name, kind in (("then", "Neg"), ("else", "Identity"))
    }
    q.node("If", q.node("Greater", total, "limit"), to="logits", **branches)
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


def _positive_weights(zero: int) -> bytes:
    """uint8 weights that are all positive: with a zero point of 0 none is near to 0."""
    q = Qdq()
    at = q.values("x")
    q.tensors["w_zero"] = np.uint8(zero)
    q.tensors["w"] = q.rng.integers(zero + 100, 256, (5, graphs.SHAPE[0], 3, 3)).astype(np.uint8)
    weight = q.node("DequantizeLinear", "w", q.scale(0.002), "w_zero")
    at = q.values(q.node("Conv", at, weight))
    at = q.values(q.node("GlobalAveragePool", at))
    q.tensors["m"] = q.rng.integers(zero, 256, (5, 4)).astype(np.uint8)
    q.tensors["m"][0, 0] = zero
    weight = q.node("DequantizeLinear", "m", q.scale(0.002), "w_zero")
    product = q.values(q.node("MatMul", q.node("Flatten", at), weight))
    q.node("Identity", product, to="logits")
    return graph(q.nodes, q.tensors, {"logits": FLOATS})


OTHERS = {
    "positive-50": lambda: _positive_weights(50),
    "second-output": _second_output,
    "shared-weight": _shared_weight,
    "same-weight-twice": _same_weight_twice,
    "weight-first": _weight_first,
    "tokens-first": _tokens_first,
    "mixed-images": _mixed_images,
    "one-dimension": _one_dimension,
    "same-padding": _same_padding,
    "codes-out": _codes_out,
    "codes-in": _codes_in,
    "subgraph": _subgraph,
}


@pytest.mark.parametrize("name", OTHERS)
def test_graphs_of_other_shapes(name: str) -> None:
    x = graphs.images(103)
    both = Both(OTHERS[name](), x, cut=name != "subgraph")
    space = both.found.space
    for index, tensor in enumerate(space.tensors):
        changed = 0
        for offset in range(0, tensor.size, max(1, tensor.size // 6)):
            changed += both.check(both.single(index, offset, 7))
        assert changed or tensor.name == "aux"
        start = space.starts[index]
        both.check(both.memory().read(np.arange(start, start + tensor.n_bits, 24)))
    for _, flips in patterns(both.memory(), 0):
        both.check(both.memory().read(flips), "sums", "timed")


# ------------------------------------------------------------------ our networks


def patches(n: int) -> np.ndarray:
    """uint8 images (n, 3, 32, 32) that differ as real ones do: soft patches of colour."""
    coarse = np.random.default_rng(0).random((n, 3, 5, 5))
    at = np.linspace(0, 4, 32)
    left, part = np.minimum(at.astype(int), 3), at - np.minimum(at.astype(int), 3)
    rows = coarse[:, :, left] * (1 - part)[:, None] + coarse[:, :, left + 1] * part[:, None]
    pixels = rows[..., left] * (1 - part) + rows[..., left + 1] * part
    return (pixels * 255).astype(np.uint8)


@cache
def exported(name: str) -> bytes:
    """The int8 file of one of our networks at a small width, random weights."""
    import torch

    from resq_deploy.export.qdq import qdq
    from resq_deploy.nets import build
    from resq_deploy.nets.quantized import calibrate, quantize

    net = build(name, n_classes=10, in_channels=3, width=WIDTHS[name], seed=1)
    x = torch.from_numpy(patches(16).astype(np.float32) / 255)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # plain averages of everything seen
    with torch.no_grad():
        net.train()(x)
    for norm in norms:  # a little damped, as trained networks are
        norm.running_var.mul_(1.3)
    net = quantize(net.eval())
    calibrate(net, x)
    return qdq(net.eval(), (3, 32, 32), opset=19, ir_version=10).SerializeToString()


WIDTHS = {
    "resnet8": 0.5,
    "resnet20": 0.25,
    "resnet18": 0.125,
    "vgg16": 0.125,
    "mobilenetv2": 0.25,
    "efficientnet_b0": 0.25,
    "swin_tiny": 0.125,
}


def test_our_networks_are_all_here() -> None:
    from resq_deploy.nets import NETS

    assert set(WIDTHS) == set(NETS)


QUICK = (
    "resnet8",
    "resnet20",
    "resnet18",
    "vgg16",
)  # the export of the others takes up to ten seconds


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in WIDTHS]
)
def test_faults_on_our_networks(name: str) -> None:
    raw = exported(name)
    rng = np.random.default_rng(0)
    both = Both(raw, patches(5), ("weight", "bias"))
    weights = [i for i, t in enumerate(both.found.space.tensors) if t.target == "weight"]
    for index in [*rng.permutation(weights)[:4], weights[0], weights[-1]]:
        for bit in (5, 7):
            both.check(both.single(index, int(rng.integers(10**6)), bit), "sums", "timed")
    for rate in (1e-4, 1e-2):
        flips = faults.parse("ber").sample(both.memory().space, seed=0, draw=0, rate=rate)
        both.check(both.memory().read(flips), "sums", "timed")
    assert both.seen["changed"] > 2


# ------------------------------------------------------------------ kernels against integers


def half_even(numerator: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """numerator / 2**shift, rounded to the nearest integer, ties to even; integers alone."""
    one = np.int64(1)
    floor, rest = numerator >> shift, numerator & ((one << shift) - 1)
    half = (one << shift) >> 1
    up = (rest > half) | ((rest == half) & (shift > 0) & (floor & 1 == 1))
    return floor + up


@dataclass(frozen=True, kw_only=True)
class Plain:
    """An integer layer in plain integers."""

    kind: str
    """QLinearConv, QGemm or QLinearMatMul."""
    codes: np.ndarray
    """Weights as the file holds them."""
    turned: bool
    """Does the file hold a matrix as (out, in)?"""
    w_zero: int
    bias: np.ndarray
    shift: np.ndarray
    """(O,): the scale is 2**-shift."""
    dtype: type
    """Of the codes that come in and go out."""
    x_zero: int
    y_zero: int
    x_shape: tuple[int, ...]
    """(height, width, channels), or (rows, 1, channels)."""
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    def weights(self, codes: np.ndarray) -> np.ndarray:
        """(O, C / groups, kernel height, kernel width), code minus zero point."""
        w = codes.astype(np.int64) - self.w_zero
        if w.ndim == 2:
            w = (w if self.turned else w.T)[:, :, None, None]
        return w

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weights(self.codes).shape[2:]

    @property
    def y_shape(self) -> tuple[int, ...]:
        spatial = [
            (size + self.pads[i] + self.pads[i + 2] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i, size in enumerate(self.x_shape[:2])
        ]
        return (*spatial, len(self.bias))

    def acc(self, x: np.ndarray, codes: np.ndarray | None = None) -> np.ndarray:
        """(N, P, Q, O) sums of codes x (N, H, W, C)."""
        w = self.weights(self.codes if codes is None else codes)
        n, height, width, channels = x.shape
        top, left, bottom, right = self.pads
        padded = np.zeros((n, height + top + bottom, width + left + right, channels), np.int64)
        padded[:, top : top + height, left : left + width] = x.astype(np.int64) - self.x_zero
        rows, columns, out = self.y_shape
        acc = np.zeros((n, rows, columns, out), np.int64) + self.bias
        inner, outer = channels // self.groups, out // self.groups
        for a, b in np.ndindex(*self.kernel):
            i = a * self.dilation[0] + self.stride[0] * np.arange(rows)
            j = b * self.dilation[1] + self.stride[1] * np.arange(columns)
            taps = padded[:, i][:, :, j]
            for k in range(self.groups):
                o = slice(k * outer, (k + 1) * outer)
                acc[..., o] += taps[..., k * inner : (k + 1) * inner] @ w[o, :, a, b].T
        return acc

    def y(self, acc: np.ndarray) -> np.ndarray:
        """The codes that sums become."""
        info = np.iinfo(self.dtype)
        codes = half_even(acc, np.broadcast_to(self.shift, acc.shape)) + self.y_zero
        return np.clip(codes, info.min, info.max).astype(self.dtype)

    def node(
        self, x: str, y: str, *, channels_last: bool = False
    ) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
        """The layer in a file; its weights are called w_{y}."""
        tensors = {
            "xs": np.float32(1), "xz": self.dtype(self.x_zero), "w": self.codes,
            "ws": (0.5**self.shift).astype(np.float32),
            "wz": np.full(self.shift.shape, self.w_zero, self.codes.dtype),
            "ys": np.float32(1), "yz": self.dtype(self.y_zero), "b": self.bias.astype(np.int32),
        }  # fmt: skip
        order = {
            "QLinearConv": "ys yz b", "QGemm": "b ys yz", "QLinearMatMul": "ys yz",
        }[self.kind].split()  # fmt: skip
        inputs = [x, *(f"{name}_{y}" for name in ["xs", "xz", "w", "ws", "wz", *order])]
        attributes: dict[str, Any] = {}
        if self.kind == "QLinearConv":
            attributes = {
                "strides": self.stride, "dilations": self.dilation, "pads": self.pads,
                "group": self.groups, "kernel_shape": self.kernel,
            }  # fmt: skip
            if channels_last:
                attributes["channels_last"] = 1
        elif self.kind == "QGemm":
            attributes = {"transB": int(self.turned)}
        own = self.kind == "QGemm" or channels_last
        node = helper.make_node(
            self.kind, inputs, [y], domain="com.microsoft" if own else "", **attributes
        )
        return node, {f"{k}_{y}": np.asarray(v) for k, v in tensors.items() if k in order + KEPT}

    def changed(self, rng: np.random.Generator, n: int) -> tuple[Change, np.ndarray]:
        """Random codes for n weights: as a change of a tensor of the name "", and all codes."""
        info = np.iinfo(self.codes.dtype)
        offsets = np.sort(rng.choice(self.codes.size, min(n, self.codes.size), replace=False))
        values = rng.integers(info.min, info.max + 1, offsets.size).astype(self.codes.dtype)
        after = self.codes.copy()
        after.reshape(-1)[offsets] = values
        return {"": (offsets, values)}, after


KEPT = ["xs", "xz", "w", "ws", "wz"]
SIZES = [15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 112, 127, 128, 129, 144, 160]


def plain(
    rng: np.random.Generator, kind: str, x_shape: tuple[int, ...], out: int, *, dtype: type,
    x_zero: int | None = None, kernel: tuple[int, int] = (1, 1), **geometry: Any,
) -> Plain:  # fmt: skip
    """Random weights, biases, scales and zero points."""
    info = np.iinfo(dtype)
    channels, groups = x_shape[2] // geometry.get("groups", 1), geometry.get("groups", 1)
    if kind == "QLinearConv":
        shape, turned = (out, channels, *kernel), False
    else:
        turned = kind == "QGemm" and bool(rng.integers(2))
        shape = (out, channels) if turned else (channels, out)
    w_dtype = np.int8 if dtype == np.int8 else rng.choice([np.int8, np.uint8])
    low = np.iinfo(w_dtype).min
    codes = rng.integers(low, low + 256, shape).astype(w_dtype)
    w_zero = int(np.median(codes))
    if (codes.astype(int) - w_zero).min() >= 0:
        w_zero = min(int(codes.min()) + 1, int(codes.max()))
    fan_in = channels * kernel[0] * kernel[1]
    zeros = rng.integers(info.min, info.max + 1, 2).tolist()
    return Plain(
        kind=kind,
        codes=codes,
        turned=turned,
        w_zero=w_zero,
        bias=np.zeros(out, int) if kind == "QLinearMatMul" else rng.integers(-3000, 3000, out),
        shift=np.maximum(int(np.log2(5000 * fan_in**0.5 / 60)) + rng.integers(-2, 2, out), 0),
        dtype=dtype,
        x_zero=zeros[0] if x_zero is None else x_zero,
        y_zero=zeros[1],
        x_shape=x_shape,
        **{"groups": groups} | geometry,
    )


def pair(number: int, out: int | None = None) -> tuple[Plain, Plain]:
    """Two layers one behind the other; a weight of the first one reaches one channel."""
    rng = np.random.default_rng(number)
    dtype = rng.choice([np.int8, np.uint8])
    kind = str(rng.choice(["QLinearConv", "QLinearConv", "QGemm", "QLinearMatMul"]))
    groups, channels = 1, int(rng.choice([*range(1, 40), 63, 64, 65]))
    size = out or int(rng.choice([*range(1, 40), *SIZES]))
    if kind == "QLinearConv" and rng.integers(2) and out is None:
        groups = int(rng.integers(2, 6))
        channels, size = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 8))
    geometry: dict[str, Any] = {}
    spatial = (1 if kind == "QGemm" else int(rng.integers(1, 5)), 1)
    if kind == "QLinearConv":
        kernel, stride, dilation = (tuple(rng.integers(1, n, 2).tolist()) for n in (4, 3, 3))
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple(rng.integers(0, 3, 4).tolist())
        spatial = tuple(max(1, r + int(rng.integers(-1, 4))) for r in reach)
        if any(spatial[i] + pads[i] + pads[i + 2] < reach[i] for i in range(2)):
            pads = (2, 2, 2, 2)
        geometry = {
            "kernel": kernel, "stride": stride, "dilation": dilation, "pads": pads,
            "groups": groups,
        }  # fmt: skip
    first = plain(rng, kind, (*spatial, 2), channels, dtype=dtype)
    second = plain(rng, kind, first.y_shape, size, dtype=dtype, x_zero=first.y_zero, **geometry)
    return first, second


def file_of(first: Plain, second: Plain) -> bytes:
    """Both layers as a classifier of codes."""
    kind = {np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8}[first.dtype]
    nodes, tensors = [], {}
    for layer, x, y in ((first, "x", "h"), (second, "h", "y")):
        node, more = layer.node(x, y)
        nodes.append(node)
        tensors |= more
    nodes.append(helper.make_node("Flatten", ["y"], ["logits"]))
    height, width, channels = first.x_shape
    shape = {
        "QLinearConv": [channels, height, width], "QGemm": [channels],
        "QLinearMatMul": [height, channels],
    }[first.kind]  # fmt: skip
    outputs = {"logits": (kind, ["N", int(np.prod(second.y_shape))])}
    return graph(nodes, tensors, outputs, (kind, ["N", *shape]))


def fed(x: np.ndarray, kind: str) -> np.ndarray:
    """Codes (N, H, W, C) as a file takes them."""
    if kind == "QLinearConv":
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x.reshape(len(x), -1) if kind == "QGemm" else x.reshape(len(x), -1, x.shape[-1])


def check_pair(number: int, n: int, out: int | None = None) -> int:
    """Compare faults in both layers with plain integers; how many outputs changed?"""
    first, second = pair(number, out)
    rng = np.random.default_rng(number)
    info = np.iinfo(first.dtype)
    x = rng.integers(info.min, info.max + 1, (n, *first.x_shape)).astype(first.dtype)
    # most inputs are zero points: a fault in the first layer changes little of what the second sees
    x[rng.random(x.shape) < rng.choice([0.0, 0.7, 0.95])] = first.x_zero
    both = Both(file_of(first, second), fed(x, first.kind))
    if not runtime.saturates():
        assert both.network.group is None and len(both.network.layers) == 2

    def expected(one: np.ndarray | None = None, two: np.ndarray | None = None) -> bytes:
        y = second.y(second.acc(first.y(first.acc(x, one)), two))
        return fed(y, first.kind).reshape(n, -1).tobytes()

    golden, changed = expected(), 0
    assert answer(both.fast, {}) == golden
    for k in (1, 1, 3, 9):
        (one, codes_one), (two, codes_two) = first.changed(rng, k), second.changed(rng, k)
        one, two = {"w_h": one[""]}, {"w_y": two[""]}
        for change, after in (
            (one, expected(codes_one)),
            (two, expected(None, codes_two)),
            (one | two, expected(codes_one, codes_two)),
        ):
            for way in ("sums", "dense"):
                assert both.fast_answer(change, way) == after, (way, change)
            changed += after != golden
    return changed


@settings(EXACT, max_examples=50)
@given(numbers)
def test_faults_in_two_layers_against_integers(number: int) -> None:
    check_pair(number, 6)


@pytest.mark.parametrize("out", [*SIZES, 24, 56])
def test_faults_at_the_sizes_of_vectors(out: int) -> None:
    assert sum(check_pair(1000 * out + i, 3, out) for i in range(2)) > 2


def recognized(layer: Plain, other: dict[str, Any] | None = None) -> layers.Layer | None:
    """As the engine finds it in an optimized graph; with `other` tensors in place of some."""
    node, tensors = layer.node("x", "y", channels_last=layer.kind == "QLinearConv")
    tensors |= other or {}
    shapes = {"x": layer.x_shape, "y": layer.y_shape}
    if layer.kind != "QLinearConv":
        shapes = {k: v[2:] if layer.kind == "QGemm" else (v[0], v[2]) for k, v in shapes.items()}
    cut = Cut(
        model=onnx.ModelProto(),
        units=[],
        values={
            name: Value(name=name, dtype=np.dtype(layer.dtype), rows=1, tail=shape)
            for name, shape in shapes.items()
        },
        input="x",
        output="y",
        initializers={k: numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()},
    )
    unit = Unit(nodes=[node], inputs=["x"], outputs=["y"], initializers=set(tensors))
    return layers.recognize(unit, cut)


@settings(EXACT, max_examples=80)
@given(numbers)
def test_sums_and_patches_of_a_layer(number: int) -> None:
    _, o = pair(number)
    layer, rng = recognized(o), np.random.default_rng(number)
    assert layer is not None
    info = np.iinfo(o.dtype)
    x = rng.integers(info.min, info.max + 1, (3, *o.x_shape)).astype(o.dtype)
    sums = layer.accumulators(layer.x(x), np.empty((3, *layer.y_shape), np.int32))
    assert np.array_equal(sums, o.acc(x))
    y = o.y(o.acc(x)).view(np.uint8)
    assert layer.reproduces(sums, y)
    y.reshape(-1)[rng.integers(y.size)] ^= 1
    assert not layer.reproduces(sums, y)
    (offsets, values), after = (found := o.changed(rng, 5))[0][""], found[1]
    delta = values.astype(np.int64) - o.codes.reshape(-1)[offsets]
    before, patched = layer.weights, layer.patched(layer.taps(offsets), delta)
    difference = (o.weights(after) - o.weights(o.codes)).transpose(2, 3, 1, 0)
    out = difference.shape[3]
    assert np.array_equal(patched[..., :out].astype(np.int64) - before[..., :out], difference)
    assert not patched[..., out:].any()


@pytest.mark.parametrize("pixels", [1, 7, 16, 17, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul", "twice"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_elementwise_operators_of_any_size(operator: str, pixels: int, dtype: type) -> None:
    """Both operands change, one of them, or one operand is both."""
    rng = np.random.default_rng(pixels)
    kind = {np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8}[dtype]
    left, right = (plain(rng, "QLinearConv", (pixels, 1, 2), 1, dtype=dtype) for _ in range(2))
    nodes, tensors = [], {"s1": np.float32(0.01), "s2": np.float32(0.007), "s": np.float32(0.013)}
    for layer, y in ((left, "l"), (right, "r")):
        node, more = layer.node("x", y)
        nodes.append(node)
        tensors |= more | {f"xz_{y}": dtype(left.x_zero)}
    tensors["z"] = dtype(20)
    a, b = ["l", "s1", "yz_l"], ["r", "s2", "yz_r"]
    first = [*a, *(a if operator == "twice" else b), "s", "z"]
    operator = operator.replace("twice", "QLinearAdd")
    nodes.append(helper.make_node(operator, first, ["e"], domain="com.microsoft"))
    last = ["e", "s", "z", *b, "s", "z"]
    nodes.append(helper.make_node("QLinearAdd", last, ["f"], domain="com.microsoft"))
    nodes.append(helper.make_node("Flatten", ["f"], ["logits"]))
    raw = graph(nodes, tensors, {"logits": (kind, ["N", pixels])}, (kind, ["N", 2, pixels, 1]))
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max + 1, (20, 2, pixels, 1)).astype(dtype)
    x[rng.random(x.shape) < 0.8] = left.x_zero
    x[7:] = left.x_zero
    both = Both(raw, x)
    if not runtime.saturates():
        assert len(both.network.tables) == 2
    for tensor in (0, 1):
        for offset in (0, 1):
            for bit in (0, 4, 7):
                both.check(both.single(tensor, offset, bit), "sums", "dense")
    all_of_them = both.memory().read(np.arange(3, both.found.space.n_bits, 5))
    both.check(all_of_them, "sums", "dense")
    assert both.seen["changed"] > 1


def test_scales_are_multiplied_in_float32_from_left_to_right() -> None:
    """As onnxruntime does it; another order differs in the last bit of many of them."""
    rng = np.random.default_rng(0)
    o = plain(rng, "QGemm", (1, 1, 3), 200, dtype=np.uint8)
    x, y = np.float32(0.0123), np.float32(0.0457)
    w = rng.random(200).astype(np.float32)
    layer = recognized(o, {"xs_y": x, "ws_y": w, "ys_y": y})
    assert layer is not None and np.array_equal(layer.scale, (x * w) / y)
    assert not np.array_equal(layer.scale, x * (w / y))


@pytest.mark.parametrize("flip", [0, 128])
@pytest.mark.parametrize("zero", [0, 1, 128, 254, 255])
def test_requantizing_rounds_half_to_even_and_saturates(zero: int, flip: int) -> None:
    acc = np.concatenate([np.arange(-1100, 1100), [-(2**24), 2**24, -(2**31), 2**31 - 1, 0]])
    shift = np.array([0, 1, 2, 3])
    rows = np.repeat(acc[:, None], 4, axis=1)
    out = np.empty(rows.shape, np.uint8)
    kernels.requantize(rows.astype(np.int32), (0.5**shift).astype(np.float32), zero, flip, out)
    expected = np.clip(half_even(rows, np.broadcast_to(shift, rows.shape)) + zero, 0, 255) ^ flip
    assert np.array_equal(out, expected)


def test_requantizing_multiplies_in_float32() -> None:
    """The product is rounded to float32 before it is rounded to an integer."""
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**26), 2**26, (4000, 8)).astype(np.int32)
    scale = (rng.random(8) * 2**-17).astype(np.float32)
    out = np.empty(acc.shape, np.uint8)
    kernels.requantize(acc, scale, 7, 0, out)
    expected = np.clip(np.rint(acc.astype(np.float32) * scale) + 7, 0, 255)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2100])
def test_differing_rows(size: int) -> None:
    rng = np.random.default_rng(size)
    golden = rng.integers(0, 256, (7, size)).astype(np.uint8)
    images = np.array([6, 0, 3, 2, 2])
    for at in {0, size // 2, size - 1, min(size - 1, 1024)}:
        new = golden[images]
        new[1, at] ^= 128
        new[4, at] ^= 1
        rows, found = np.empty_like(new), np.empty(5, np.int64)
        assert kernels.differing(golden, images, new, rows, found) == 2
        assert found[:2].tolist() == [0, 2]
        assert np.array_equal(rows[:2], new[[1, 4]])


@njit
def _differences(a, b):
    return simd.differences(a.ctypes.data, b.ctypes.data)


@njit
def _bits(mask):
    return simd.lowest_bit(mask), simd.popcount(mask)


def test_masks_of_bytes_and_bits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a = rng.integers(0, 256, 64).astype(np.uint8)
        b = np.where(rng.random(64) < rng.random(), a, a ^ rng.choice([1, 128, 255])).astype(
            np.uint8
        )
        mask = int(_differences(a, b))
        assert [mask >> i & 1 for i in range(64)] == (a != b).tolist()
        if mask:
            lowest, count = _bits(np.uint64(mask))
            assert (lowest, count) == ((mask & -mask).bit_length() - 1, mask.bit_count())


# ------------------------------------------------------------------ campaigns


TINY = graphs.Spec(blocks=(), head="gemm")
SMALL = graphs.Spec(blocks=(("conv", 5), ("residual", 1)), head="gemm")
N_IMAGES = 173
"""Three chunks of images, the last one not full."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.onnx"
    file.write_bytes(graphs.build(SMALL))
    return file


def dataset(n: int = N_IMAGES) -> Dataset:
    y = np.random.default_rng(1).integers(0, 4, n)
    return Dataset(name="noise", x=graphs.images(n), y=y)


def chunked(file: Path, workers: int = 1) -> int:
    """`memory` with which the images of `dataset` need several chunks."""
    network = Network(discover(onnx.load(file)), dataset().x)
    return 50 * network.bytes_per_image(workers) if network.why == "" else 10**9


def trials(path: Path) -> list:
    return store.read([path])[1]


SWEEP = {"fault": "ber", "rates": [1e-3, 0.05], "draws": 5}
PLANS: dict[str, dict[str, Any]] = {
    "single": {"trials": 17},
    "sweep": SWEEP,
    "k": {"fault": "k:5", "trials": 11, "targets": ["weight", "bias"], "protection": "parity"},
    "scale": {"trials": 9, "targets": ["weight", "scale"]},
}


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The chunks of which golden data were kept, in their order; trials go in blocks of 4."""
    monkeypatch.setattr(campaign, "BLOCK", 4)
    seen: list[tuple[int, int]] = []
    enter = Evaluator.enter

    def note(self: Evaluator, chunk: Chunk, kept: Any = None) -> None:
        if chunk.golden:
            seen.append((chunk.start, chunk.stop))
        enter(self, chunk, kept)

    monkeypatch.setattr(Evaluator, "enter", note)
    return seen


@pytest.mark.parametrize("plan", PLANS)
def test_campaigns_of_both_engines_are_one(
    small: Path, tmp_path: Path, entered: list, plan: str
) -> None:
    data, options = dataset(), PLANS[plan]
    slow = inject(small, data, out=tmp_path / "reload", engine="reload", seed=3, **options)
    entered.clear()
    whole = inject(small, data, out=tmp_path / "whole", seed=3, **options)
    assert set(entered) == {(0, N_IMAGES)}
    entered.clear()
    limit = chunked(small)
    parts = inject(small, data, out=tmp_path / "parts", memory=limit, seed=3, **options)
    if not runtime.saturates():
        n_bits = sum(t.n_bits for t in discover(onnx.load(small)).space.tensors)
        few = [t for t in trials(tmp_path / "reload") if (t.rate or 0) * n_bits < evaluator.MANY]
        assert len(few) == parts["n_trials"] / (2 if plan == "sweep" else 1)
        n_blocks = -(-len(few) // 4)
        assert entered == [(0, 50), (50, 100), (100, 150), (150, N_IMAGES)] * n_blocks
    expected = trials(tmp_path / "reload")
    assert trials(tmp_path / "whole") == trials(tmp_path / "parts") == expected
    assert slow["outcomes"] == whole["outcomes"] == parts["outcomes"]
    assert slow["outcomes"]["masked"] < len(expected)
    assert slow["reloaded"] == {}
    if not runtime.saturates():
        assert bool(whole["reloaded"]) == (plan == "scale")


def test_every_bit_of_a_tiny_network(tmp_path: Path) -> None:
    file = tmp_path / "tiny.onnx"
    file.write_bytes(graphs.build(TINY))
    found = {
        engine: inject(file, dataset(31), out=tmp_path / engine, engine=engine, exhaustive=True)
        for engine in ("fast", "reload")
    }
    assert found["fast"]["n_trials"] == found["fast"]["n_bits"] == 8 * 3 * graphs.N_CLASSES
    assert trials(tmp_path / "fast") == trials(tmp_path / "reload")
    for key in ("per_layer_bit", "per_bit", "outcomes_images", "fault_accuracy"):
        assert found["fast"][key] == found["reload"][key]


def test_interrupted_and_divided_campaigns_in_chunks(
    small: Path, tmp_path: Path, entered: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial is stored when all chunks have been seen, never before."""
    data, limit = dataset(), chunked(small)
    inject(small, data, out=tmp_path / "reload", engine="reload", trials=11)
    expected, ran = trials(tmp_path / "reload"), []
    observe = Evaluator.observe

    def interrupted(self: Evaluator, number: int) -> Any:
        if len(ran) == 29:  # the second block: 16 trials of chunks, then 4 + 4 + 4 + 1
            raise KeyboardInterrupt
        ran.append(number)
        return observe(self, number)

    monkeypatch.setattr(Evaluator, "observe", interrupted)
    if not runtime.saturates():
        with pytest.raises(KeyboardInterrupt):
            inject(small, data, out=tmp_path / "s", trials=11, memory=limit)
        assert trials(tmp_path / "s") == expected[:5]
    ran.append(-1)  # no interrupt any more
    resume = (tmp_path / "s").exists()
    inject(small, data, out=tmp_path / "s", trials=11, memory=3 * limit, resume=resume)
    assert trials(tmp_path / "s") == expected
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(parts):
        inject(small, data, out=part, trials=11, shard=(i, 2), memory=limit)
    store.merge(parts, tmp_path / "merged")
    assert trials(tmp_path / "merged") == expected
    assert results(parts)["n_trials"] == 11


def test_golden_data_of_one_chunk_at_a_time(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    inner = Network.keep

    def keep(self: Network, *given: Any) -> Any:
        assert not any(ref() is not None for ref in made), "the chunk before is still there"
        kept = inner(self, *given)
        made.append(weakref.ref(kept))
        return kept

    limit = chunked(small)
    monkeypatch.setattr(Network, "keep", keep)
    inject(small, dataset(), out=tmp_path / "s", trials=3, memory=limit)
    assert len(made) > 4 or runtime.saturates()


def test_shared_arrays_are_one_memory_that_goes_away() -> None:
    both = Both(models.quantized("qdq-channel"), models.data(53).x)
    shared = Shared()
    kept = both.network.keep(both.x, shared.allocate)
    handle = pickle.loads(pickle.dumps(shared.handle(kept)))
    path = handle.path
    opened = handle.open()
    assert len(pickle.dumps(handle)) < 20_000 + opened.output.nbytes
    assert opened.output.tobytes() == kept.output.tobytes()
    pairs = []
    for name in ("values", "sums", "inputs_by_channel", "sums_by_channel"):
        arrays, others = getattr(kept, name), getattr(opened, name)
        assert arrays.keys() == others.keys() and (arrays or runtime.saturates())
        pairs += [(arrays[key], others[key]) for key in arrays]
    assert pairs or runtime.saturates()
    for mine, theirs in pairs:
        assert isinstance(theirs, np.memmap) and not theirs.flags.writeable
        assert theirs.dtype == mine.dtype and theirs.tobytes() == mine.tobytes()
    for i in range(len(both.found.space.tensors)):
        change = both.single(i, 3, 7)
        output = Fast(both.network, opened, both.x).run(change)
        assert output.tobytes() == both.reload.run(change).tobytes()
    for mine, theirs in pairs:
        mine.reshape(-1).view(np.uint8)[-1] ^= 255
        assert theirs.tobytes() == mine.tobytes(), "a copy"
    shared.close()
    assert not Path(path).exists()


def left(temporary: Path) -> list[Path]:
    """Files in a temporary folder but the one that onnxruntime itself writes there."""
    return [path for path in temporary.iterdir() if path.name != ".ses"]


def mapped(pid: int, inode: int) -> str:
    """How a process maps a file: "r--s" and the like, or nothing."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next((line.split()[1] for line in lines if line.split()[4] == str(inode)), "")


def test_workers_map_one_golden_run_and_leave_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, limit = dataset(), chunked(small, 2)
    inject(small, data, out=tmp_path / "reload", engine="reload", trials=14)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(campaign, "BLOCK", 8)
    seen: dict[int, set[str]] = {}
    inodes = set()
    observe = Processes.observe

    def watched(self: Processes, block: Any) -> Iterator:
        for batch in observe(self, block):
            if self._shared is not None:
                inode = os.fstat(self._shared._file.fileno()).st_ino
                inodes.add(inode)
                for pid in self._pool._processes:
                    seen.setdefault(pid, set()).add(mapped(pid, inode))
                assert left(temporary) == [], "the file has no name"
            yield batch

    monkeypatch.setattr(Processes, "observe", watched)
    inject(small, data, out=tmp_path / "two", trials=14, workers=2, memory=limit)
    assert trials(tmp_path / "two") == trials(tmp_path / "reload")
    if not runtime.saturates():
        assert len(seen) == 2 and inodes
        assert set().union(*seen.values()) - {""} == {"r--s"}, "mapped, shared, only read"
    assert left(temporary) == []


def test_tasks_of_short_trials_hold_several(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(small, dataset(), out=tmp_path / "one", trials=200)
    sizes, submit = [], ProcessPoolExecutor.submit

    def counted(self: Any, work: Any, *given: Any) -> Any:
        sizes.extend(len(numbers) for numbers in given[:1])
        return submit(self, work, *given)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", counted)
    inject(small, dataset(), out=tmp_path / "two", trials=200, workers=2)
    assert trials(tmp_path / "two") == trials(tmp_path / "one")
    assert sizes[0] == 1 and max(sizes) > 4 and sum(sizes) == 200
    monkeypatch.setattr(observers, "TASK_S", 0.0)
    sizes.clear()
    inject(small, dataset(), out=tmp_path / "three", trials=20, workers=2)
    assert sizes == [1] * 20, "trials that take longer than a task is to take"


def test_arrays_of_no_size_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared()
    assert shared.allocate((0, 3), np.int32).shape == (0, 3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"do not fit .*No space left.*--memory"):
        shared.allocate((5,), np.uint8)
    shared.close()


KILLED = """
import sys
from pathlib import Path
import graphs
import test_fast
from resq_deploy.inject import inject
if __name__ == "__main__":
    inject(Path(sys.argv[1]), test_fast.dataset(), out=Path(sys.argv[2]), workers=2,
           fault="k:5", trials=9000)
"""


@pytest.mark.slow
def test_a_killed_campaign_leaves_no_process_and_no_file(small: Path, tmp_path: Path) -> None:
    script, temporary = tmp_path / "killed.py", tmp_path / "tmp"
    script.write_text(KILLED)
    temporary.mkdir()
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(small), str(tmp_path / "s")], env=environment
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the campaign ended by itself"
        with contextlib.suppress(InputError):  # there, but not yet a store
            if (tmp_path / "s").exists() and trials(tmp_path / "s"):
                break
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.1)
    assert left(temporary) == []
    done = trials(tmp_path / "s")
    assert 0 < len(done) < 9000
    inject(small, dataset(), out=tmp_path / "again", fault="k:5", trials=9000, shard=(0, 1500))
    alone = {t.trial: t for t in trials(tmp_path / "again")}
    assert all(alone[t.trial] == t for t in done if t.trial in alone)


@pytest.mark.skipif(runtime.saturates(), reason="this CPU cannot run the fast engine")
def test_too_little_memory_is_one_clear_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as caught:
        inject(small, dataset(), out=tmp_path / "s", trials=3, memory=1000)
    line = str(caught.value)
    assert line.startswith("--memory 1000 bytes given; the golden data of 50 images, beside ")
    assert "\n" not in line and "--engine reload" in line
    assert not (tmp_path / "s").exists()
    need = int(line.split(" bytes with")[0].split()[-1])
    inject(small, dataset(), out=tmp_path / "s", trials=3, memory=need)
    with pytest.raises(InputError, match=f"--memory {need - 1} bytes"):
        inject(small, dataset(), out=tmp_path / "t", trials=3, memory=need - 1)
    inject(small, dataset(), out=tmp_path / "t", trials=3, memory=1, engine="reload")
    monkeypatch.undo()  # the process counts too, that of a worker as much
    assert campaign.held() > 10 * need
    for workers in (1, 2):
        with pytest.raises(InputError, match="beside processes of") as caught:
            inject(small, dataset(), out=tmp_path / "u", trials=3, memory=need, workers=workers)
        said = int(str(caught.value).split("processes of ")[1].split()[0])
        extra = 2 * (campaign.WORKER + dataset().x.nbytes) if workers == 2 else 0
        assert 0.9 < (said - extra) / campaign.held() < 1.1
    # golden data alone are bounded where nothing is said: a large process may run a campaign
    monkeypatch.setattr(campaign, "held", lambda: 2**50)
    inject(small, dataset(), out=tmp_path / "v", trials=3)


@pytest.mark.parametrize("workers", [1, 2])
def test_many_bit_errors_need_no_golden_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Rates with few and with many flips in one sweep, with any memory, as by the other engine."""
    raw = models.quantized("qdq-channel")
    (tmp_path / "m.onnx").write_bytes(raw)
    n_bits = discover(runtime.parse_model(raw)).space.n_bits
    kept: list[int] = []
    inner = Network.keep

    def keep(self: Network, x: np.ndarray, *rest: Any) -> Any:
        kept.append(len(x))
        return inner(self, x, *rest)

    monkeypatch.setattr(Network, "keep", keep)
    data, sweep = models.data(130), {"fault": "ber", "draws": 3}
    rates = [3 / n_bits, 200 / n_bits]
    found = {
        engine: inject(
            tmp_path / "m.onnx", data, out=tmp_path / engine, rates=rates, engine=engine,
            workers=workers, **sweep,
        )
        for engine in ("fast", "reload")
    }  # fmt: skip
    assert trials(tmp_path / "fast") == trials(tmp_path / "reload")
    assert found["fast"]["per_rate"] == found["reload"]["per_rate"]
    assert 130 in kept or runtime.saturates()
    kept.clear()
    inject(tmp_path / "m.onnx", data, out=tmp_path / "many", rates=rates[1:], memory=1, **sweep)
    assert 130 not in kept
    assert [t.n_correct for t in trials(tmp_path / "many")] == [
        t.n_correct for t in trials(tmp_path / "fast") if t.rate == rates[1]
    ]


def test_a_graph_that_is_not_cut_is_reloaded_and_says_why(tmp_path: Path) -> None:
    file = tmp_path / "branch.onnx"
    file.write_bytes(_subgraph())
    found = {
        engine: inject(file, dataset(60), out=tmp_path / engine, engine=engine, trials=9)
        for engine in ("fast", "reload")
    }
    assert trials(tmp_path / "fast") == trials(tmp_path / "reload")
    assert found["reload"]["reloaded"] == {}
    reloaded = json.loads(json.dumps(found["fast"]))["reloaded"]
    assert set(reloaded) == {"m0"}
    if not runtime.saturates():
        assert reloaded["m0"] == "the graph has subgraphs (If)"


def test_a_cpu_without_vnni_reloads_and_is_marked(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = runtime.cpu_features("flags : avx2", "x86_64")
    monkeypatch.setattr(runtime, "cpu_features", lambda: old)
    runtime.saturates.cache_clear()
    try:
        assert runtime.saturates()
        found = {
            engine: inject(small, dataset(60), out=tmp_path / engine, engine=engine, trials=9)
            for engine in ("fast", "reload")
        }
    finally:
        runtime.saturates.cache_clear()
    assert trials(tmp_path / "fast") == trials(tmp_path / "reload")
    fast = found["fast"]
    assert fast["cpu"]["x64quantprecision"] is True and fast["cpu"]["vnni"] == []
    assert any("VNNI" in warning for warning in fast["warnings"])
    tensors = {t.name for t in discover(onnx.load(small)).space.tensors}
    assert set(fast["reloaded"]) == tensors
    assert all("without VNNI" in why for why in fast["reloaded"].values())


def test_tensors_that_are_reloaded_are_named(small: Path, tmp_path: Path) -> None:
    found = inject(small, dataset(9), out=tmp_path / "s", trials=3, targets=["weight", "scale"])
    space = discover(onnx.load(small), ("weight", "scale")).space
    if not runtime.saturates():
        scales = {t.name for t in space.tensors if t.target == "scale"}
        assert set(found["reloaded"]) == scales
        assert all("steer how onnxruntime optimizes" in why for why in found["reloaded"].values())
