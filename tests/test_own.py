"""A network of the user's own: traced, quantized, hardened, exported; refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from resq_deploy import artifacts, data, pipeline, recipe, runtime, store
from resq_deploy.cli import main
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.export import checks, export, output_step
from resq_deploy.export.qdq import qdq
from resq_deploy.inject import inject
from resq_deploy.nets import checkpoint, own
from resq_deploy.nets.posttraining import correct_biases, equalize
from resq_deploy.nets.quantized import calibrate, fold, quantize, value
from resq_deploy.nets.steps import assemble
from resq_deploy.nets.traced import trace
from resq_deploy.train import train

OWN = Path(__file__).parent / "own"
SOURCES = {"plain": f"{OWN / 'plain_cnn.py'}:make_net", "concat": f"{OWN / 'concat_net.py'}:Net"}
SHAPE = (1, 16, 16)
X = torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few digits of 16x16 pixels, as a user keeps images of his own."""
    folder = tmp_path_factory.mktemp("digits")
    found = data.load("digits")
    assert found.train is not None
    for name, split, n in (("train", found.train, 256), ("test", found.test, 64)):
        np.savez(folder / f"{name}.npz", x=split.x[:n, :, ::2, ::2], y=split.y[:n])
    return folder


SECTIONS: dict[str, dict[str, Any]] = {
    "float": {"epochs": 1, "batch": 32, "lr": 0.05},
    "baseline": {"epochs": 1, "batch": 64, "lr": 0.01},
    "attack": {"epochs": 1, "batch": 64, "lr": 0.01, "epsilon": 0.05},
    "fault": {"epochs": 1, "batch": 64, "lr": 0.01, "start_loss": 10.0},
    "adjust": {"epsilon": 0.05, "ratios": [0.8], "patterns": 2, "steps": 1},
    "export": {"parity_images": 64},
    "prove": {"images": 20, "rates": [1e-2], "draws": 2, "margin": 0.4, "single_images": 5,
              "epsilons": [0.05], "steps": 1},
}  # fmt: skip


def write(folder: Path, images: Path, *, train_set: bool = True, **sections: Any) -> Path:
    """models/own.toml and its calibration manifest under `folder`."""
    given = {"name": str(images / "test.npz")} | (
        {"train": str(images / "train.npz")} if train_set else {}
    )
    content = {"data": given | {"calibration": "own"}, **sections}
    lines = ['name = "own"']
    for section, fields in content.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in fields.items())]
    path = folder / "models" / "own.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    (folder / "calibration").mkdir(exist_ok=True)
    split = "train" if train_set else "test"
    (folder / "calibration/own.toml").write_text(f'data = "test"\nsplit = "{split}"\nimages = 32\n')
    return path


@pytest.fixture(scope="module", params=sorted(SOURCES))
def run(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: Any) -> Path:
    """A network that is not ours after every stage, exported."""
    folder = tmp_path_factory.mktemp(request.param)
    loaded = recipe.load(
        write(folder, digits, model={"source": SOURCES[request.param]}, **SECTIONS)
    )
    stages = pipeline.harden(loaded, out=folder / "run")
    assert list(stages) == ["float", "baseline", "attack", "fault", "adjust"]
    images = data.of(loaded.data).test
    export(stages["adjust"], out=folder / "run" / "export", images=images, config=loaded.export)
    return folder / "run"


