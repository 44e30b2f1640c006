"""The memory: what is stored, what is read, and what an engine writes back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import models
from resq_deploy import bits
from resq_deploy.errors import InputError
from resq_deploy.inject import memory
from resq_deploy.inject.discovery import Discovery, discover
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Space, Tensor

TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int32": TensorProto.INT32,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
}


def protos(sizes: dict[str, int]) -> list[onnx.TensorProto]:
    """A tensor of random bytes of every type, named like it."""
    rng = np.random.default_rng(4)
    made = []
    for dtype, size in sizes.items():
        n_bytes = -(-size * bits.width(dtype) // 8)
        raw = rng.integers(0, 256, n_bytes).astype(np.uint8)
        if size * bits.width(dtype) % 8:
            raw[-1] &= 15
        made.append(
            TensorProto(name=dtype, data_type=TYPES[dtype], dims=[size], raw_data=raw.tobytes())
        )
    return made


def found(sizes: dict[str, int]) -> Discovery:
    tensors = [
        Tensor(name=dtype, dtype=dtype, shape=(n,), op_type="Conv", node="n", absorbed=False)
        for dtype, n in sizes.items()
    ]
    graph = helper.make_graph([], "g", [], [], protos(sizes))
    return Discovery(
        model=helper.make_model(graph),
        space=Space(tensors=tuple(tensors)),
        excluded=[],
        warnings=[],
    )


SIZES = {"int8": 5, "uint8": 3, "int4": 7, "uint4": 4, "int32": 2, "float16": 3, "float32": 3}
N_BITS = 40 + 24 + 28 + 16 + 64 + 48 + 96


def stored_bits(proto: onnx.TensorProto) -> str:
    """The bits of an initializer, least significant of the first byte first, without padding."""
    text = "".join(f"{byte:08b}"[::-1] for byte in proto.raw_data)
    return text[: proto.dims[0] * bits.width(proto.name)]


def test_the_bits_are_those_of_the_raw_data_in_order() -> None:
    discovery = found(SIZES)
    mem = Memory.of(discovery)
    assert mem.n_bits == N_BITS
    text = "".join(stored_bits(proto) for proto in discovery.model.graph.initializer)
    assert "".join(map(str, mem.bits(np.arange(N_BITS)))) == text
    backwards = np.arange(N_BITS)[::-1]
    assert "".join(map(str, mem.bits(backwards))) == text[::-1]


@settings(deadline=None)
@given(st.lists(st.integers(0, N_BITS - 1), unique=True))
def test_what_is_read_and_written_is_the_raw_data_with_those_bits_inverted(
    flips: list[int],
) -> None:
    """Against bit strings: no shared code with the memory or with onnx."""
    discovery = found(SIZES)
    mem = Memory.of(discovery)
    before = "".join(stored_bits(proto) for proto in discovery.model.graph.initializer)
    expected = "".join(
        str(1 - int(bit)) if i in set(flips) else bit for i, bit in enumerate(before)
    )
    change = mem.read(np.array(flips, np.int64))
    for proto in discovery.model.graph.initializer:
        if proto.name in change:
            offsets, values = change[proto.name]
            assert offsets.dtype == np.int64 and len(offsets) == len(values) > 0
            assert (np.diff(offsets) > 0).all()
            memory.write(proto, proto.name, offsets, values)
    after = "".join(stored_bits(proto) for proto in discovery.model.graph.initializer)
    assert after == expected


@pytest.mark.parametrize(
    "dtype, kind, low, high",
    [
        ("int8", np.int8, -128, 127),
        ("uint8", np.uint8, 0, 255),
        ("int4", np.int8, -8, 7),
        ("uint4", np.uint8, 0, 15),
        ("int32", np.int32, -(2**31), 2**31 - 1),
    ],
)
def test_values_read_have_the_type_and_range_of_the_tensor(
    dtype: str, kind: type, low: int, high: int
) -> None:
    discovery = found({dtype: 9})
    mem = Memory.of(discovery)
    offsets, values = mem.read(np.arange(mem.n_bits))[dtype]  # every bit inverted
    assert values.dtype == kind
    assert (low <= values).all() and (values <= high).all()
    stored = numpy_helper.to_array(discovery.model.graph.initializer[0]).astype(np.int64)
    total = -1 if low else high  # of a code and its complement
    assert np.array_equal(stored + values, np.full(9, total))
    assert offsets.tolist() == list(range(9))


def test_elements_that_keep_their_value_are_left_out() -> None:
    mem = Memory.of(found({"int4": 4, "int8": 4}))
    assert mem.read(np.empty(0, np.int64)) == {}
    change = mem.read(np.array([5]))  # the high nibble of the first byte
    assert list(change) == ["int4"] and change["int4"][0].tolist() == [1]


def test_the_memory_of_a_real_file_holds_its_codes() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    mem = Memory.of(discover(model))
    codes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for flat in (0, 7, 300, mem.n_bits - 1):
        site = mem.space.sites(np.array([flat]))[0]
        offsets, values = mem.read(np.array([flat]))[site.tensor]
        expected = bits.flip(codes[site.tensor].reshape(-1)[site.offset], bit=site.bit)
        assert (offsets.tolist(), values.tolist()) == ([site.offset], [expected])


def test_bits_outside_are_refused() -> None:
    mem = Memory.of(found({"int8": 1}))
    with pytest.raises(InputError, match="outside"):
        mem.read(np.array([8]))
    with pytest.raises(InputError, match="outside"):
        mem.bits(np.array([-1]))
