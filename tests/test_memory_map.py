"""The memory map, addresses of sites, and campaigns on a dump of the memory."""

from __future__ import annotations

import csv
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import models
from resq_deploy import bits, memory_map, runtime, store
from resq_deploy.cli import main
from resq_deploy.errors import ExportError, InputError
from resq_deploy.inject import discovery, inject, results, space, write_csv
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.plans import Image
from resq_deploy.memory_map import ALIGNMENT, MemoryMap
from resq_deploy.records import Site

DATA = models.data(12)
KINDS = ("qdq-channel", "qdq-tensor", "qdq-uint8", "qdq-matmul", "qdq-int4")


def mapped(raw: bytes) -> tuple[MemoryMap, bytes]:
    return memory_map.of(
        onnx.load_model_from_string(raw), name="m.onnx", sha256=hashlib.sha256(raw).hexdigest()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """m.onnx, memory_map.json and weights.bin."""
    raw = models.quantized("qdq-channel")
    found, image = mapped(raw)
    (tmp_path / "m.onnx").write_bytes(raw)
    (tmp_path / "weights.bin").write_bytes(image)
    (tmp_path / "memory_map.json").write_text(json.dumps(found.to_json()))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_describes_every_stored_byte(kind: str) -> None:
    raw = models.quantized(kind)
    found, image = mapped(raw)
    assert len(image) == found.bytes and zlib.crc32(image) == found.crc32
    assert hashlib.sha256(image).hexdigest() == found.sha256
    initializers = {t.name: t for t in onnx.load_model_from_string(raw).graph.initializer}
    end = 0
    for tensor in found.tensors:
        part = image[tensor.address : tensor.address + tensor.bytes]
        assert tensor.address % ALIGNMENT == 0 and not any(image[end : tensor.address])
        assert zlib.crc32(part) == tensor.crc32
        assert hashlib.sha256(part).hexdigest() == tensor.sha256
        codes: Any = np.frombuffer(part, np.uint8 if tensor.bits == 4 else tensor.dtype)
        if tensor.bits == 4:
            codes = bits.unpack(codes, tensor.elements, tensor.dtype)
        expected = numpy_helper.to_array(initializers[tensor.name])
        assert np.array_equal(codes.reshape(tensor.shape), expected.astype(codes.dtype))
        assert len(tensor.layout) == len(tensor.shape)
        assert (tensor.axis is None) == (len(tensor.scale) == 1)
        end = tensor.address + tensor.bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_flip_at_the_address_is_the_flip_of_the_site(kind: str) -> None:
    """Every bit of the fault space: what Memory stores there is what weights.bin stores there."""
    raw = models.quantized(kind)
    found, image = mapped(raw)
    stored = Memory.of(discovery.discover(runtime.parse_model(raw), found.targets))
    everything = np.arange(stored.n_bits)
    places = [found.place(site) for site in stored.space.sites(everything)]
    assert None not in places and len(set(places)) == stored.n_bits
    read = [image[address] >> bit & 1 for address, bit in places]  # type: ignore[misc]
    assert np.array_equal(read, stored.bits(everything))


def test_a_written_map_is_read_again(folder: Path) -> None:
    found, _ = mapped((folder / "m.onnx").read_bytes())
    path = folder / "memory_map.json"
    assert memory_map.read(path, model_sha256=found.model_sha256) == found
    assert found.place(Site(tensor="w1_quantized#check", offset=0, bit=0)) is None


def test_weights_of_operators_without_a_known_layout_are_refused() -> None:
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    next(n for n in model.graph.node if n.op_type == "Conv").op_type = "ConvTranspose"
    with pytest.raises(ExportError, match="no weights of ConvTranspose"):
        memory_map.of(model, name="m", sha256="")


# --------------------------------------------------------------------------- dumps


def replay(folder: Path, dump: bytes, name: str = "s", **options: Any) -> dict[str, Any]:
    (folder / "dump.bin").write_bytes(dump)
    return inject(
        folder / "m.onnx", DATA, out=folder / name, image=folder / "dump.bin",
        map_file=folder / "memory_map.json", **options,
    )  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_dump_is_evaluated_as_the_file_with_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Both engines against a file into which the bytes were written by hand."""
    folder = tmp_path_factory.mktemp("dump")
    raw = models.quantized("qdq-channel")
    found, image = mapped(raw)
    (folder / "m.onnx").write_bytes(raw)
    (folder / "memory_map.json").write_text(json.dumps(found.to_json()))
    dump = bytearray(image)
    for _ in range(data.draw(st.integers(1, 12))):
        dump[data.draw(st.integers(0, len(dump) - 1))] ^= data.draw(st.integers(1, 255))
    model = onnx.load_model_from_string(raw)
    initializers = {t.name: t for t in model.graph.initializer}
    for tensor in found.tensors:
        part = bytes(dump[tensor.address : tensor.address + tensor.bytes])
        codes = np.frombuffer(part, tensor.dtype).reshape(tensor.shape)
        initializers[tensor.name].CopyFrom(numpy_helper.from_array(codes, tensor.name))
    session = runtime.session(model.SerializeToString())
    output = runtime.run(session, runtime.adapt(DATA.x, session))
    correct = int((output.argmax(axis=1) == DATA.y).sum())
    shown = []
    for engine in ("fast", "reload"):
        shown.append(replay(folder, bytes(dump), engine, engine=engine))
        _, (trial,), _ = store.read([folder / engine])
        assert trial.n_correct == correct
    assert shown[0]["image"] == shown[1]["image"]
    differing = sum(row["n_bits_differ"] for row in shown[0]["image"])
    fill = shown[0]["plan"]["n_fill_bits"]
    assert differing == trial.n_flips
    assert differing + fill == sum((a ^ b).bit_count() for a, b in zip(dump, image, strict=True))


def test_a_dump_without_faults_is_masked(folder: Path) -> None:
    found = replay(folder, (folder / "weights.bin").read_bytes())
    assert found["image"] == [] and found["outcomes"]["masked"] == 1
    assert found["fault_accuracy"]["mean"] == found["golden"]["n_correct"] / 12


def test_a_dump_of_nothing_but_errors(folder: Path) -> None:
    image = (folder / "weights.bin").read_bytes()
    found = replay(folder, bytes(255 - byte for byte in image))
    differing = sum(row["n_bits_differ"] for row in found["image"])
    assert differing + found["plan"]["n_fill_bits"] == 8 * len(image)
    assert {row["tensor"] for row in found["image"]} >= {"w1_quantized", "b1_quantized"}


def test_the_unused_half_of_a_last_byte_does_not_count() -> None:
    codes = space.Tensor(
        name="w", dtype="int4", shape=(3,), op_type="Conv", node="n", absorbed=False
    )
    plan = Image(sha256="", masks={"w": np.array([0x11, 0xF1], np.uint8)}, n_fill_bits=0)
    assert plan.cells(0, space.Space(tensors=(codes,)), 0).tolist() == [0, 4, 8]


def test_the_command_line_shows_what_differs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    np.savez("d.npz", x=DATA.x, y=DATA.y)
    dump = bytearray(Path("weights.bin").read_bytes())
    dump[3] ^= 0x81
    Path("dump.bin").write_bytes(dump)
    args = ["inject", "m.onnx", "--data", "d.npz", "--out", "s", "--map", "memory_map.json"]
    shown = CliRunner().invoke(main, [*args, "--image", "dump.bin", "--json", "r.json"])
    assert shown.exit_code == 0, shown.output
    first = json.loads(Path("memory_map.json").read_text())["tensors"][0]["name"]
    assert first in shown.stdout and "bits that differ  2\n" in shown.stdout
    found = json.loads(Path("r.json").read_text())
    assert f"golden accuracy   {found['golden']['n_correct']}/12" in shown.stdout
    again = CliRunner().invoke(
        main, ["results", "s", "--map", "memory_map.json", "--json", "q.json"]
    )
    assert again.stdout == shown.stdout
    assert json.loads(Path("q.json").read_text()) == found


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "short": (lambda image: image[:-1], {}, "has 255 bytes; the map describes 256"),
    "long": (lambda image: image + b"\0", {}, "dump all of the array resq_model_weights"),
    "protection": (bytes, {"protection": "parity"}, "--protect parity with --image"),
    "target": (bytes, {"targets": ("bias",)}, "--target bias with --image given; the dump holds"),
    "fault": (bytes, {"fault": "single"}, "--fault single with --image given"),
    "plan": (bytes, {"trials": 3}, "--trials and --image given; expected exactly one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_dumps_that_do_not_fit_are_refused(folder: Path, name: str) -> None:
    change, options, message = WRONG[name]
    image = (folder / "weights.bin").read_bytes()
    with pytest.raises(InputError, match=message):
        replay(folder, change(image), **options)
    assert not (folder / "s").exists()


def test_maps_that_do_not_fit_are_refused(folder: Path) -> None:
    path, image = folder / "memory_map.json", (folder / "weights.bin").read_bytes()
    good = json.loads(path.read_text())
    with pytest.raises(InputError, match="--image given without --map"):
        inject(folder / "m.onnx", DATA, out=folder / "s", image=path)
    for change, message in (
        ({"model_sha256": "0" * 64}, "is the map of m.onnx with the SHA-256 000000000000"),
        ({"format": "other"}, "is not a memory map of the format"),
        ({"tensors": [{"name": "w"}]}, "is a damaged memory map"),
        ({"tensors": [good["tensors"][0] | {"sha256": ""}]}, "does not hold with these bytes"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=message):
            replay(folder, image)
    path.write_text("[]")
    with pytest.raises(InputError, match="is not a memory map"):
        replay(folder, image)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read as JSON"):
        replay(folder, image)


# --------------------------------------------------------------------------- addresses


def test_sites_have_their_addresses(folder: Path) -> None:
    path, out = folder / "memory_map.json", folder / "s"
    found = inject(folder / "m.onnx", DATA, out=out, trials=6, map_file=path,
                   targets=("weight", "bias"))  # fmt: skip
    assert found == results([out], map_file=path)
    assert results([out])["sites"] is None and found["image"] is None
    mapping, _ = mapped((folder / "m.onnx").read_bytes())
    write_csv([out], folder / "s.csv", map_file=path)
    rows = list(csv.DictReader((folder / "s.csv").open()))
    assert len(rows) == len(found["sites"]) == 6
    for row, entry in zip(rows, found["sites"], strict=True):
        site = Site(tensor=entry["tensor"], offset=entry["offset"], bit=entry["bit"])
        assert (entry["address"], entry["address_bit"]) == mapping.place(site)
        assert row["address"] == str(entry["address"])
        assert row["address_bit"] == str(entry["address_bit"])


def test_addresses_of_several_flips_and_of_check_bits(folder: Path) -> None:
    path, out = folder / "memory_map.json", folder / "s"
    inject(folder / "m.onnx", DATA, out=out, fault="k:40", trials=1, protection="parity")
    write_csv([out], folder / "s.csv", sites=True, map_file=path)
    (row,) = csv.DictReader((folder / "s.csv").open())
    names, addresses = row["tensor"].split(";"), row["address"].split(";")
    assert len(names) == len(addresses) == 40
    assert any(name.endswith("#check") for name in names)
    for name, address in zip(names, addresses, strict=True):
        assert (address == "") == name.endswith("#check")


def test_another_models_map_is_refused_by_results(folder: Path) -> None:
    inject(folder / "m.onnx", DATA, out=folder / "s", trials=1)
    other, _ = mapped(models.quantized("qdq-tensor"))
    (folder / "memory_map.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(InputError, match="is the map of m.onnx with the SHA-256"):
        results([folder / "s"], map_file=folder / "memory_map.json")