class TestHardened:
    def test_every_stage_moves_it_and_the_file_computes_in_integers(self, run: Path) -> None:
        digests = {artifacts.sha256(p) for p in run.glob("*/checkpoint.safetensors")}
        assert len(digests) >= 4  # stage 3 may leave everything alone
        kernels = artifacts.read_json(run / "export/manifest.json")["kernels"]
        assert kernels["QLinearConv"] == {"plain": 2, "concat": 7}[run.parent.name[:-1]]
        assert not {"Conv", "Gemm", "MatMul", "Add", "Mul", "BatchNormalization"} & set(kernels)

    def test_both_engines_give_the_same_campaign(self, run: Path, tmp_path: Path) -> None:
        images = Dataset(name="x", x=(X[:8].numpy() * 255).astype(np.uint8), y=np.arange(8))
        stored = []
        for engine in ("fast", "reload"):
            out = tmp_path / f"{engine}.store"
            inject(run / "export/model.qdq.onnx", images, out=out, trials=20, engine=engine)
            stored.append(store.read([out])[1])
        assert len(stored[0]) == 20 and stored[0] == stored[1]

    def test_loading_a_checkpoint_runs_nothing_of_the_user(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(own, "call", None)
        net, facts = checkpoint.load(run / "adjust/checkpoint.safetensors")
        assert value(net(X)).shape == (32, 10)
        assert facts["net"]["source"] in ("plain_cnn.py:make_net", "concat_net.py:Net")
        assert len(facts["net"]["source_sha256"]) == 64


@pytest.mark.parametrize("source", sorted(SOURCES))
class TestTraced:
    def test_it_computes_the_same_and_keeps_names(self, source: str) -> None:
        net = own.call(SOURCES[source], {}).train()
        net(X)  # statistics of batch norm
        logits = net.eval()(X)
        steps, traced = trace(net, SHAPE)
        ours = traced.eval()(X)
        ours = torch.log_softmax(ours, 1) if source == "plain" else ours
        torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
        theirs = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        added = {"truediv", "norm_scale"}  # normalization of pixels, batch norm of a concatenation
        found = {n for n, m in traced.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        renamed = {n.replace("output", "output_").replace("input", "input_") for n in theirs}
        assert found - added == renamed - {"aux"}
        assert json.loads(json.dumps(steps)) == steps
        rebuilt = assemble(steps)
        rebuilt.load_state_dict(traced.state_dict())
        assert torch.equal(rebuilt.eval()(X), traced(X))

    def test_the_int8_network_is_close(self, source: str) -> None:
        net = own.call(SOURCES[source], {}).train()
        net(X)
        _, traced = trace(net, SHAPE)
        int8 = quantize(traced)
        calibrate(int8, X)
        with torch.no_grad():
            expected = traced.eval()(X)
            error = (value(int8.eval()(X)) - expected).abs().max() / expected.abs().max()
        assert error < 0.05


def test_float_islands_convert_their_codes_once() -> None:
    """GELU runs as one operator, the norm squares by multiplying; neither asks for codes twice."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32),
        nn.Linear(32, 10),
    ).eval()  # fmt: skip
    _, traced = trace(net, SHAPE)
    int8 = quantize(traced)
    calibrate(int8, X)
    kernels = checks.integer_kernels(
        qdq(int8.eval(), SHAPE, opset=19, ir_version=10).SerializeToString()
    )
    assert kernels["QGemm"] == 3
    assert kernels["DequantizeLinear"] == 3  # for GELU, the norm and the logits
    assert kernels["Gelu"] == 1
    assert kernels["Mul"] == 3  # squares of values and mean, gain
    assert "Pow" not in kernels


@pytest.mark.parametrize(
    ("name", "convolutions", "linear"),
    [
        ("DenseNet", 5, 1),  # 3, and one for the batch norm of each concatenation
        ("PreActivated", 5, 0),  # 4, and one for the batch norm behind the shortcut
        ("SqueezeExcitation", 2, 3),  # 1, and one for the constants in front
        ("TwoReaders", 2, 1),  # 1, and one for the factor in front of ReLU6
        ("MobileNetV3", 20, 1),  # 12, and one for each of 6 Hardswish and 2 Hardsigmoid
        ("Perceptron", 1, 3),
    ],
)
def test_what_people_write_computes_in_integers(name: str, convolutions: int, linear: int) -> None:
    net = own.call(f"{OWN / 'more_nets.py'}:{name}", {}).train()
    net(X)
    _, traced = trace(net.eval(), SHAPE)
    expected = net(X)
    ours = traced.eval()(X)
    ours = ours.softmax(-1) if name == "SqueezeExcitation" else ours
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    int8 = quantize(traced)
    calibrate(int8, X)
    model = qdq(int8.eval(), SHAPE, opset=19, ir_version=10).SerializeToString()
    kernels = checks.integer_kernels(model)
    assert [kernels.get(k, 0) for k in ("QLinearConv", "QGemm")] == [convolutions, linear]
    pixels = np.round(X.numpy() * 255).astype(np.uint8)
    session = runtime.session(model)
    found = runtime.run(session, runtime.adapt(pixels, session))
    with torch.no_grad():
        wanted = value(int8(torch.from_numpy(pixels / np.float32(255)))).numpy()
    assert checks.parity(("torch", "file"), wanted, found, step=output_step(int8)).max_steps <= 1


def test_the_example_is_quantized_and_computes_in_integers() -> None:
    """models/digits-own.toml with the network of examples/."""
    loaded = recipe.load(OWN.parents[1] / "models/digits-own.toml")
    images = data.of(loaded.data).test.first(64).x
    net, kept = own.make(
        loaded.model, shape=images.shape[1:], n_classes=10, seed=0, prepare=lambda net: None
    )
    assert kept["source"] == "mynet.py:make_net"
    int8 = quantize(net.eval())
    calibrate(int8, torch.from_numpy(images / np.float32(255)))
    model = qdq(int8.eval(), images.shape[1:], opset=19, ir_version=10).SerializeToString()
    assert set(checks.integer_kernels(model)) & checks.FLOAT == {"GlobalAveragePool"}


def test_weights_are_read_under_the_names_of_the_user(digits: Path, tmp_path: Path) -> None:
    """Saved from DataParallel, with a layer that is never called; mean and std before it."""
    net = own.call(SOURCES["concat"], {})
    saved = {f"module.{k}": v for k, v in net.state_dict().items()}
    checkpoint.write_tensors(tmp_path / "models/mine.safetensors", saved)
    model = {"source": SOURCES["concat"], "mean": [0.1], "std": [0.5]}
    path = write(
        tmp_path, digits, model=model, float={"checkpoint": "mine.safetensors"},
        adjust=SECTIONS["adjust"],
    )  # fmt: skip
    made, _ = checkpoint.load(train(recipe.load(path), "float", out=tmp_path / "float"))
    with torch.no_grad():
        torch.testing.assert_close(made(X), net.eval()((X - 0.1) / 0.5), rtol=1e-4, atol=1e-5)


def test_without_training_no_training_images_are_needed(digits: Path, tmp_path: Path) -> None:
    """PTQ: calibrate, stage 3, export, prove; the report misses nothing."""
    net = own.call(SOURCES["plain"], {"width": 4})
    checkpoint.write_tensors(tmp_path / "models/mine.safetensors", dict(net.state_dict()))
    path = write(
        tmp_path, digits, train_set=False,
        model={"source": SOURCES["plain"]}, float={"checkpoint": "mine.safetensors"},
        baseline={"equalize": 5, "bias_correction": True}, adjust=SECTIONS["adjust"],
        export=SECTIONS["export"], prove=SECTIONS["prove"],
    )  # fmt: skip
    content = path.read_text().replace("[model]", "[model]\narguments = { width = 4 }")
    path.write_text(content)
    pipeline.run(recipe.load(path), out=tmp_path / "run", workers=1)
    assert not (tmp_path / "run/attack").exists()
    table = artifacts.read_json(tmp_path / "run/table.json")
    assert table["missing"] == []
    assert {s for row in table["rows"] for s, v in row["stages"].items() if v} == {
        "baseline", "adjust",
    }  # fmt: skip


def test_equalizing_keeps_the_function_and_changes_weights() -> None:
    _, traced = trace(own.call(SOURCES["concat"], {}).eval(), SHAPE)
    traced.eval()
    equal = equalize(traced, 10).eval()
    torch.testing.assert_close(equal(X), traced(X), rtol=1e-4, atol=1e-5)
    assert not torch.equal(equal.state_dict()["block.conv1.0.weight"],
                           fold(traced).state_dict()["block.conv1.0.weight"])  # fmt: skip


@pytest.mark.parametrize("saturating", [nn.Hardswish, nn.ReLU6])
def test_what_saturates_does_so_while_ranges_are_found(saturating: type[nn.Module]) -> None:
    """Far beyond its bend; the layers behind would else be scaled for values that never are.

    The error was 0.89 of a deviation behind Hardswish, 0.020 behind ReLU6.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), saturating(), nn.Conv2d(8, 8, 3), saturating(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        cast(Any, net[0]).weight *= 40
        cast(Any, net[2]).weight *= 4
    _, traced = trace(net.eval(), SHAPE)
    int8 = quantize(traced)
    calibrate(int8, X)
    with torch.no_grad():
        expected, found = net(X), value(int8.eval()(X))
    assert (found - expected).abs().mean() < 0.012 * expected.std()


def test_bias_correction_brings_mean_outputs_back() -> None:
    _, traced = trace(own.call(SOURCES["plain"], {}).eval(), SHAPE)
    int8 = quantize(traced, weight_bits=4)  # coarse: the means are off
    calibrate(int8, X)

    def error() -> float:
        with torch.no_grad():
            return float((value(int8.eval()(X)) - traced.eval()(X)).mean(0).abs().mean())

    before = error()
    correct_biases(int8, X)
    assert error() < 0.5 * before


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh())
        self.head = nn.Linear(4 * 14 * 14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).flatten(1)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)).flatten(1)


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.a(x)) + self.norm(self.b(x))).flatten(1)


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh").flatten(1)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(x, 2, dim=2)
        return (a - b).flatten(1)


