"""What a bit flip is: exclusive-or on the stored integer code, nothing else.

Bit 0 is the least significant bit; bit 7 of an int8 is its sign bit (two's
complement). Everything in the package that flips bits is tested against `flip`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError

Codes = NDArray[Any]


PACKED = {"int4": 4, "uint4": 4, "uint1": 1}
"""Bits of the types that share bytes; numpy does not have them."""


def width(dtype: Any) -> int:
    """Stored bits of one element of `dtype` (8 for int8, 32 for int32, 4 for "int4")."""
    packed = PACKED.get(dtype) if isinstance(dtype, str) else None
    return packed or int(np.dtype(dtype).itemsize) * 8


def from_nibbles(nibbles: Codes, dtype: str) -> Codes:
    """The codes that 4-bit patterns (uint8, 0 to 15) stand for, as int8 or uint8.

    >>> from_nibbles(np.array([7, 8, 15], np.uint8), "int4")
    array([ 7, -8, -1], dtype=int8)
    """
    return nibbles if dtype == "uint4" else ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)


def unpack(raw: Codes, size: int, dtype: str) -> Codes:
    """The first `size` int4 or uint4 codes of packed bytes, low nibble first, as ONNX stores them.

    >>> unpack(np.array([0x8F, 0x07], np.uint8), 3, "int4")
    array([-1, -8,  7], dtype=int8)
    """
    nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:size]
    return from_nibbles(nibbles, dtype)


def pack(codes: Codes) -> Codes:
    """int4 or uint4 codes (int8 or uint8) as packed bytes; the inverse of `unpack`.

    >>> pack(np.array([-1, -8, 7], np.int8)).tolist() == [0x8F, 0x07]
    True
    """
    nibbles = codes.astype(np.uint8) & 15
    nibbles = np.concatenate([nibbles, np.zeros(nibbles.size % 2, np.uint8)])
    return np.asarray(nibbles[0::2] | (nibbles[1::2] << 4))


def _unsigned(codes: Codes) -> Codes:
    return codes.view(np.dtype(f"u{codes.dtype.itemsize}"))


def flip(codes: Codes, *, bit: int) -> Codes:
    """Flip one bit of every element; any shape, returns a new array of the same dtype.

    >>> flip(np.array([1, -1, 0], dtype=np.int8), bit=7)
    array([-127,  127, -128], dtype=int8)
    """
    codes = np.asarray(codes, order="C")  # not ascontiguousarray, which makes scalars 1-d
    if not 0 <= bit < width(codes.dtype):
        raise InputError(
            f"bit {bit} given for {codes.dtype}; expected 0 to {width(codes.dtype) - 1}"
        )
    raw = _unsigned(codes)
    return np.asarray(raw ^ raw.dtype.type(1 << bit)).view(codes.dtype)


def flip_sites(codes: Codes, offsets: NDArray[np.int64], bits: NDArray[np.int64]) -> Codes:
    """Flip `bits[i]` of element `offsets[i]` (C order, from 0) for every i.

    Offsets may repeat; the same (offset, bit) given twice restores itself. Applied twice,
    a pattern restores the codes. Returns a new array of the same shape and dtype.

    >>> flip_sites(np.array([1, 2], dtype=np.int8), np.array([0, 0]), np.array([1, 2]))
    array([7, 2], dtype=int8)
    """
    out = np.array(codes, order="C", copy=True)
    offsets, bits = np.asarray(offsets, np.int64), np.asarray(bits, np.int64)
    if offsets.shape != bits.shape:
        raise InputError(f"{offsets.size} offsets given for {bits.size} bits; expected one each")
    if offsets.size == 0:
        return out
    if offsets.min() < 0 or offsets.max() >= out.size:
        raise InputError(f"offset outside of [0, {out.size}) given")
    if bits.min() < 0 or bits.max() >= width(out.dtype):
        raise InputError(f"bit outside of [0, {width(out.dtype)}) given for {out.dtype}")
    raw = _unsigned(out).reshape(-1)
    np.bitwise_xor.at(raw, offsets, np.left_shift(1, bits).astype(raw.dtype))
    return out


def count_flips(before: Codes, after: Codes) -> int:
    """Number of bits in which two arrays of the same shape and dtype differ."""
    changed = _unsigned(np.asarray(before, order="C")) ^ _unsigned(np.asarray(after, order="C"))
    return int(np.bitwise_count(changed).sum())


def random_positions(n_bits: int, rate: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Flat positions in [0, n_bits) of independent bit errors at `rate` in [0, 1], ascending.

    Draws the gaps between errors, which are geometric: exactly one Bernoulli trial per bit,
    with time and memory proportional to the number of errors instead of bits.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"bit error rate must lie in [0, 1], got {rate}")
    found: list[NDArray[np.int64]] = []
    last = -1
    while rate > 0 and last < n_bits:
        expected = (n_bits - last) * rate
        gaps = rng.geometric(rate, size=int(expected + 4 * expected**0.5 + 8))
        # A gap beyond the end is as good as infinite; the bound keeps the sum from overflowing.
        positions = last + np.cumsum(np.minimum(gaps, n_bits + 1))
        found.append(positions[positions < n_bits])
        last = int(positions[-1])
    return np.concatenate(found) if found else np.empty(0, np.int64)
