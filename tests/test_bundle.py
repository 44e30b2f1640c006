"""The bundle of an export: what a build system finds, rebuilds, verifies and links."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny import write_recipe

from resq_deploy import artifacts, encoding, memory_map, quantize, recipe, runtime
from resq_deploy.cli import main
from resq_deploy.data import load_test
from resq_deploy.errors import InputError
from resq_deploy.export import (
    QDQ,
    QONNX,
    bundle,
    c_arrays,
    c_decoder,
    decoders,
    export,
    golden,
    manifest,
)
from resq_deploy.nets import build, checkpoint
from resq_deploy.nets.quantized import calibrate, codes, weight_layers
from resq_deploy.nets.quantized import quantize as quantized

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "firmware"
IMAGES = 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoint.safetensors (ResNet-8, random weights) and its bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    tiny = recipe.load(write_recipe(folder, export={"parity_images": IMAGES}))
    arguments: dict[str, Any] = {
        "name": "resnet8", "n_classes": 10, "in_channels": 1, "width": 0.5, "seed": 1,
    }  # fmt: skip
    net, test = quantized(build(**arguments)), load_test("digits", None)
    calibrate(net, torch.from_numpy(test.x[:64].astype(np.float32) / 255))
    checkpoint.save(
        folder / "checkpoint.safetensors", net.eval(), inputs={}, quantized=True, net=arguments,
        stage="fault", recipe=tiny.portable(),
    )  # fmt: skip
    export(folder / "checkpoint.safetensors", out=folder / "out", images=test, config=tiny.export)
    return folder


@pytest.fixture(scope="module")
def out(work: Path) -> Path:
    return work / "out"


@pytest.fixture(scope="module")
def model(out: Path) -> onnx.ModelProto:
    return onnx.load(out / QDQ)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --------------------------------------------------------------------------- files and manifest


def test_every_file_has_its_digest(out: Path) -> None:
    made = read(out / "manifest.json")
    names = {path.name for path in out.iterdir()}
    assert set(made["files"]) == names - {"manifest.json", "SHA256SUMS"}
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == names - {"SHA256SUMS"}
    for name in sums:
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sums[name]
        assert made["files"].get(name, sums[name]) == sums[name]


def test_the_manifest_follows_its_published_schema(out: Path) -> None:
    published = read(ROOT / "docs" / "manifest.schema.json")
    assert published == manifest.schema() == read(out / "manifest.schema.json"), (
        "the schema has changed: write manifest.schema() to docs/manifest.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(published)
    made = read(out / "manifest.json")
    jsonschema.validate(made, published)
    for change in ({"profile": "other"}, {"surplus": 1}, {"recipe_sha256": "short"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(made | change, published)


def test_the_manifest_says_what_was_made_and_from_what(work: Path, out: Path) -> None:
    made = read(out / "manifest.json")
    facts = read(work / "checkpoint.json")
    assert made["inputs"]["checkpoint_sha256"] == facts["sha256"]
    assert made["recipe_sha256"] == artifacts.digest(facts["recipe"])
    assert list(made["hardening"]) == ["attack", "fault"]
    assert made["profile"] == "float-channel"
    assert made["accuracy"]["n_total"] == IMAGES
    assert made["memory"]["n_bytes"] == (out / "weights.bin").stat().st_size
    assert made["golden"]["n_vectors"] == golden.VECTORS
    for stage, sections in (("baseline", []), ("adjust", ["attack", "fault", "adjust"])):
        assert list(manifest.hardening(stage, facts["recipe"])) == sections


def test_the_bill_of_materials_names_files_and_tools_and_repeats(out: Path) -> None:
    bill, made = read(out / "sbom.cdx.json"), read(out / "manifest.json")
    assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] == "1.6"
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    assert "timestamp" not in bill["metadata"]
    files = {c["name"]: c["hashes"] for c in bill["components"] if c["type"] == "file"}
    for name, hashes in files.items():
        assert hashes == [{"alg": "SHA-256", "content": made["files"][name]}]
    assert set(files) >= {QDQ, QONNX, "weights.bin", "weights.c"}
    libraries = {c["name"]: c["version"] for c in bill["components"] if c["type"] == "library"}
    assert libraries["onnx"] == made["versions"]["onnx"]
    refs = [c["bom-ref"] for c in [*bill["components"], bill["metadata"]["component"]]]
    assert len(refs) == len(set(refs))
    assert set(bill["dependencies"][0]["dependsOn"]) <= set(refs)


def test_the_model_card_has_the_counts(out: Path) -> None:
    card, made = (out / "MODEL_CARD.md").read_text(), read(out / "manifest.json")
    assert f"{made['accuracy']['n_correct']} of {IMAGES} images" in card
    assert made["inputs"]["checkpoint_sha256"] in card
    assert re.search(r"^- `fault`: .*\bepochs = 2\b", card, re.M)


# --------------------------------------------------------------------------- codes


def test_the_codes_are_those_of_the_network(work: Path, out: Path, model: onnx.ModelProto) -> None:
    net, _ = checkpoint.load(work / "checkpoint.safetensors")
    digest = artifacts.sha256(out / QDQ)
    mapped = memory_map.read(out / "memory_map.json", model_sha256=digest)
    image = (out / "weights.bin").read_bytes()
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for tensor in mapped.tensors:
        raw = image[tensor.address : tensor.address + tensor.bytes]
        found[tensor.name] = np.frombuffer(raw, tensor.dtype).reshape(tensor.shape)
        assert np.array_equal(found[tensor.name], stored[tensor.name])
        assert np.array_equal(tensor.scale, stored[f"{tensor.name}_scale"].reshape(-1))
    expected = {
        f"{name}.weight": codes(layer).numpy() for name, layer in weight_layers(net).items()
    }
    assert {t.name for t in mapped.tensors if t.target == "weight"} == set(expected)
    assert {t.name for t in mapped.tensors if t.target == "bias"} == {
        name.replace(".weight", ".bias") for name in expected
    }
    for name, values in expected.items():
        assert np.array_equal(found[name], values)


def attached(
    model: onnx.ModelProto, how: encoding.Encoding
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """`model` with its weights at half their size stored in an encoding, and their levels."""
    encoded = onnx.ModelProto()
    encoded.CopyFrom(model)
    levels = {
        t.name: how.nearest(numpy_helper.to_array(t) / 2)
        for t in model.graph.initializer
        if t.name.endswith(".weight")
    }
    decoders.attach(encoded, how, levels)
    return encoded, levels


@pytest.mark.parametrize("name", ["parity:expected", "secded"])
def test_the_map_of_encoded_weights_is_that_of_what_is_stored(
    model: onnx.ModelProto, name: str
) -> None:
    how = encoding.parse(name)
    encoded, levels = attached(model, how)
    mapped, image = memory_map.of(encoded, name="m", sha256="", encoding=name)
    plain, _ = memory_map.of(model, name="m", sha256="")
    assert mapped.encoding == name and len(mapped.tensors) == len(plain.tensors)
    for tensor, other in zip(mapped.tensors, plain.tensors, strict=True):
        assert (tensor.name, tensor.address, tensor.layout) == (
            other.name, other.address, other.layout,
        )  # fmt: skip
        if tensor.target == "weight":
            raw = image[tensor.address : tensor.address + tensor.bytes]
            expected = how.encode(levels[tensor.name])
            assert np.array_equal(np.frombuffer(raw, np.int8), expected.reshape(-1))


# --------------------------------------------------------------------------- golden vectors


@pytest.fixture(scope="module")
def vectors(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "golden.npz") as archive:
        return dict(archive)


def test_clients_give_the_golden_outputs(
    out: Path, model: onnx.ModelProto, vectors: dict[str, np.ndarray]
) -> None:
    made = read(out / "manifest.json")["golden"]
    outputs = {}
    for level in runtime.LEVELS:
        session = runtime.session(model.SerializeToString(), level=level)
        outputs[level] = runtime.run(session, runtime.adapt(vectors["x"], session))
    assert np.array_equal(outputs["all"], vectors["outputs"])
    few = vectors["x"][:4].astype(np.float32) / np.float32(255)
    outputs["reference"] = ReferenceEvaluator(model).run(None, {"input": few})[0]
    for output in outputs.values():
        steps = np.abs(output - vectors["outputs"][: len(output)]) / vectors["scale"]
        assert np.rint(steps).max() <= made["tolerance_steps"]["onnxruntime"]
    exact = (vectors["codes"].astype(np.int32) - vectors["zero_point"]) * vectors["scale"]
    assert np.array_equal(exact.astype(np.float32), vectors["outputs"])


def test_the_vectors_saturate_and_the_manifest_counts_it(
    out: Path, model: onnx.ModelProto, vectors: dict[str, np.ndarray]
) -> None:
    """Counted again with what the QuantizeLinear nodes of the file write: the limits of uint8."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    written = [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in written)
    session = runtime.build(probe.SerializeToString(), level="off")
    found = session.run(written, {"input": vectors["x"].astype(np.float32) / np.float32(255)})
    made = read(out / "manifest.json")["golden"]
    assert made["n_quantizers"] == len(written)
    assert 0 < made["quantizers_with"]["saturated_high"] <= sum((v == 255).any() for v in found)
    assert 0 < made["quantizers_with"]["saturated_low"] <= sum((v == 0).any() for v in found)


