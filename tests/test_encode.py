"""`encode`: int8 weights of any quantized file, stored in an encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import models
from resq_deploy import artifacts, encode, encoding, runtime
from resq_deploy.cli import main
from resq_deploy.errors import InputError
from resq_deploy.inject import discovery, inject

FILES = ["qdq-channel", "qdq-tensor", "qdq-constants", "qdq-batch-5", "qdq-matmul", "qoperator"]
NAMES = ["cosq:0.01", "hamming", "parity:mean", "saf:tanh"]


def written(folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(models.quantized(name))
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", FILES)
def test_the_file_computes_with_the_next_levels(file: str, name: str, tmp_path: Path) -> None:
    """Against the file as it was, its codes rounded: the same outputs from the same kernels."""
    kind, source, out = encoding.parse(name), written(tmp_path, file), tmp_path / "encoded.onnx"
    found = encode.encode(source, out=out, encoding=name)
    before = discovery.discover(onnx.load(source))
    rounded, as_stored = before.model, {
        t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer
    }  # fmt: skip
    weights = {tensor.name for tensor in before.space.tensors}
    for tensor in rounded.graph.initializer:
        if tensor.name in weights:
            levels = kind.nearest(numpy_helper.to_array(tensor).astype(float))
            assert np.array_equal(as_stored[tensor.name], kind.encode(levels))
            tensor.CopyFrom(numpy_helper.from_array(levels, tensor.name))
    assert found["kernels"] == runtime.kernels(source.read_bytes())
    x = models.data(20).x
    outputs = [
        runtime.run(runtime.session(raw), x)
        for raw in (rounded.SerializeToString(), out.read_bytes())
    ]
    np.testing.assert_array_equal(*outputs)


def test_what_changed_is_told_and_campaigns_strike_what_is_stored(tmp_path: Path) -> None:
    source, out = written(tmp_path, "qdq-channel"), tmp_path / "encoded.onnx"
    found = encode.encode(source, out=out, encoding="hamming")
    codes = np.concatenate([
        numpy_helper.to_array(t).reshape(-1).astype(float)
        for t in onnx.load(source).graph.initializer
        if t.name in {tensor.name for tensor in discovery.discover(onnx.load(source)).space.tensors}
    ])  # fmt: skip
    change = encoding.parse("hamming").nearest(codes) - codes
    assert found["n_bytes"] == codes.size == 196
    assert found["rms_change"] == pytest.approx(np.sqrt(np.mean(change**2)))
    first = out.read_bytes()
    assert artifacts.read_json(artifacts.sidecar(out)) == found
    encode.encode(source, out=out, encoding="hamming")
    assert out.read_bytes() == first
    # every lone flip is corrected
    campaign = inject(out, models.data(20), out=tmp_path / "c.store", trials=60)
    assert campaign["outcomes"]["masked"] == 60


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("qdq-channel", "guard:zero", "guard:zero has codes of 7 bits, and the file has scales fo"),
        ("qdq-channel", "none", "encoding 'none' is unknown; expected one of plain"),
        ("qdq-uint8", "hamming", r"has weights that are not int8 \(3 of uint8\); quantize it"),
        ("qdq-int4", "hamming", "has weights that are not int8"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    file: str, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        encode.encode(written(tmp_path, file), out=tmp_path / "out.onnx", encoding=name)
    assert not (tmp_path / "out.onnx").exists()


def test_an_old_file_and_one_with_decoders_are_refused(tmp_path: Path) -> None:
    old = onnx.load(written(tmp_path, "qdq-tensor"))
    old.opset_import[0].version = 11
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(InputError, match="has opset 11; 13 or newer expected"):
        encode.encode(tmp_path / "old.onnx", out=tmp_path / "out.onnx", encoding="hamming")
    source, out = written(tmp_path, "qdq-channel"), tmp_path / "out.onnx"
    encode.encode(source, out=out, encoding="hamming")
    with pytest.raises(InputError, match="has decoders behind its weights already"):
        encode.encode(out, out=tmp_path / "again.onnx", encoding="hamming")


def test_the_command(tmp_path: Path) -> None:
    source, out = written(tmp_path, "qdq-channel"), tmp_path / "out.onnx"
    arguments = ["encode", str(source), "--as", "cosq:0.05", "--out", str(out)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "196 weights moved by" in result.output
    refused = CliRunner().invoke(main, [*arguments[:3], "guard:zero", *arguments[4:]])
    assert refused.exit_code == 2 and "codes of 7 bits" in refused.output
