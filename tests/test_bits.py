"""Flips: literal codes, and properties on any array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resq_deploy.bits import count_flips, flip, flip_sites, width
from resq_deploy.errors import InputError

DTYPES = st.sampled_from([np.int8, np.uint8, np.int32])
ARRAYS = DTYPES.flatmap(
    lambda t: hnp.arrays(t, hnp.array_shapes(min_dims=0, max_dims=4, max_side=5))
)


@pytest.mark.parametrize(
    ("dtype", "before", "bit", "after"),
    [
        (np.int8, 0, 7, -128),  # the sign bit alone is the most negative code
        (np.int8, 1, 7, -127),
        (np.int8, -1, 7, 127),
        (np.int8, -128, 0, -127),
        (np.int8, 127, 6, 63),
        (np.uint8, 0, 7, 128),
        (np.uint8, 255, 0, 254),
        (np.int32, 0, 31, -(2**31)),
        (np.int32, -1, 30, -1 - 2**30),
    ],
)
def test_one_flip_of_a_known_code(dtype: type, before: int, bit: int, after: int) -> None:
    codes = np.array([before], dtype=dtype)
    assert flip(codes, bit=bit).tolist() == [after]
    assert flip_sites(codes, np.array([0]), np.array([bit])).tolist() == [after]
    assert codes.tolist() == [before], "the input stays as it is"


def test_weight_of_each_bit_of_int8() -> None:
    moved = [int(flip(np.zeros(1, np.int8), bit=b)[0]) for b in range(8)]
    assert moved == [1, 2, 4, 8, 16, 32, 64, -128]


@given(ARRAYS, st.data())
def test_twice_is_identity_and_once_changes_one_bit_of_each(codes: np.ndarray, data) -> None:
    bit = data.draw(st.integers(0, width(codes.dtype) - 1))
    once = flip(codes, bit=bit)
    assert once.dtype == codes.dtype and once.shape == codes.shape
    assert count_flips(codes, once) == codes.size
    np.testing.assert_array_equal(flip(once, bit=bit), codes)


@given(ARRAYS, st.data())
def test_pattern_of_distinct_sites(codes: np.ndarray, data) -> None:
    n_bits = codes.size * width(codes.dtype)
    chosen = np.array(data.draw(st.lists(st.integers(0, n_bits - 1), unique=True)), np.int64)
    offsets, bits = chosen // width(codes.dtype), chosen % width(codes.dtype)
    once = flip_sites(codes, offsets, bits)
    assert count_flips(codes, once) == len(chosen)
    np.testing.assert_array_equal(flip_sites(once, offsets, bits), codes)
    # the same sites one at a time, in Python's own integers
    expected = [int(v) for v in codes.astype(np.int64).reshape(-1)]
    for offset, bit in zip(offsets.tolist(), bits.tolist(), strict=True):
        expected[offset] ^= 1 << bit
    wrapped = np.array(expected, np.int64).astype(codes.dtype)
    np.testing.assert_array_equal(once.reshape(-1), wrapped)


def test_offsets_count_in_c_order_whatever_the_memory_layout() -> None:
    codes = np.asfortranarray(np.zeros((2, 3), np.int8))
    changed = flip_sites(codes, np.array([2]), np.array([0]))
    assert np.argwhere(changed).tolist() == [[0, 2]]
    strided = np.zeros((4, 4), np.int8)[::2, ::2]
    assert np.argwhere(flip_sites(strided, np.array([1]), np.array([7]))).tolist() == [[0, 1]]


def test_the_same_site_twice_in_one_pattern_restores_itself() -> None:
    codes = np.array([5, 6], np.int8)
    assert flip_sites(codes, np.array([1, 1]), np.array([7, 7])).tolist() == [5, 6]


def test_empty_pattern_returns_a_copy() -> None:
    codes = np.array([5, 6], np.int8)
    same = flip_sites(codes, np.array([], np.int64), np.array([], np.int64))
    assert same.tolist() == [5, 6] and not np.shares_memory(same, codes)


@pytest.mark.parametrize("bit", [-1, 8])
def test_bit_outside_of_the_width_is_refused(bit: int) -> None:
    with pytest.raises(InputError, match="bit"):
        flip(np.zeros(1, np.int8), bit=bit)
    with pytest.raises(InputError, match="bit"):
        flip_sites(np.zeros(1, np.int8), np.array([0]), np.array([bit]))


@pytest.mark.parametrize("offset", [-1, 2])
def test_offset_outside_of_the_tensor_is_refused(offset: int) -> None:
    with pytest.raises(InputError, match=r"\[0, 2\)"):
        flip_sites(np.zeros(2, np.int8), np.array([offset]), np.array([0]))


def test_offsets_and_bits_must_pair_up() -> None:
    with pytest.raises(InputError, match="2 offsets given for 1 bits"):
        flip_sites(np.zeros(2, np.int8), np.array([0, 1]), np.array([0]))
