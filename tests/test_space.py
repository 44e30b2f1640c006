"""The fault space: every stored weight bit of any quantized file once, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import models
from resq_deploy.errors import InputError, UnsupportedModel
from resq_deploy.inject.discovery import discover, inspect
from resq_deploy.inject.space import Space, Tensor
from resq_deploy.records import Site


def found(raw: bytes):
    return discover(onnx.load_model_from_string(raw))


@pytest.mark.parametrize("name", models.ALL)
def test_all_weights_and_only_weights_are_found_in_network_order(name: str) -> None:
    model = onnx.load_model_from_string(models.quantized(name))
    space = discover(model).space
    matmul = "matmul" in name
    shapes = [(36, 5), (5, 4)] if matmul else [(4, 1, 3, 3), (4, 4, 3, 3), (4, 4)]
    assert [tensor.shape for tensor in space.tensors] == shapes
    assert space.n_bits == 8 * sum(int(np.prod(shape)) for shape in shapes)
    assert not any(tensor.absorbed for tensor in space.tensors)


@pytest.mark.parametrize(
    "name, consumers",
    [
        # behind DequantizeLinear: the operator that computes
        ("qdq-channel", ["Conv", "Conv", "Gemm"]),
        ("qdq-constants", ["Conv", "Conv", "Gemm"]),
        ("qoperator", ["QLinearConv", "QLinearConv", "QGemm"]),
        ("qoperator-matmul", ["QLinearMatMul", "QLinearMatMul"]),
        ("dynamic", ["ConvInteger", "ConvInteger", "MatMulInteger"]),
        ("fused-matmul", ["MatMulIntegerToFloat", "DynamicQuantizeMatMul"]),
    ],
)
def test_consumers(name: str, consumers: list[str]) -> None:
    assert [t.op_type for t in found(models.quantized(name)).space.tensors] == consumers


def test_order_is_the_networks_even_where_weights_are_dequantized_in_reverse_order() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    expected = [tensor.name for tensor in discover(model).space.tensors]
    nodes = list(model.graph.node)
    weights = [n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in expected]
    rest = [n for n in nodes if n not in weights]
    del model.graph.node[:]
    model.graph.node.extend(weights[::-1] + rest)  # as converters of TFLite files write them
    assert [tensor.name for tensor in discover(model).space.tensors] == expected


def test_a_shared_weight_stands_once_at_its_first_consumer() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    scales = ["w1_scale", "w1_zero_point"]
    node = helper.make_node("DequantizeLinear", ["w1_quantized", *scales], ["late"], "late")
    model.graph.node.append(node)
    model.graph.node.insert(0, helper.make_node("Neg", ["late"], ["n"], "early"))
    first = discover(model).space.tensors
    assert [tensor.node for tensor in first] == ["early", "conv2", "fc"]
    del model.graph.node[0]
    assert [tensor.node for tensor in discover(model).space.tensors] == ["conv1", "conv2", "fc"]


def test_biases_are_listed_but_not_in_the_space() -> None:
    shapes = [row["shape"] for row in found(models.quantized("qdq-tensor")).excluded]
    assert sorted(shapes) == [[4], [4], [4]]


def _through(op_type: str, *, attributes: dict | None = None, extra: dict | None = None) -> bytes:
    """A node of `op_type` between the first weight and its DequantizeLinear."""
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    for reader in model.graph.node:
        if reader.op_type == "DequantizeLinear" and reader.input[0] == "w1_quantized":
            reader.input[0] = "between"
    extra = extra or {}
    node = helper.make_node(op_type, ["w1_quantized", *extra], ["between"], **(attributes or {}))
    model.graph.node.insert(0, node)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in extra.items())
    return model.SerializeToString()


def test_a_clip_behind_a_weight_is_followed_and_reported() -> None:
    limits = {"low": np.int8(-127), "high": np.int8(127)}
    extra = {name: np.asarray(value) for name, value in limits.items()}
    discovery = found(_through("Clip", extra=extra))
    assert [tensor.absorbed for tensor in discovery.space.tensors] == [True, False, False]
    assert any("Clip" in warning for warning in discovery.warnings)


def test_a_change_of_layout_is_followed() -> None:
    discovery = found(_through("Transpose", attributes={"perm": [0, 1, 2, 3]}))
    assert discovery.space.tensors[0].op_type == "Conv"
    assert discovery.warnings == []


def test_a_decoder_of_constants_is_followed() -> None:
    """The fault space has what is stored, neither the table nor the mask of its decoder."""
    extra = {"mask": np.array(63, np.int8), "table": np.arange(256).astype(np.int8)}
    model = onnx.load_model_from_string(_through("BitwiseAnd", extra={"mask": extra["mask"]}))
    lookup = helper.make_node("Gather", ["table", "index"], ["between"])
    cast = helper.make_node("Cast", ["masked"], ["index"], to=TensorProto.INT32)
    model.graph.node[0].output[0] = "masked"
    model.graph.node.insert(1, cast)
    model.graph.node.insert(2, lookup)
    model.graph.initializer.append(numpy_helper.from_array(extra["table"], "table"))
    discovery = discover(model)
    plain = found(models.quantized("qdq-tensor")).space.tensors
    assert discovery.space.tensors == plain
    assert discovery.decoders.read == {"w1_quantized": ("between",)}
    assert discovery.decoders.tables == {"mask", "table"}
    assert any("2 tables of decoders (first: mask)" in w for w in discovery.warnings)


def test_an_unknown_reader_is_refused_by_name() -> None:
    model = onnx.load_model_from_string(_through("Identity"))
    model.graph.node[0].CopyFrom(
        helper.make_node("BitwiseXor", ["w1_quantized", "changing"], ["between"])
    )
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["changing"], to=TensorProto.INT8))
    with pytest.raises(UnsupportedModel, match=r"'w1_quantized' goes to input 0 of BitwiseXor"):
        discover(model)


def test_what_a_decoder_reads_must_go_to_a_known_operator() -> None:
    model = onnx.load_model_from_string(_through("BitwiseNot"))
    model.graph.node.append(helper.make_node("Mod", ["between", "changing"], ["rest"]))
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["changing"], to=TensorProto.INT8))
    with pytest.raises(UnsupportedModel, match=r"'w1_quantized' goes to input 0 of Mod"):
        discover(model)


def test_a_float_model_is_refused_and_its_weights_counted() -> None:
    with pytest.raises(UnsupportedModel, match=r"no 8-bit or 4-bit weights \(3 float weights"):
        discover(models.float_resnet())


def test_float_weights_beside_quantized_ones_are_reported() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    for node in model.graph.node:
        if node.name == "fc":
            node.input[1] = "plain"
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "plain"))
    assert any("1 float weights (first: plain)" in w for w in discover(model).warnings)


@pytest.mark.parametrize("kind", ["INT2", "INT16", "UINT16"])
def test_other_integer_weights_are_refused_by_name(kind: str) -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    weight = next(t for t in model.graph.initializer if t.name == "w3_quantized")
    data_type = TensorProto.DataType.Value(kind)
    weight.CopyFrom(helper.make_tensor("w3_quantized", data_type, [4, 4], [1] * 16))
    with pytest.raises(UnsupportedModel, match=f"'w3_quantized'.* has the type {kind.lower()}"):
        discover(model)


def test_weights_in_subgraphs_are_refused_by_name() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    hidden = numpy_helper.from_array(np.ones(2, np.int8), "hidden")
    info = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])
    node = helper.make_node("DequantizeLinear", ["hidden", "w1_scale"], ["out"])
    branch = helper.make_graph([node], "branch", [], [info], [hidden])
    model.graph.node.append(
        helper.make_node("If", ["c"], ["o"], "choice", then_branch=branch, else_branch=branch)
    )
    with pytest.raises(UnsupportedModel, match="'hidden' is used in the subgraph of If choice"):
        discover(model)


def test_int32_data_storage_is_read_like_raw_data() -> None:
    """Tensor data may stand in the int32_data field; a flip must reach it there too."""
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    weight = next(t for t in model.graph.initializer if t.name == "w1_quantized")
    codes = numpy_helper.to_array(weight)
    weight.CopyFrom(
        helper.make_tensor("w1_quantized", TensorProto.INT8, codes.shape, codes.ravel().tolist())
    )
    assert not weight.raw_data
    discover(model)
    assert weight.raw_data == codes.tobytes()
    assert not weight.int32_data


SPACE = Space(
    tensors=tuple(
        Tensor(name=n, dtype="int8", shape=s, op_type="Conv", node=n, absorbed=False)
        for n, s in [("a", (3,)), ("empty", (0,)), ("b", (2, 2)), ("scalar", ())]
    )
)


def test_flat_numbering_visits_every_bit_once_in_order() -> None:
    sites = SPACE.sites(np.arange(SPACE.n_bits))
    assert SPACE.n_bits == 8 * (3 + 4 + 1)
    assert len(set(sites)) == SPACE.n_bits
    assert sites[0] == Site(tensor="a", offset=0, bit=0)
    assert sites[25] == Site(tensor="b", offset=0, bit=1)  # behind 24 bits of a
    assert sites[-1] == Site(tensor="scalar", offset=0, bit=7)
    assert [SPACE.flat(site) for site in sites] == list(range(SPACE.n_bits))


@settings(deadline=None)
@given(st.lists(st.integers(0, SPACE.n_bits - 1), unique=True))
def test_split_and_flat_are_inverse(flat: list[int]) -> None:
    sites = SPACE.sites(np.array(flat, np.int64))
    assert [SPACE.flat(site) for site in sites] == sorted(flat)


@pytest.mark.parametrize("flat", [-1, SPACE.n_bits])
def test_bits_outside_are_refused(flat: int) -> None:
    with pytest.raises(InputError, match="outside"):
        SPACE.split(np.array([flat]))


@pytest.mark.parametrize(
    "site, message",
    [
        (Site(tensor="c", offset=0, bit=0), "no tensor 'c'"),
        (Site(tensor="a", offset=3, bit=0), "offset 3"),
        (Site(tensor="a", offset=0, bit=8), "bit 8"),
    ],
)
def test_sites_that_the_file_does_not_have_are_refused(site: Site, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPACE.flat(site)


def test_json_round_trip() -> None:
    assert Space.from_json(json.loads(json.dumps(SPACE.to_json()))) == SPACE


def test_inspect_names_tensors_bits_and_kernels() -> None:
    shown = inspect(models.quantized("qdq-channel"))
    assert (shown["n_tensors"], shown["n_bytes"], shown["n_bits"]) == (3, 196, 1568)
    assert shown["kernels"]["QLinearConv"] == 2


# --------------------------------------------------------------------------- other targets

# file: names of biases, scales and zero points; onnxruntime.quantization names them so
ROLES = {
    "qdq-channel": {
        "bias": ["b1_quantized", "b2_quantized", "b3_quantized"],
        "scale": ["x_scale", "w1_scale", "b1_quantized_scale", "w2_scale", "w3_scale"],
        "zero-point": ["x_zero_point", "w1_zero_point", "b1_quantized_zero_point"],
    },
    "qoperator": {
        "bias": ["b1_quantized", "b2_quantized", "b3_quantized"],
        "scale": ["x_scale", "w1_scale", "c1_scale", "logits_scale"],
        "zero-point": ["x_zero_point", "w1_zero_point", "logits_zero_point"],
    },
    "dynamic-matmul": {"scale": ["m1_scale", "m2_scale"], "zero-point": ["m1_zero_point"]},
    "fused-matmul": {"scale": ["s"], "zero-point": ["zero"]},
}


@pytest.mark.parametrize("target", ["bias", "scale", "zero-point"])
@pytest.mark.parametrize("name", ROLES)
def test_other_targets_are_found_by_name(name: str, target: str) -> None:
    model = onnx.load_model_from_string(models.quantized(name))
    if target not in ROLES[name]:
        with pytest.raises(UnsupportedModel, match=f"stores no {target}"):
            discover(model, [target])
        return
    space = discover(model, [target]).space
    assert set(ROLES[name][target]) <= {t.name for t in space.tensors}
    assert {t.target for t in space.tensors} == {target}
    kinds = {"bias": {"int32"}, "scale": {"float32"}, "zero-point": {"int8", "uint8", "int32"}}
    assert {t.dtype for t in space.tensors} <= kinds[target]
    assert not {"limit", "w1_quantized"} & {t.name for t in space.tensors}


def test_several_targets_stand_in_the_order_of_the_network() -> None:
    targets = ["weight", "bias", "scale"]
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    tensors = discover(model, targets).space.tensors
    at = {tensor.name: i for i, tensor in enumerate(tensors)}
    assert max(at[n] for n in ("w1_quantized", "b1_quantized", "w1_scale")) < at["w2_quantized"]
    assert at["b2_quantized"] < at["w3_quantized"]
    # the default space stays what it was, bit for bit
    alone = discover(onnx.load_model_from_string(models.quantized("qdq-channel"))).space
    assert [t for t in tensors if t.target == "weight"] == list(alone.tensors)


@pytest.mark.parametrize("targets", [[], ["weights"], ["bias", "bias"]])
def test_unknown_targets_are_refused(targets: list[str]) -> None:
    with pytest.raises(InputError, match="expected some of weight, bias, scale, zero-point"):
        discover(onnx.load_model_from_string(models.quantized("qdq-channel")), targets)


def test_scales_in_constant_nodes_become_initializers() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    scale = next(t for t in model.graph.initializer if t.name == "x_scale")
    value = float(numpy_helper.to_array(scale))
    model.graph.initializer.remove(scale)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["x_scale"], value_float=value))
    tensors = {t.name: t for t in discover(model, ["scale"]).space.tensors}
    assert tensors["x_scale"].shape == ()
    stored = next(t for t in model.graph.initializer if t.name == "x_scale")
    assert np.frombuffer(stored.raw_data, np.float32) == np.float32(value)


@pytest.mark.parametrize(
    "name, axes",
    [
        ("qdq-channel", [0, 0, 0]),  # Gemm with transB = 1
        ("qoperator", [0, 0, 0]),
        ("qdq-matmul", [1, 1]),
        ("dynamic-matmul", [1, 1]),
        ("fused-matmul", [1, 1]),
    ],
)
def test_axes_of_output_channels(name: str, axes: list[int]) -> None:
    assert [t.axis for t in found(models.quantized(name)).space.tensors] == axes


def test_the_axis_is_followed_through_transposes_and_lost_in_other_changes() -> None:
    transposed = found(_through("Transpose", attributes={"perm": [1, 2, 3, 0]})).space.tensors[0]
    assert transposed.axis == 1  # axis 0 of the convolution is axis 1 of the file
    shape = {"shape": np.array([4, 1, 3, 3])}
    assert found(_through("Reshape", extra=shape)).space.tensors[0].axis is None


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
def test_packed_weights_hold_two_codes_a_byte_low_nibble_first(kind: str) -> None:
    codes = np.array([1, -2, 3, 7, -8] if kind == "INT4" else [1, 14, 3, 7, 8])
    model = onnx.load_model_from_string(models.quantized("qdq-tensor"))
    weight = next(t for t in model.graph.initializer if t.name == "w3_quantized")
    values = np.resize(codes, 16)
    weight.CopyFrom(
        helper.make_tensor("w3_quantized", TensorProto.DataType.Value(kind), [4, 4], values)
    )
    tensor = discover(model).space.tensors[-1]
    assert (tensor.dtype, tensor.n_bits, tensor.n_bytes) == (kind.lower(), 64, 8)
    nibbles = [int(v) & 15 for v in values]
    expected = bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))
    assert weight.raw_data == expected
