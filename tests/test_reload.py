"""The reload engine and the runtime below it, against files patched by other means."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import models
from resq_deploy import metrics, runtime
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject.discovery import discover
from resq_deploy.inject.memory import Change, Memory
from resq_deploy.inject.reload import Reload
from resq_deploy.records import Site

# bits of different weight, in the first and in the last tensor
PATTERNS = [[(0, 7, 7)], [(0, 0, 0)], [(-1, 3, 6)], [(0, 5, 7), (0, 5, 6), (-1, 15, 7), (1, 2, 7)]]


def _patched(raw: bytes, sites: list[Site]) -> onnx.ModelProto:
    """The file with bits flipped in plain Python: code + or - 2^bit, no shared code."""
    model = onnx.load_model_from_string(raw)
    constants = [
        (n.output[0], n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    ]
    for name, tensor in [(t.name, t) for t in model.graph.initializer] + constants:
        codes = numpy_helper.to_array(tensor).copy()
        for site in sites:
            if site.tensor == name:
                stored = codes.reshape(-1)[site.offset : site.offset + 1].view(np.uint8)
                is_set = int(stored[0]) // 2**site.bit % 2
                stored[0] = int(stored[0]) + (-(2**site.bit) if is_set else 2**site.bit)
        tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    return model


def _sites(space, pattern) -> list[Site]:
    return [Site(tensor=space.tensors[t].name, offset=o, bit=b) for t, o, b in pattern]


def _change(found, sites) -> Change:
    return Memory.of(found).read(np.array([found.space.flat(s) for s in sites], np.int64))


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("pattern", PATTERNS, ids=len)
def test_equals_the_patched_file_bit_for_bit(name: str, pattern: list) -> None:
    raw, data = models.quantized(name), models.data()
    found = discover(onnx.load_model_from_string(raw))
    sites = _sites(found.space, pattern)
    output = Reload(found.model, found.space, data.x).run(_change(found, sites))
    options = ort.SessionOptions()
    if runtime.cpu_features()["x64quantprecision"]:  # other kernels, other rounding of floats
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(
        _patched(raw, sites).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    size = 5 if name == "qdq-batch-5" else len(data)
    x = data.x[: len(data) // size * size]
    expected = np.concatenate(
        [session.run(None, {"x": x[i : i + size]})[0] for i in range(0, len(x), size)]
    )
    assert output[: len(x)].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["qdq-channel", "qdq-matmul", "qoperator-matmul", "dynamic"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=len)
def test_agrees_with_the_onnx_reference(name: str, pattern: list) -> None:
    """onnx's own evaluator has no integer kernels, no fusion and no prepacking.

    It rounds the same reals in another order, so a quantized value may land one step away, which
    the layers behind may turn into two: the tolerance is two steps of the output.
    """
    raw, data = models.quantized(name), models.data()
    found = discover(onnx.load_model_from_string(raw))
    sites = _sites(found.space, pattern)
    output = Reload(found.model, found.space, data.x).run(_change(found, sites))
    model = _patched(raw, sites)
    domains = {o.domain for o in model.opset_import if o.domain not in ("", "ai.onnx")}
    assert not {n.domain for n in model.graph.node} & domains
    expected = ReferenceEvaluator(model).run(None, {"x": data.x})[0]
    step = np.ptp(expected) / 255
    assert np.abs(output - expected).max() <= 2.01 * step + 1e-5
    clean = ReferenceEvaluator(onnx.load_model_from_string(raw)).run(None, {"x": data.x})[0]
    if pattern == PATTERNS[0]:  # the fault itself is larger than the tolerance
        assert np.abs(clean - expected).max() > 4 * step


def test_no_flips_give_the_golden_run_and_a_pattern_leaves_no_trace() -> None:
    raw, data = models.quantized("qdq-constants"), models.data()
    session = runtime.session(raw)
    golden = runtime.run(session, runtime.adapt(data.x, session))
    found = discover(onnx.load_model_from_string(raw))
    engine = Reload(found.model, found.space, data.x)
    before = found.model.SerializeToString()
    assert not metrics.changed(golden, engine.run({})).any()
    assert metrics.changed(
        golden, engine.run(Memory.of(found).read(np.arange(found.space.n_bits)))
    ).any()
    assert found.model.SerializeToString() == before


def test_the_model_is_restored_when_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = discover(onnx.load_model_from_string(models.quantized("qdq-tensor")))
    before = found.model.SerializeToString()

    def fail(*args: object, **kwargs: object) -> None:
        raise InputError("no")

    monkeypatch.setattr(runtime, "session", fail)
    with pytest.raises(InputError):
        engine = Reload(found.model, found.space, models.data().x)
        engine.run(Memory.of(found).read(np.array([3])))
    assert found.model.SerializeToString() == before


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_do_not_change_outputs(chunk: int) -> None:
    session, x = runtime.session(models.quantized("qdq-channel")), models.data().x
    whole = runtime.run(session, x, chunk=len(x))
    assert runtime.run(session, x, chunk=chunk).tobytes() == whole.tobytes()


def test_a_fixed_batch_is_padded_and_cut() -> None:
    x = models.data(23).x
    fixed = runtime.run(runtime.session(models.quantized("qdq-batch-5")), x)
    free = runtime.run(runtime.session(models.quantized("qdq-channel")), x)
    assert fixed.shape == free.shape == (23, models.N_CLASSES)


def test_uint8_is_divided_by_255_for_a_float_input() -> None:
    session = runtime.session(models.quantized("qdq-channel"))
    pixels = models.data(dtype=np.uint8).x
    assert np.array_equal(runtime.adapt(pixels, session), pixels.astype(np.float32) / 255)
    floats = models.data().x
    assert runtime.adapt(floats, session) is floats


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 6, 6, 1), np.float32), np.zeros((2, 36), np.float32), np.zeros((2, 1, 6, 6))],
    ids=["layout", "rank", "float64"],
)
def test_other_inputs_are_refused_saying_both_shapes(x: np.ndarray) -> None:
    session = runtime.session(models.quantized("qdq-channel"))
    with pytest.raises(InputError, match=r"tensor\(float\) of shape \(N, 1, 6, 6\).*the data has"):
        runtime.adapt(x, session)


def _identity(kind: int) -> bytes:
    info = [helper.make_tensor_value_info(n, kind, ["N", 3]) for n in "xy"]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    opsets = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_int8_goes_into_an_int8_input_as_it_is() -> None:
    session = runtime.session(_identity(onnx.TensorProto.INT8))
    x = np.array([[-128, 0, 127]], np.int8)
    assert np.array_equal(runtime.run(session, runtime.adapt(x, session)), x)
    with pytest.raises(InputError, match="uint8 of shape"):
        runtime.adapt(x.astype(np.uint8), session)  # a wrong range, not only a wrong type


CPUINFO = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 {}\n\nprocessor : 1\n"


@pytest.mark.parametrize(
    "flags, machine, precise",
    [
        ("avx512f", "x86_64", True),
        ("avx512_vnni", "x86_64", False),
        ("avx_vnni", "x86_64", False),
        ("amx_int8", "x86_64", False),
        ("avx512_vnni_not", "x86_64", True),  # another flag that only begins alike
        ("", "aarch64", False),  # no such kernels there
    ],
)
def test_saturating_cpus_are_detected(flags: str, machine: str, precise: bool) -> None:
    cpu = runtime.cpu_features(CPUINFO.format(flags), machine)
    assert cpu["x64quantprecision"] is precise
    assert bool(runtime.cpu_warnings(cpu)) is precise
    assert cpu["name"] == "Some CPU"


def test_the_precise_mode_is_understood_by_onnxruntime() -> None:
    raw, x = models.quantized("qdq-channel"), models.data().x
    outputs = [runtime.run(runtime.session(raw, precise=p), x) for p in (False, True)]
    assert outputs[0].shape == outputs[1].shape
    options = runtime.build(models.quantized("qdq-channel"), precise=True).get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_models_in_parts_are_refused(tmp_path) -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    file = tmp_path / "parts.onnx"
    onnx.save(model, file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(InputError, match="external data"):
        runtime.read_model(file)


def test_labels_beyond_the_outputs_are_the_users_error(tmp_path) -> None:
    from resq_deploy.inject import inject

    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    data = models.data(4)
    wrong = Dataset(name="other", x=data.x, y=np.array([0, 1, 2, models.N_CLASSES]))
    with pytest.raises(InputError, match="labels up to 4, the model has 4 outputs"):
        inject(file, wrong, out=tmp_path / "s", trials=1)
