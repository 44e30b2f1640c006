"""The compiled loops of `fused`. Arrays are flat; bfloat16 comes as its bits, uint16.

Written so that they become vector code: one type, no branches, no sum across a whole array (the
one over a block may be taken in any order).
"""

from __future__ import annotations

import numpy as np
from numba import config, prange, set_num_threads, types
from numba.extending import overload

from resq_deploy.compiled import compiled

BLOCK = 1 << 14
"""Values whose sum is taken in float32; sums of blocks are added in float64, in their order."""


def _read(stored):
    """The float32 of a stored value."""


@overload(_read, inline="always")
def _(stored):
    if isinstance(stored, types.Float):
        return lambda stored: stored
    # The bits of a bfloat16 are the upper half of those of a float32.
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


def _round(value, like):
    """A float32 as it is stored beside `like`: as it is, or the bits of the next bfloat16."""


@overload(_round, inline="always")
def _(value, like):
    if isinstance(like, types.Float):
        return lambda value, like: value

    def to_bits(value, like):
        raw = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(raw >> np.uint32(16)) & np.uint32(1))  # ties go to even
        return np.uint16(np.uint32(np.uint32(raw + np.uint32(0x7FFF)) + odd) >> np.uint32(16))

    return to_bits


@compiled()
def _quantize_block(x, scale, low, high, out):
    for i in range(x.size):
        code = np.rint(_read(x[i]) / scale)
        code = low if code < low else (high if code > high else code)
        out[i] = _round(code * scale, x[i])


def _quantize(x, scale, low, high, out):
    """out = scale clamp(round(x / scale), low, high); NaN stays NaN."""
    for j in prange((x.size + BLOCK - 1) // BLOCK):
        at = slice(j * BLOCK, (j + 1) * BLOCK)
        _quantize_block(x[at], scale, low, high, out[at])


@compiled(fastmath={"reassoc"})
def _gradient_block(x, above, scale, low, high, out):
    total = np.float32(0)
    for i in range(x.size):
        steps = _read(x[i]) / scale
        code = np.rint(steps)
        kept = low if code < low else (high if code > high else code)
        inside = code == kept
        out[i] = above[i] if inside else out.dtype.type(0)
        total += _read(above[i]) * (kept - (steps if inside else np.float32(0)))
    return total


def _gradient(x, above, scale, low, high, out):
    """Of quantizing, where `above` is that of its result: that of x into `out`, that of the scale
    is returned. Straight through the rounding, 0 for x where the code saturates."""
    n = (x.size + BLOCK - 1) // BLOCK
    sums = np.empty(n, np.float64)
    for j in prange(n):
        at = slice(j * BLOCK, (j + 1) * BLOCK)
        sums[j] = _gradient_block(x[at], above[at], scale, low, high, out[at])
    return sums.sum()


def threads(n):
    """The loops (quantize, gradient) for n threads. Idle ones would wait for work and keep a core
    busy, so that one thread has loops of its own; the values are the same."""
    if n == 1:
        return _SERIAL
    set_num_threads(min(n, config.NUMBA_NUM_THREADS))
    return _PARALLEL


_SERIAL = compiled()(_quantize), compiled()(_gradient)
_PARALLEL = compiled(parallel=True)(_quantize), compiled(parallel=True)(_gradient)
