"""Encodings: what is read after flips, the decoder in the file, and faults in encoded weights."""

from __future__ import annotations

import ctypes
import math
import subprocess
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import models
from resq_deploy import bits, data, encoding, recipe, runtime
from resq_deploy.encoding import Encoding, InPlaceSecded, decoders, hsiao, secded
from resq_deploy.errors import ExportError, InputError
from resq_deploy.export import QDQ, c_decoder, checks, export
from resq_deploy.inject import discovery, memory
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.network import Network
from resq_deploy.inject.reload import Reload
from resq_deploy.nets import build, checkpoint
from resq_deploy.nets.quantized import calibrate, codes, encoding_of, quantize, weight_layers
from resq_deploy.perturb.weights import bit_errors, random_masks, worst_masks

NAMES = list(encoding.ENCODINGS)
KINDS = ["guard:expected", "guard:mean", "parity:zero", "hamming", "cosq:0.02", "secded",
         "secded:zero", "saf:tanh"]  # fmt: skip
"""One for every way in which a decoder is built, and in which levels lie."""
BYTES = np.arange(256).astype(np.uint8)
ALL = BYTES.view(np.int8)


def weight(kind: Encoding, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(kind.levels, shape).astype(np.int8)


def random_flips(shape: tuple[int, ...], rate: float, seed: int = 0) -> np.ndarray:
    size = math.prod(shape)
    at = bits.random_positions(8 * size, rate, np.random.default_rng(seed))
    return bits.flip_sites(np.zeros(size, np.int8), at // 8, at % 8).reshape(shape)


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_what_no_fault_struck_is_read_as_it_was_encoded(self, name: str) -> None:
        kind = encoding.parse(name)
        for shape in [(len(kind.levels),), (5, 3, 3, 3), (3, 7), (2, 4)]:
            stored = weight(kind, shape)
            assert np.array_equal(kind.decode(kind.encode(stored)), stored)
        every = kind.levels.astype(np.int8)
        assert np.array_equal(kind.decode(kind.encode(every)), every)

    def test_nearest_is_the_closest_level(self, name: str) -> None:
        kind = encoding.parse(name)
        x = np.random.default_rng(0).uniform(-140, 140, 500)
        found = kind.nearest(x)
        assert np.isin(found, kind.levels).all()
        assert np.array_equal(abs(x - found), abs(x[:, None] - kind.levels).min(axis=1))
        assert np.array_equal(kind.nearest(kind.levels.astype(float)), kind.levels)

    def test_any_bytes_are_read_and_in_range(self, name: str) -> None:
        kind = encoding.parse(name)
        read = kind.decode(np.random.default_rng(0).permutation(ALL).reshape(4, 64))
        assert read.dtype == np.int8 and read.shape == (4, 64)

    @pytest.mark.parametrize("bit", range(8))
    def test_a_byte_struck_alone_is_read_as_if_no_other_were(self, name: str, bit: int) -> None:
        """One by one; a tensor with an incomplete word, a byte of which is bad already."""
        kind = encoding.parse(name)
        stored = kind.encode(weight(kind, (2, 7))) ^ random_flips((2, 7), 0.01, seed=3)
        found = kind.struck_alone(stored, bit)
        for at in range(stored.size):
            one = bits.flip_sites(stored, np.array([at]), np.array([bit]))
            assert found.flat[at] == kind.decode(one).flat[at]

    def test_it_says_whether_every_lone_flip_is_undone(self, name: str) -> None:
        kind = encoding.parse(name)
        codes_ = weight(kind, (8, 8))
        stored = kind.encode(codes_)
        undone = [np.array_equal(kind.struck_alone(stored, bit), codes_) for bit in range(8)]
        assert all(undone) == kind.corrects

    def test_name_and_documentation(self, name: str) -> None:
        assert encoding.parse(name).name == name
        text = (Path(__file__).parents[1] / "docs/encoding.md").read_text(encoding="utf-8")
        kind, _, policy = name.partition(":")
        assert f"| `{kind}" in text
        assert not policy or f"`{policy}`" in text or f"`{name}`" in text


def test_unknown_encodings_are_refused() -> None:
    with pytest.raises(InputError, match="'parity' is unknown; expected one of plain, guard:zero"):
        encoding.parse("parity")


@pytest.mark.parametrize("tau", ["tanh", "arctan", "softsign", "hardtanh", "lecun-tanh"])
def test_saf_bounds_and_orders_every_weight_whatever_is_flipped(tau: str) -> None:
    """All 256 stored bytes are all that flips can make."""
    read = encoding.parse(f"saf:{tau}").decode(ALL)
    assert np.abs(read.astype(int)).max() == 127
    in_order = read[np.argsort(ALL)].astype(int)
    assert (np.diff(in_order) >= 0).all() and read[0] == 0


def test_the_tables_of_saf_are_tau() -> None:
    """At v = 1, the stored code 32 of the format Q2.5."""
    taus = {
        "tanh": math.tanh(1) / math.tanh(127 / 32),
        "arctan": math.atan(1) / math.atan(127 / 32),
        "softsign": 0.5 / (127 / 32 / (1 + 127 / 32)),
        "hardtanh": 1.0,
        "lecun-tanh": math.tanh(2 / 3) / math.tanh(2 / 3 * 127 / 32),
    }
    for tau, value in taus.items():
        assert encoding.parse(f"saf:{tau}").decode(ALL)[32] == round(127 * value)


@given(st.integers(-63, 63), st.integers(0, 63))
@settings(deadline=None)
def test_guard_sees_each_flip_of_the_two_top_bits_and_passes_both(code: int, low: int) -> None:
    """Whatever happens to the other bits; a good byte that is read is never changed."""
    stored = np.array([code ^ low], np.int8)
    for policy, bad in [("zero", 0), ("nearest", None)]:
        kind = encoding.parse(f"guard:{policy}")
        for bit in (6, 7):
            flipped = bits.flip(stored, bit=bit)
            limit = 63 if flipped[0] > 0 else -63
            assert kind.decode(flipped)[0] == (limit if bad is None else bad)
        both = bits.flip(bits.flip(stored, bit=6), bit=7)
        assert kind.decode(both)[0] == both[0] and kind.decode(stored)[0] == stored[0]


@given(st.data())
@settings(deadline=None)
def test_parity_sees_every_odd_number_of_flips_and_passes_even_ones(data: st.DataObject) -> None:
    kind = encoding.parse("parity:zero")
    assert not any((level & 255).bit_count() % 2 for level in kind.levels.tolist())
    code = data.draw(st.sampled_from(kind.levels[kind.levels != 0].tolist()))
    hit = data.draw(st.sets(st.integers(0, 7)))
    stored = np.array([code], np.int8)
    for bit in hit:
        stored = bits.flip(stored, bit=bit)
    assert kind.decode(stored)[0] == (0 if len(hit) % 2 else stored[0])


@pytest.mark.parametrize("kind", ["guard", "parity"])
def test_expected_is_the_mean_of_what_one_flip_may_have_come_from(kind: str) -> None:
    found, limit = encoding.parse(f"{kind}:expected"), 63 if kind == "guard" else 127
    assert isinstance(found, encoding.Checked)
    for byte in range(256):
        sources = [c for c in found.levels.tolist() if (c & 255 ^ byte).bit_count() == 1]
        if found.good[byte] or not sources:
            continue
        common = [math.exp(-((3 * c / limit) ** 2) / 2) for c in sources]
        mean = sum(c * p for c, p in zip(sources, common, strict=True)) / sum(common)
        assert abs(int(found.decode(ALL)[byte]) - mean) <= 0.5 + 1e-9


def test_nearest_reads_a_bad_byte_as_the_closest_level() -> None:
    kind = encoding.parse("parity:nearest")
    for code, read in zip(ALL.tolist(), kind.decode(ALL).tolist(), strict=True):
        assert abs(code - read) == min(abs(code - level) for level in kind.levels.tolist())


def test_mean_is_that_of_the_good_codes_of_the_channel() -> None:
    kind = encoding.parse("guard:mean")
    stored = np.array([[[10, 20, 100]], [[-3, 0, 7]], [[-100, 100, 127]]], np.int8)
    assert kind.decode(stored).tolist() == [[[10, 20, 15]], [[-3, 0, 7]], [[0, 0, 0]]]


# --------------------------------------------------------------------------- Hamming


def test_words_of_the_hamming_code_differ_in_four_bits() -> None:
    """15 of the 16 of a linear code: the exclusive or of two of them is one of the 16."""
    kind = encoding.parse("hamming")
    words = kind.encode(kind.levels.astype(np.int8)).view(np.uint8).tolist()
    sums = {a ^ b for a, b in combinations(words, 2)}
    assert {s.bit_count() for s in sums} == {4, 8} and len(set(words)) == 15 and len(sums) == 15


def test_hamming_corrects_a_flip_and_reads_two_as_the_mean_of_the_four_likeliest() -> None:
    kind = encoding.parse("hamming")
    levels = kind.levels.astype(np.int8)
    words = dict(zip(kind.encode(levels).view(np.uint8).tolist(), levels.tolist(), strict=True))
    for stored, level in words.items():
        for flips in combinations(range(8), 1):
            struck = np.array([stored ^ sum(1 << b for b in flips)], np.uint8)
            assert kind.decode(struck.view(np.int8))[0] == level
        for flips in combinations(range(8), 2):
            byte = stored ^ sum(1 << b for b in flips)
            near = [value for w, value in words.items() if (w ^ byte).bit_count() == 2]
            assert level in near and len(near) in (3, 4)  # one word in 16 is of no level
            common = [math.exp(-((3 * value / 127) ** 2) / 2) for value in near]
            mean = sum(v * p for v, p in zip(near, common, strict=True)) / sum(common)
            read = kind.decode(np.array([byte], np.uint8).view(np.int8))[0]
            assert abs(read - mean) <= 0.5 + 1e-9


# --------------------------------------------------------------------------- COSQ


def clipped_normal(n: int) -> np.ndarray:
    """Weights as a fraction of the largest, clipped at two root mean squares."""
    return np.clip(np.random.default_rng(0).normal(0, 0.5, n), -1, 1)


def mean_square_error(kind: Encoding, rate: float) -> float:
    """Of such weights under bit errors, exactly: every byte becomes every other."""
    x = clipped_normal(4000)
    stored = kind.encode(kind.nearest(x * kind.limit)).view(np.uint8)
    read = kind.decode(ALL).astype(float) / kind.limit
    flips = np.bitwise_count(stored[:, None] ^ BYTES).astype(int)
    likely = rate**flips * (1 - rate) ** (8 - flips)
    return float((likely * (read - x[:, None]) ** 2).sum(axis=1).mean())


BY_BYTE = [n for n in NAMES if isinstance(encoding.parse(n), encoding.ByByte) and "mean" not in n]


@pytest.mark.parametrize("rate", encoding.cosq.WORDS)
def test_cosq_errs_less_than_every_other_encoding_at_its_rate(rate: str) -> None:
    errors = {n: mean_square_error(encoding.parse(n), float(rate)) for n in ["plain", *BY_BYTE]}
    best = f"cosq:{rate}"
    assert min(errors, key=errors.__getitem__) == best
    rest = [error for name, error in errors.items() if not name.startswith("cosq")]
    assert errors[best] < 0.75 * min(rest)


@pytest.mark.parametrize("rate", encoding.cosq.WORDS)
def test_cosq_reads_what_is_expected_of_a_byte(rate: str) -> None:
    """Against counting: weights stored, bits flipped, those that led to a byte averaged. (What is
    stored without faults is read as its level.)"""
    kind = encoding.parse(f"cosq:{rate}")
    codes_ = kind.nearest(127 * clipped_normal(int(4000 / float(rate))))
    struck, checked = kind.encode(codes_) ^ random_flips(codes_.shape, float(rate)), 0
    for byte in np.setdiff1d(struck, kind.encode(kind.levels.astype(np.int8))):
        sources = codes_[struck == byte].astype(float)
        error = 4 * sources.std() / len(sources) ** 0.5  # four standard errors
        if len(sources) >= 200:
            assert abs(sources.mean() - kind.decode(ALL)[byte]) <= 0.5 + error
            checked += 1
    assert checked >= 10


# --------------------------------------------------------------------------- in-place SECDED


def _word(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    word = rng.integers(-64, 64, 8).astype(np.int8)
    word[7] = rng.integers(-128, 128)
    return word, InPlaceSecded().encode(word)


def test_all_64_columns_of_odd_weight_are_in_use() -> None:
    assert sorted(secded.COLUMNS.tolist()) == [c for c in range(128) if c.bit_count() % 2]


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_secded_returns_the_codes_after_any_single_flip_in_every_word(seed: int) -> None:
    """All 64 positions; the eighth code of a word has all its 8 bits."""
    words = [_word(seed + i) for i in range(64)]
    stored = np.stack([word for _, word in words])
    for bit in range(64):
        stored[bit].view(np.uint8)[bit // 8] ^= 1 << bit % 8
    expected = np.stack([word for word, _ in words])
    for kind in (InPlaceSecded(), InPlaceSecded(zero=True)):
        assert np.array_equal(kind.decode(stored), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_secded_detects_every_double_flip(seed: int) -> None:
    word, encoded = _word(seed)
    pairs = list(combinations(range(64), 2))
    stored = np.tile(encoded, (len(pairs), 1))
    expected = np.tile(word, (len(pairs), 1))
    for i, pair in enumerate(pairs):
        for bit in pair:
            stored[i].view(np.uint8)[bit // 8] ^= 1 << bit % 8
            if bit == 63 or (bit // 8 == 7 or bit % 8 < 6):
                expected[i].view(np.uint8)[bit // 8] ^= 1 << bit % 8
            elif bit % 8 == 7:  # the sign, which bit 6 repeats once the word is read
                expected[i].view(np.uint8)[bit // 8] ^= 0b11000000
    assert (InPlaceSecded(zero=True).decode(stored) == 0).all()
    assert np.array_equal(InPlaceSecded().decode(stored), expected)


def test_the_incomplete_word_at_the_end_is_stored_as_it_is() -> None:
    kind, codes_ = InPlaceSecded(), weight(InPlaceSecded(), (3, 7))
    assert kind.unprotected(21) == 5
    stored = kind.encode(codes_)
    assert np.array_equal(stored.reshape(-1)[16:], codes_.reshape(-1)[16:])
    flipped = stored.copy()
    flipped[2, 6] ^= 1
    assert np.argwhere(kind.decode(flipped) != codes_).tolist() == [[2, 6]]


def test_columns_have_their_weight() -> None:
    assert hsiao.columns(4, 3) == [0b0111, 0b1011, 0b1101, 0b1110]


# --------------------------------------------------------------------------- the decoder


def stored_model(kind: Encoding, shape: tuple[int, ...]) -> onnx.ModelProto:
    """One weight behind a DequantizeLinear, encoded."""
    codes_ = weight(kind, shape)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "scale"], ["y"])], "g", [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(codes_, "w"), numpy_helper.from_array(np.float32(1), "scale")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    decoders.attach(model, kind, {"w": codes_})
    return model


def read_by(model: onnx.ModelProto, stored: np.ndarray) -> list[np.ndarray]:
    """What onnxruntime and onnx's own evaluator read of a stored weight."""
    part = runtime.constant_part(model, ["w"], ["w.read"])
    session = runtime.build(part)
    reference = ReferenceEvaluator(onnx.load_from_string(part))
    return [executor.run(["w.read"], {"w": stored})[0] for executor in (session, reference)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_the_decoder_in_the_file_is_the_python_one(name: str) -> None:
    """All 256 codes, and random flips in a tensor with an incomplete word."""
    kind = encoding.parse(name)
    for stored in [
        ALL.reshape(16, 16),
        *(weight(kind, (5, 3, 3, 3)) ^ random_flips((5, 3, 3, 3), rate) for rate in (0.01, 0.2)),
    ]:
        for found in read_by(stored_model(kind, stored.shape), stored):
            assert found.dtype == np.int8
            assert np.array_equal(found, kind.decode(stored))


@pytest.mark.parametrize("name", ["secded", "secded:zero"])
def test_the_decoder_of_secded_is_the_python_one_after_every_single_and_double_flip(
    name: str,
) -> None:
    kind, (_, encoded) = encoding.parse(name), _word(3)
    places = [*combinations(range(64), 1), *combinations(range(64), 2)]
    stored = np.tile(encoded, (len(places), 1))
    for i, place in enumerate(places):
        for bit in place:
            stored[i].view(np.uint8)[bit // 8] ^= 1 << bit % 8
    for found in read_by(stored_model(kind, stored.shape), stored):
        assert np.array_equal(found, kind.decode(stored))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "guard:expected"])
def test_the_decoder_in_c_is_the_python_one(name: str, tmp_path: Path) -> None:
    kind = encoding.parse(name)
    for file, content in c_decoder.sources(kind).items():
        (tmp_path / file).write_bytes(content)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-lm"]
    library = tmp_path / "decode.so"
    subprocess.run(["cc", tmp_path / "decode.c", *flags, "-o", library], check=True)
    decode = ctypes.CDLL(str(library)).resq_model_decode
    for shape in [(16, 16), (5, 3, 3, 3)]:
        stored = np.random.default_rng(1).integers(-128, 128, shape).astype(np.int8)
        if shape[0] == 5:
            stored = kind.encode(weight(kind, shape)) ^ random_flips(shape, 0.02)
        found = np.empty(shape, np.int8)
        for target in (found, stored.copy()):  # into other bytes, and in place
            source = stored if target is found else target
            decode(
                ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(source.ctypes.data),
                ctypes.c_uint32(stored.size), ctypes.c_uint32(shape[0]),
            )  # fmt: skip
            assert np.array_equal(target, kind.decode(stored))


def test_plain_codes_need_no_decoder() -> None:
    assert c_decoder.sources(Encoding()) == {}


def test_an_opset_without_the_operators_is_refused() -> None:
    model = stored_model(Encoding(), (2, 8))
    model.opset_import[0].version = 17
    with pytest.raises(InputError, match="encoding secded needs opset 18 or later; opset 17 given"):
        decoders.attach(model, InPlaceSecded(), {"w": np.zeros((2, 8), np.int8)})


def encoded_file(name: str) -> tuple[bytes, bytes]:
    """A small QDQ file with its codes on the levels of an encoding: plain, and encoded."""
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    kind, weights = encoding.parse(name), {}
    for tensor in model.graph.initializer:
        if tensor.name in ("w1_quantized", "w2_quantized", "w3_quantized"):
            values = numpy_helper.to_array(tensor).astype(np.float64)
            weights[tensor.name] = kind.nearest(values * kind.limit / 127)
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    plain = model.SerializeToString()
    decoders.attach(model, kind, weights)
    return plain, model.SerializeToString()


@pytest.mark.parametrize("name", KINDS)
def test_onnxruntime_folds_the_decoder_and_runs_the_same_kernels(name: str) -> None:
    plain, encoded = encoded_file(name)
    assert runtime.kernels(encoded) == runtime.kernels(plain)
    checks.same_kernels(encoded, runtime.kernels(plain))
    outputs = []
    for raw in (plain, encoded):
        session = runtime.session(raw)
        outputs.append(runtime.run(session, runtime.adapt(models.data().x, session)))
    assert outputs[0].tobytes() == outputs[1].tobytes()


@pytest.mark.parametrize("name", KINDS)
def test_campaigns_strike_what_is_stored_and_both_engines_read_it(name: str) -> None:
    """The oracle: the plain file with what Python reads of the flipped bytes."""
    kind, (plain, encoded) = encoding.parse(name), encoded_file(name)
    found = discovery.discover(runtime.parse_model(encoded))
    reference = discovery.discover(runtime.parse_model(plain))
    assert found.space == reference.space
    x = models.data().x
    network = Network(found, x)
    assert network.reloaded == {}
    fast, reload = Fast(network, network.keep(x), x), Reload(found.model, found.space, x)
    mem = memory.Memory.of(found)
    stored = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer}
    for seed, rate in enumerate([0.0007, 0.002, 0.02, 0.1]):
        change = mem.read(bits.random_positions(mem.n_bits, rate, np.random.default_rng(seed)))
        for tensor in reference.model.graph.initializer:
            if tensor.name in [t.name for t in found.space.tensors]:
                faulty = stored[tensor.name].copy()
                if tensor.name in change:
                    offsets, values = change[tensor.name]
                    faulty.reshape(-1)[offsets] = values
                tensor.raw_data = kind.decode(faulty).tobytes()
        session = runtime.session(reference.model.SerializeToString())
        expected = runtime.run(session, runtime.adapt(x, session)).tobytes()
        assert reload.run(change).tobytes() == expected
        assert fast.run(change).tobytes() == expected
    flips = bits.random_positions(mem.n_bits, 0.01, np.random.default_rng(4))
    struck = network.holding(lasting := mem.read(flips))
    assert not struck.why
    behind = Fast(struck, struck.keep(x), x)
    assert behind.run({}).tobytes() == reload.run(lasting).tobytes()
    again = memory.Memory.of(struck.found).read(flips)  # all back
    assert behind.run(again).tobytes() == reload.run({}).tobytes()


# --------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a calibrated int8 ResNet-8 with random weights, plain codes."""
    arguments = {"name": "resnet8", "n_classes": 10, "in_channels": 1}
    net = quantize(build(**arguments, seed=3))
    calibrate(net, torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    path = tmp_path_factory.mktemp("net") / "checkpoint.safetensors"
    facts = {"stage": "baseline", "recipe": {"seed": 1}, "net": arguments, "quantized": True}
    checkpoint.save(path, net.eval(), inputs={}, **facts)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_codes_of_a_network_are_levels_and_faults_strike_them_encoded(
    saved: Path, name: str
) -> None:
    net, facts = checkpoint.load(saved, encoding=name)
    plain, kind = checkpoint.load(saved)[0], encoding.parse(name)
    assert facts["net"]["encoding"] == name and encoding_of(net) == kind
    masks = random_masks(net, 0.01, np.random.default_rng(0))
    for (layer_name, layer), old in zip(
        weight_layers(net).items(), weight_layers(plain).values(), strict=True
    ):
        q = layer.quant_weight()  # type: ignore[operator]
        stored = codes(layer).numpy()
        real = (old.weight / q.scale).detach().numpy()
        # the max of a channel gives the scale: no code is further from its weight than a level
        assert np.abs(kind.nearest(real).astype(float) - stored).max() <= (0 if not kind.uniform
                                                                          else 1)  # fmt: skip
        mask = masks[layer_name].numpy()
        with bit_errors(net, masks):
            faulty = layer.quant_weight()  # type: ignore[operator]
        read = torch.round(faulty.value / q.scale).detach().numpy()
        assert np.array_equal(read, kind.decode(kind.encode(stored) ^ mask))


def test_gradients_pass_uneven_levels_straight_through(saved: Path) -> None:
    layer = weight_layers(checkpoint.load(saved, encoding="parity:zero")[0])["fc"]
    value = layer.quant_weight().value  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value.sum(), layer.weight)
    assert (gradient == 1).float().mean() > 0.8  # the maximum of a channel also moves the scale


@pytest.mark.parametrize("name", ["plain", "guard:mean", "parity:expected", "saf:tanh"])
def test_worst_flips_are_those_of_the_stored_bits(saved: Path, name: str) -> None:
    """Every stored bit of a layer tried alone, on a loss that is linear in the weights."""
    net, _ = checkpoint.load(saved, encoding=name)
    kind, layer = encoding.parse(name), weight_layers(net)["conv1"]
    slope = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr, arg-type]
    code, scale = codes(layer).numpy(), layer.quant_weight().scale.detach()  # type: ignore[operator]
    stored, gains = kind.encode(code), np.full((code.size, 8), -np.inf)
    for offset in range(code.size):
        for bit in range(8):
            one = kind.decode(bits.flip_sites(stored, np.array([offset]), np.array([bit])))
            step = torch.from_numpy(one.astype(np.float32) - code)
            gains[offset, bit] = float((step * scale * slope).flatten()[offset])
    best = np.sort(gains.max(axis=1))[::-1][:5]
    mask = worst_masks(net, 5, {"conv1": slope})["conv1"].flatten().numpy().view(np.uint8)
    at = np.flatnonzero(mask)
    struck = [gains[i, int(mask[i]).bit_length() - 1] for i in at]
    assert len(at) == 5 and np.bitwise_count(mask[at]).tolist() == [1] * 5
    np.testing.assert_allclose(sorted(struck, reverse=True), best, rtol=1e-4)


@pytest.mark.parametrize("name", ["secded", "hamming"])
def test_four_bits_and_worst_flips_of_a_correcting_code_are_refused(name: str, saved: Path) -> None:
    with pytest.raises(InputError, match=f"encoding {name} is for 8-bit weights"):
        quantize(build("resnet8", n_classes=2, in_channels=1), weight_bits=4, encoding=name)
    net, _ = checkpoint.load(saved, encoding=name)
    with pytest.raises(InputError, match=f"encoding {name} corrects single flips"):
        worst_masks(net, 3, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1, "encoding": "ecc"}, "encoding 'ecc' is unknown; expected one of plain"),
        ({"epochs": 0, "encoding": "secded"}, "encoding secded begins with this stage"),
    ],
)
def test_recipes_name_an_encoding_that_a_stage_uses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.Fault(lr=0.1, **fields)


def test_export_stores_the_encoded_codes_and_says_so(saved: Path, tmp_path: Path) -> None:
    """Its own checks compare the file with the network; here the manifest and a campaign's view."""
    images = data.load("digits").test
    file = export(
        saved, out=tmp_path / "out", images=images, config=recipe.Export(parity_images=20),
        encoding="secded",
    )  # fmt: skip
    net, _ = checkpoint.load(saved, encoding="secded")
    found = discovery.discover(runtime.parse_model(file.read_bytes()))
    stored = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer}
    layers = weight_layers(net)
    assert [t.name for t in found.space.tensors] == [f"{name}.weight" for name in layers]
    for name, layer in layers.items():
        expected = InPlaceSecded().encode(codes(layer).numpy())
        assert np.array_equal(stored[f"{name}.weight"], expected)
    manifest = (tmp_path / "out/manifest.json").read_text(encoding="utf-8")
    assert '"encoding": "secded"' in manifest and '"n_unprotected_bytes": 0' in manifest
    assert file.name == QDQ and (tmp_path / "out/decode.c").is_file()


def test_a_decoder_that_reads_other_codes_is_refused() -> None:
    kind = encoding.parse("parity:zero")
    plain = weight(kind, (2, 8))
    model = stored_model(kind, (2, 8))
    for tensor in model.graph.initializer:
        if tensor.name in ("w", "decoder.table"):
            tensor.name = "fc.weight" if tensor.name == "w" else tensor.name
    for node in model.graph.node:
        for side in (node.input, node.output):
            side[:] = [n.replace("w.read", "fc.weight.read") if n != "w" else "fc.weight"
                       for n in side]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    model.graph.input.append(x)
    checks.structure(model, {"fc": plain}, kind)
    table = next(t for t in model.graph.initializer if t.name == "decoder.table")
    broken = numpy_helper.to_array(table).copy()
    broken[plain.reshape(-1)[0]] += 1
    table.CopyFrom(numpy_helper.from_array(broken, table.name))
    with pytest.raises(ExportError, match=r"decoder of 'fc.weight.read' does not read the codes"):
        checks.structure(model, {"fc": plain}, kind)


def test_decoders_that_stay_in_the_graph_are_refused() -> None:
    _, encoded = encoded_file("parity:zero")
    with pytest.raises(ExportError, match=r"does not fold the decoders .*: \+1 x QLinearAdd"):
        checks.same_kernels(encoded, runtime.kernels(encoded) | {"QLinearAdd": 0})
