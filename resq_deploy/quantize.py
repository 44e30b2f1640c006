"""What quantizing is: scale, round half to even, saturate (ONNX QuantizeLinear).

numpy only. The Brevitas networks, stage 3 and the exporter are tested against it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError

Array = NDArray[Any]


def _along(values: Any, axis: int | None, ndim: int) -> Array:
    array: Array = np.asarray(values)
    if axis is None or array.ndim == 0:
        return array
    shape = [1] * ndim
    shape[axis] = -1
    return array.reshape(shape)


def quantize(
    x: Array, scale: Any, zero_point: Any = 0, *, dtype: Any = np.int8, axis: int | None = None
) -> Array:
    """Integer codes of real values `x` (any shape): saturate(round(x / scale) + zero_point).

    `scale` > 0 and `zero_point` are scalars or, with `axis`, one per channel of that axis.
    Ties round to even; results saturate to the whole range of `dtype` (-128 included).

    >>> quantize(np.array([0.5, 1.5, -200.0]), 1.0)
    array([   0,    2, -128], dtype=int8)
    """
    x = np.asarray(x)
    # the scale in the type of x, as in the file: x / 0.1 in float64 rounds other ties
    real = x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64
    scale = _along(np.asarray(scale, real), axis, x.ndim)
    if not np.all(scale > 0):
        raise InputError(f"scale must be positive, got {float(np.min(scale))}")
    info = np.iinfo(dtype)
    q = np.rint(x / scale) + _along(zero_point, axis, x.ndim)
    return np.asarray(np.clip(q, info.min, info.max), dtype)


def dequantize(
    codes: Array, scale: Any, zero_point: Any = 0, *, axis: int | None = None
) -> NDArray[np.float32]:
    """Real values of integer codes: (code - zero_point) * scale, in float32."""
    codes = np.asarray(codes)
    shifted = codes.astype(np.int32) - _along(zero_point, axis, codes.ndim)
    return np.asarray(shifted * _along(np.asarray(scale, np.float32), axis, codes.ndim), np.float32)


def weight_scale(w: Array, *, axis: int | None = 0) -> NDArray[np.float32]:
    """Scale that maps max|w| to code 127: per channel of `axis`, or one scalar (axis=None).

    A channel of zeros gets the smallest normal float32, so that its codes are 0.
    """
    w = np.abs(np.asarray(w, np.float32))
    other = None if axis is None else tuple(i for i in range(w.ndim) if i != axis)
    top = np.max(w, axis=other)
    return np.asarray(np.maximum(top / np.float32(127), np.finfo(np.float32).tiny), np.float32)