def _quantize_linear(scale: np.float32, zero: np.uint8) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, ["n"])],
        [numpy_helper.from_array(np.asarray(scale), "s"), numpy_helper.from_array(zero, "z")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def test_the_table_of_roundings_has_ties_and_saturation_and_is_what_onnx_does(
    out: Path, vectors: dict[str, np.ndarray]
) -> None:
    value, scale = vectors["rounding_value"], vectors["rounding_scale"]
    zero, code = vectors["rounding_zero_point"], vectors["rounding_code"]
    made = read(out / "manifest.json")["golden"]
    assert made["n_roundings"] == len(value) and min(made["roundings_with"].values()) > 0
    for one, at in dict.fromkeys(zip(scale, zero, strict=True)):
        rows = (scale == one) & (zero == at)
        node = _quantize_linear(one, np.uint8(at))
        feed = {"x": value[rows]}
        assert np.array_equal(ReferenceEvaluator(node).run(None, feed)[0], code[rows])
        session = runtime.build(node.SerializeToString())
        assert np.array_equal(session.run(None, feed)[0], code[rows])
    # a client that rounds half away from zero is found out, and so is one that wraps around
    steps = (value / scale).astype(np.float64)
    away = np.clip(np.sign(steps) * np.floor(np.abs(steps) + 0.5) + zero, 0, 255)
    assert np.count_nonzero(away != code) > 10
    assert np.count_nonzero((np.rint(steps) + zero).astype(np.int64) % 256 != code) > 10


def test_quantizers_of_constants_do_not_count(model: onnx.ModelProto) -> None:
    """Such as the position bias of an attention layer: no image changes what happens there."""
    more = onnx.ModelProto()
    more.CopyFrom(model)
    more.graph.initializer.append(numpy_helper.from_array(np.ones(5, np.float32), "constant"))
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    more.graph.node.append(
        helper.make_node("QuantizeLinear", ["constant", *first.input[1:]], ["constant.codes"])
    )
    assert golden._quantizers(more) == golden._quantizers(model)


def test_images_are_chosen_for_what_they_cause() -> None:
    nothing, first, both = [[0, 0, 0]] * 2, [[1, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 1]]
    provoked = np.array([nothing, first, nothing, both], bool)
    assert golden.choose(provoked, 1).tolist() == [3]
    assert golden.choose(provoked, 3).tolist() == [0, 1, 3]


def test_large_images_make_few_vectors() -> None:
    """How many fit: not that a network of that size is built."""
    sizes = {3 * 32 * 32: 16, 3 * 224 * 224: 4}
    for pixels, n in sizes.items():
        fit = golden.INPUT_BYTES // pixels
        assert min(golden.VECTORS, max(golden.FEWEST, fit)) == n


def test_profiles() -> None:
    def mapped(scales: list[list[float]], zero: int = 0) -> Any:
        facts = {"zero_point": (zero,)}
        tensors = tuple(type("T", (), facts | {"scale": tuple(s)})() for s in scales)
        return type("M", (), {"tensors": tensors})()

    assert bundle.profile(mapped([[0.25], [2**-20]])) == "po2-tensor"
    assert bundle.profile(mapped([[0.25], [0.3]])) == "float-channel"
    assert bundle.profile(mapped([[0.25, 0.5], [0.75]])) == "po2-channel"
    assert bundle.profile(mapped([[0.25, 0.6], [0.25]])) == "float-channel"
    assert bundle.profile(mapped([[0.3], [0.25]], zero=-2)) == "asymmetric-tensor"


# --------------------------------------------------------------------------- C


@pytest.fixture(scope="module")
def library(out: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """weights.c and resq_check.c of the bundle, compiled by the system's compiler."""
    path = tmp_path_factory.mktemp("c") / "libbundle.so"
    sources = [out / "weights.c", out / "resq_check.c"]
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    subprocess.run(["cc", *flags, "-shared", "-fPIC", *sources, "-o", path], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.resq_crc32.argtypes = [ctypes.c_char_p, ctypes.c_uint32]
    loaded.resq_crc32.restype = ctypes.c_uint32
    loaded.resq_quantize.argtypes = [ctypes.c_float, ctypes.c_float, ctypes.c_int32]
    loaded.resq_quantize.restype = ctypes.c_uint8
    return loaded


def test_the_c_array_is_weights_bin(out: Path, library: ctypes.CDLL) -> None:
    image = (out / "weights.bin").read_bytes()
    array = (ctypes.c_uint8 * len(image)).in_dll(library, "resq_model_weights")
    assert bytes(array) == image
    n = len(read(out / "memory_map.json")["tensors"])
    assert library.resq_first_damaged_tensor() == n


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_the_crc_is_that_of_zlib(library: ctypes.CDLL, content: bytes) -> None:
    assert library.resq_crc32(content, len(content)) == zlib.crc32(content)


@settings(max_examples=300, deadline=None)
@given(
    st.floats(width=32, allow_nan=False) | st.integers(-2100, 2100).map(lambda n: n / 8),
    st.sampled_from([2.0**-7, 0.25, 1.0, 1 / 255, 0.0123]) | st.floats(2.0**-20, 2.0**10, width=32),
    st.integers(0, 255),
)
def test_the_c_quantizer_is_ours(
    library: ctypes.CDLL, value: float, scale: float, zero: int
) -> None:
    x = np.array([value], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = quantize.quantize(x, np.float32(scale), zero, dtype=np.uint8)
    assert library.resq_quantize(value, scale, zero) == expected[0]


@pytest.mark.parametrize("name", ["parity:mean", "secded"])
def test_the_replay_goes_through_the_decoder(
    out: Path, model: onnx.ModelProto, tmp_path: Path, name: str
) -> None:
    """With the golden vectors of the plain bundle: they say nothing of weights."""
    how = encoding.parse(name)
    encoded, _ = attached(model, how)
    mapped, image = memory_map.of(encoded, name="m", sha256="", encoding=name)
    for path in out.glob("*.[ch]"):
        shutil.copy(path, tmp_path)
    for file, content in (c_arrays.weights(mapped, image) | c_decoder.sources(how)).items():
        (tmp_path / file).write_bytes(content)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "replay"]

    def replay() -> subprocess.CompletedProcess[str]:
        done = run("cc", *tmp_path.glob("*.c"), *flags, "-lm")
        assert done.returncode == 0, done.stderr
        return run(tmp_path / "replay")

    assert replay().returncode == 0
    source = (tmp_path / "weights.c").read_text()
    wanted = f"0x{c_arrays._codes_crc32(mapped.tensors[0], image, how):08x}u"
    (tmp_path / "weights.c").write_text(source.replace(wanted, "0x00000000u"))
    assert "FAILED: decoded codes of tensor (0)" in replay().stdout


def test_names_become_distinct_c_identifiers() -> None:
    names = ["a.b-c", "a_b_c", "a_b_c_2"]
    found = c_arrays._identifiers(names)
    assert found == ["RESQ_MODEL_A_B_C", "RESQ_MODEL_A_B_C_2", "RESQ_MODEL_A_B_C_2_2"]


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_c_literals_are_exact(value: float) -> None:
    assert np.float32(c_arrays.real(value).removesuffix("f")) == np.float32(value)


# --------------------------------------------------------------------------- build systems


def tool(name: str) -> str:
    """A program of the environment (cmake comes with [dev]) or of the system."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is needed: pip install -e '.[dev]', and a C compiler and make"
    return found


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


def firmware(bundle: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Configure, build and test the example against a bundle; the result of ctest."""
    made = run(tool("cmake"), "-S", EXAMPLE, "-B", folder, f"-Dresq_model_DIR={bundle}")
    assert made.returncode == 0, made.stdout + made.stderr
    made = run(tool("cmake"), "--build", folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return run(tool("ctest"), "--test-dir", folder, "--output-on-failure")


def test_the_cmake_example_finds_builds_and_tests_the_bundle(out: Path, tmp_path: Path) -> None:
    done = firmware(out, tmp_path / "build")
    assert done.returncode == 0 and "100% tests passed" in done.stdout
    shown = run(tmp_path / "build" / "firmware").stdout
    mapped = read(out / "memory_map.json")
    for tensor in mapped["tensors"]:
        line = f"0x{tensor['address']:06x} {tensor['bytes']:8d} bytes  crc32 {tensor['crc32']:08x}"
        assert f"{line}  {tensor['name']}\n" in shown
    assert shown.endswith(f"{mapped['bytes']} bytes intact\n")


def test_a_damaged_array_and_a_wrong_rounding_fail_the_test(out: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(out, bad)
    source = (bad / "weights.c").read_text()
    first = re.search(r"= \{\n    (-?\d+),", source)
    assert first
    code = int(first[1]) ^ 1
    (bad / "weights.c").write_text(source.replace(first[0], f"= {{\n    {code},", 1))
    check = (bad / "resq_check.c").read_text()
    (bad / "resq_check.c").write_text(check.replace("(odd != 0)", "(odd == 0)"))
    done = firmware(bad, tmp_path / "build")
    assert done.returncode != 0 and "2 tests failed out of 2" in done.stdout
    assert "FAILED: CRC-32 of tensor (0)" in done.stdout
    assert "FAILED: rounding" in done.stdout
    assert "damaged: conv1.weight" in done.stdout


def test_the_make_example_exports_again_when_the_checkpoint_changes(
    work: Path, out: Path, tmp_path: Path
) -> None:
    """The exporter is a stub that copies the bundle and counts its calls; the depfile is ours."""
    for name in ("Makefile", "main.c"):
        shutil.copy(EXAMPLE / name, tmp_path)
    for name in ("checkpoint.safetensors", "checkpoint.json"):
        shutil.copy(work / name, tmp_path)
    (tmp_path / "bundle.d").write_text(
        bundle.depfile(
            Path("build/bundle/manifest.json"), [Path("checkpoint.safetensors"), Path("r.toml")]
        )
    )
    (tmp_path / "r.toml").write_text("")
    stub = tmp_path / "stub"
    stub.write_text(
        f"#!/bin/sh\necho call >> calls\nrm -rf build/bundle\ncp -r {out} build/bundle\n"
        "touch build/bundle/manifest.json\ncp bundle.d build/bundle.d\n"
    )
    stub.chmod(0o755)

    def aged(name: str, time: int) -> None:
        os.utime(tmp_path / name, (time, time))

    def make() -> int:
        done = run("make", "RESQ_DEPLOY=./stub", "test", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "vectors: ok" in done.stdout and "bytes intact" in done.stdout
        return len((tmp_path / "calls").read_text().splitlines())

    for name in ("checkpoint.safetensors", "r.toml"):
        aged(name, 100)
    assert make() == 1
    assert make() == 1
    aged("build/bundle/manifest.json", 200)
    assert make() == 1
    aged("r.toml", 300)
    assert make() == 2


@settings(deadline=None)
@given(st.text("ab $#/.", min_size=1))
def test_depfiles_escape_what_make_would_read(name: str) -> None:
    rule = bundle.depfile(Path("t"), [Path("a") / name.replace("/", "_")])
    bare = re.sub(r"\\[ #]|\$\$", "", rule.removeprefix("t: ").removesuffix("\n"))
    assert not set(bare) & {" ", "#", "$"}


def test_the_command_line_writes_a_depfile_and_repeats_nothing(work: Path, out: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    os.utime(out / "manifest.json", (0, 0))
    source, rule = work / "checkpoint.safetensors", work / "bundle.d"
    done = CliRunner().invoke(
        main, ["export", str(source), "--out", str(out), "--depfile", str(rule)]
    )
    assert done.exit_code == 0, done.output
    assert rule.read_text() == (f"{out}/manifest.json: {source} {source.with_suffix('.json')}\n")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert (out / "manifest.json").stat().st_mtime > source.stat().st_mtime


def test_required_operators_are_those_of_onnxruntimes_own_tool(out: Path, tmp_path: Path) -> None:
    from onnxruntime.tools.reduced_build_config_parser import parse_config

    shutil.copy(out / QDQ, tmp_path / "m.onnx")
    done = run(
        sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", tmp_path,
        "--optimization_style", "Fixed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs, _ = parse_config(str(tmp_path / "required_operators.config"))
    ours, _ = parse_config(str(out / "required_operators.config"))
    for domain, opsets in theirs.items():
        for opset, operators in opsets.items():
            assert operators <= ours[domain][opset]
    everything = {op for opsets in ours.values() for ops in opsets.values() for op in ops}
    assert everything >= {node.op_type for node in onnx.load(out / QDQ).graph.node}


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize("failing", range(3))
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    out, files = tmp_path / "out", {"a": b"1", "b": b"2", "c": b"3"}
    calls = []

    def full(self: Path, data: bytes, real: Any = Path.write_bytes) -> int:
        calls.append(self)
        if len(calls) == failing + 1:
            real(self, data[:-1])
            raise OSError(28, "No space left on device")
        return int(real(self, data))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            artifacts.write_folder(out, files)
    assert list(tmp_path.iterdir()) == []
    artifacts.write_folder(out, {"old": b"0"})
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            artifacts.write_folder(out, files)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["old"]
    artifacts.write_folder(out, files)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = artifacts.write_folder(tmp_path / "out", {"old": b"0"})

    def refuse(self: Path, target: Path, real: Any = Path.rename) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(13, "Permission denied")
        return Path(real(self, target))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        artifacts.write_folder(out, {"new": b"1"})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["old"]


def test_files_of_others_are_not_replaced(work: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"not a folder of exported files alone \(first: mine.txt"):
        export(work / "checkpoint.safetensors", out=tmp_path, images=load_test("digits", None))
    assert (tmp_path / "mine.txt").read_text() == "precious"
