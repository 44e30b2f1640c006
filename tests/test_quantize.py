"""Quantizing against ONNX's own reference implementation, ties and saturation included."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator

from resq_deploy.errors import InputError
from resq_deploy.quantize import dequantize, quantize, weight_scale

KINDS = {np.int8: onnx.TensorProto.INT8, np.uint8: onnx.TensorProto.UINT8}


def reference(op: str, x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    """One QuantizeLinear or DequantizeLinear node, run by onnx.reference."""
    code = KINDS[zero.dtype.type]
    types = {"QuantizeLinear": (onnx.TensorProto.FLOAT, code)}.get(
        op, (code, onnx.TensorProto.FLOAT)
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ["x", "s", "z"], ["y"], axis=axis)],
        "one",
        [
            value("x", types[0], None),
            value("s", onnx.TensorProto.FLOAT, None),
            value("z", code, None),
        ],
        [value("y", types[1], None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x, "s": scale, "z": zero})[0])


def test_ties_go_to_the_even_code_and_values_saturate() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -128.5, -129.0, -1e9])
    assert quantize(x, 1.0).tolist() == [0, 2, 2, 0, -2, -2, 126, 127, 127, -128, -128, -128]
    assert quantize(x, 1.0, dtype=np.uint8).tolist() == [0, 2, 2, 0, 0, 0, 126, 128, 255, 0, 0, 0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 255, 0.0117])
def test_equals_onnx_on_ties_and_extremes(dtype: type, scale: float) -> None:
    s = np.float32(scale)
    x = (np.arange(-700, 701, dtype=np.float32) / 2) * s  # every half step, 1.3 ranges wide
    # far out, but within the int32 that the reference goes through
    x = np.concatenate([x, np.float32([1e6, -1e6]) * s])
    for zero in (0, 3) if dtype is np.int8 else (0, 128):
        z = np.array(zero, dtype)
        expected = reference("QuantizeLinear", x, np.array(s), z, 0)
        np.testing.assert_array_equal(quantize(x, s, zero, dtype=dtype), expected)


@settings(max_examples=50)
@given(
    hnp.arrays(np.float32, (3, 2, 4), elements=st.floats(-1e4, 1e4, width=32)),
    hnp.arrays(np.float32, 3, elements=st.floats(2**-10, 64, width=32)),
)
def test_per_channel_equals_onnx(x: np.ndarray, scale: np.ndarray) -> None:
    zero = np.zeros(3, np.int8)
    codes = quantize(x, scale, axis=0)
    np.testing.assert_array_equal(codes, reference("QuantizeLinear", x, scale, zero, 0))
    back = dequantize(codes, scale, axis=0)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, reference("DequantizeLinear", codes, scale, zero, 0))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_selects_the_channels(axis: int) -> None:
    x = np.full((2, 3, 4), 8.0, np.float32)
    scale = np.float32([1, 2, 4, 8][: x.shape[axis]])
    codes = np.moveaxis(quantize(x, scale, axis=axis), axis, 0)
    assert [set(c.reshape(-1).tolist()) for c in codes] == [{8}, {4}, {2}, {1}][: x.shape[axis]]


@given(hnp.arrays(np.int8, hnp.array_shapes()), st.floats(2**-20, 2**20, width=32))
def test_codes_survive_a_round_trip(codes: np.ndarray, scale: float) -> None:
    np.testing.assert_array_equal(quantize(dequantize(codes, scale), np.float32(scale)), codes)


def test_a_plain_number_as_scale_is_the_float32_that_a_file_stores() -> None:
    scale = 1 / 255
    x = (np.arange(-512, 513, dtype=np.float32) / 2) * np.float32(scale)  # ties in float32
    np.testing.assert_array_equal(quantize(x, scale), quantize(x, np.float32(scale)))


def test_zero_point_shifts() -> None:
    assert quantize(np.array([-1.0, 0.0, 1.0]), 0.5, 128, dtype=np.uint8).tolist() == [
        126,
        128,
        130,
    ]
    assert dequantize(np.array([126, 128, 130], np.uint8), 0.5, 128).tolist() == [-1, 0, 1]


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(-1e6, 1e6, width=32)))
def test_weight_scale_maps_the_largest_weight_of_each_channel_to_127(w: np.ndarray) -> None:
    scale = weight_scale(w)
    assert scale.shape == (4,) and scale.dtype == np.float32
    codes = quantize(w, scale, axis=0).astype(int)
    top = np.abs(codes).max(axis=1)
    # a channel that is zero, or so small that its scale would not be a normal number, is free
    usual = np.abs(w).max(axis=1) / np.float32(127) >= np.finfo(np.float32).tiny
    assert (top[usual] == 127).all() and (codes >= -127).all()


def test_weight_scale_of_one_tensor_and_of_a_zero_channel() -> None:
    w = np.float32([[0, 0], [127, -254]])
    assert weight_scale(w, axis=None).shape == () and float(weight_scale(w, axis=None)) == 2.0
    scale = weight_scale(w)
    assert scale[1] == 2.0 and quantize(w, scale, axis=0).tolist() == [[0, 0], [64, -127]]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.float32("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match="scale must be positive"):
        quantize(np.zeros(2), scale)