@pytest.mark.parametrize(
    ("net", "messages"),
    [
        (GroupNormed(), ["module 'body.1': GroupNorm divides by statistics", "'body.2': Tanh has"]),
        (Branching(), ["module 'gate' cannot be traced"]),
        (Shared(), ["module 'conv': a layer with weights is called twice"]),
        (SharedNorm(), ["module 'norm': a layer with weights is called twice"]),
        (Halves(), ["the network calls chunk"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), ["module '0' does not take images of shape"]),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Flatten()),
         ["module '0': padding_mode 'circular'"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 3), nn.Hardswish()),
         ["module '2': of maps (N, C, H, W) only"]),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.PReLU(3), nn.GELU(), nn.Flatten()),
         ["module '1': PReLU with a slope per channel", "module '2': GELU directly behind"]),
        (TanhGELU(), ["module 'gelu': GELU approximated by tanh"]),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256)), ["module '1': BatchNorm1d"]),
        (nn.Sequential(nn.Conv2d(1, 4, 3)), ["one tensor of logits"]),
    ],
    ids=["norm", "control flow", "shared", "shared norm", "chunk", "channels", "padding",
         "hardswish", "activations", "function", "batch norm", "output"],
)  # fmt: skip
def test_what_cannot_be_quantized_is_named(net: nn.Module, messages: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        trace(net, SHAPE)
    for message in messages:
        assert message in str(raised.value)


def test_a_changed_source_is_detected(digits: Path, tmp_path: Path) -> None:
    """`run` makes the stages again; a checkpoint of the earlier file is refused."""
    file = tmp_path / "models/net.py"
    model = {"source": "net.py:make_net"}
    path = write(tmp_path, digits, model=model, **SECTIONS)
    file.write_text((OWN / "plain_cnn.py").read_text())
    made = train(recipe.load(path), "float", out=tmp_path / "float")
    before = made.stat().st_mtime_ns
    assert train(recipe.load(path), "float", out=tmp_path / "float").stat().st_mtime_ns == before
    file.write_text(file.read_text() + "# another version\n")
    with pytest.raises(InputError, match="the source has changed; run stage float again"):
        train(recipe.load(path), "baseline", out=tmp_path / "baseline", start=made)
    assert not (tmp_path / "baseline").exists()
    assert train(recipe.load(path), "float", out=tmp_path / "float").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"source": "none.py:f"}, "model.source: no file"),
        ({"source": "none.py"}, "model.source: String should match"),
        ({"source": "no.such.module:f"}, "no module 'no.such.module' is installed"),
        ({"source": "collections:OrderedDict"}, "returned OrderedDict; a torch.nn.Module expected"),
        ({"source": f"{OWN / 'plain_cnn.py'}:nothing"}, "AttributeError: .* 'nothing'"),
        ({"source": SOURCES["plain"], "width": 0.5}, "width has no meaning with source"),
        ({"net": "resnet8", "source": "x.py:f"}, "give one of net and source"),
        ({"net": "resnet8", "mean": [0.1], "std": [1.0]}, "mean, std has no meaning with net"),
        ({"source": SOURCES["plain"], "mean": [0.1]}, "give mean and std, or neither"),
        ({"source": SOURCES["plain"], "mean": [0.1, 0.2], "std": [1.0, 1.0]},
         "2 and 2 values; the images have 1 channels"),
        ({"source": f"{OWN / 'plain_cnn.py'}:few"}, "has 3 outputs, the data set 10 classes"),
    ],
    ids=["file", "form", "module", "result", "name", "field", "both", "mean", "one of two",
         "channels", "classes"],
)  # fmt: skip
def test_a_wrong_source_is_one_line_and_exit_code_2(
    digits: Path, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, digits, model=model, **SECTIONS)
    arguments = ["train", str(path), "--stage", "float", "--out", str(tmp_path / "float")]
    result = CliRunner().invoke(main, arguments)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "float").exists()


def test_a_built_in_network_needs_weights_or_epochs(digits: Path, tmp_path: Path) -> None:
    sections = SECTIONS | {"float": {"batch": 8}}
    path = write(tmp_path, digits, model={"net": "resnet8"}, **sections)
    with pytest.raises(InputError, match="float: give epochs, or a checkpoint"):
        recipe.load(path)


def test_broken_steps_are_refused() -> None:
    steps, _ = trace(own.call(SOURCES["plain"], {}), SHAPE)
    for change in ({"module": "Bilinear"}, {"options": {"f": 1}}, {"reads": ["later"]}):
        with pytest.raises(InputError, match="steps of a traced network are broken"):
            assemble([steps[0], steps[1] | change, *steps[2:]])
