"""Attacks: one contract for all, signs of masked gradients, attack and fault, adversarial bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from resq_deploy import artifacts, bits, data, evaluate, metrics, runtime, store
from resq_deploy import attack as attacks
from resq_deploy.attack import bfa, registry, sanity
from resq_deploy.attack.base import Budget, Target
from resq_deploy.attack.bfa import Candidate
from resq_deploy.attack.twin import load_twin
from resq_deploy.cli import main
from resq_deploy.data.base import Dataset
from resq_deploy.encoding import parse as parse_encoding
from resq_deploy.errors import InputError
from resq_deploy.export import export
from resq_deploy.export.qdq import qdq
from resq_deploy.inject import inject
from resq_deploy.nets import NETS, Net, build, checkpoint
from resq_deploy.nets.blocks import Boundary
from resq_deploy.nets.quantized import calibrate, codes, quantize, value, weight_layers
from resq_deploy.report import report

NAMES = tuple(registry.ATTACKS)
BUDGET = Budget(steps=2, restarts=1, queries=40)


class Tiny(nn.Module):
    """Two convolutions and a linear layer on 32x32 images."""

    def __init__(self, *, n_classes: int, in_channels: int, image_size: int, width: float) -> None:
        super().__init__()
        self.input = Boundary("unit")
        self.conv1 = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(256, n_classes)
        self.output = Boundary("signed", plain=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(self.input(x)))))
        return self.output(self.fc(self.flatten(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Trained:
    """A small undefended digits network, exported."""

    twin: Path
    model: Path
    test: Dataset

    @property
    def net(self) -> nn.Module:
        return checkpoint.load(self.twin)[0]

    def target(self, x: Any = None) -> Target:
        images = self.test.x if x is None else x
        return Target.of(self.net, runtime.read_model(self.model), images)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("attack")
    arguments: dict[str, Any] = {"name": "tiny", "n_classes": 10, "in_channels": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "tiny", Net(make=Tiny, sizes=(32,)))
        net, train = build(**arguments), data.load("digits").train
        assert train is not None
        x, y = evaluate.tensor(train.x), torch.from_numpy(train.y)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        order = torch.Generator().manual_seed(0)
        for _ in range(8):
            for batch in torch.randperm(len(y), generator=order).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
        net = quantize(net.eval())
        calibrate(net, x[:100])
        twin = folder / "checkpoint.safetensors"
        checkpoint.save(
            twin, net, inputs={}, quantized=True, net=arguments, stage="baseline",
            recipe={"seed": 1},
        )  # fmt: skip
        model = folder / "model.onnx"
        model.write_bytes(qdq(net, (1, 32, 32), opset=19, ir_version=10).SerializeToString())
        yield Trained(twin, model, data.load("digits").test.first(200))


def call(*arguments: object, code: int = 0) -> Any:
    """A command that must end with `code`; its result."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


# ------------------------------------------------------------------------- every attack


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    """What `attack.base.Attack` promises, on every attack."""

    def test_images_stay_in_the_ball_repeat_and_leave_global_random_numbers_alone(
        self, name: str, trained: Trained
    ) -> None:
        """A radius between two pixel steps is rounded down: 12.9/255 moves 12 at most."""
        few = trained.test.first(8)
        made = registry.make([name], BUDGET)[name]
        np.random.seed(5)  # noqa: NPY002
        before = few.x.copy()
        found = made(trained.target(), few.x, few.y, epsilon=12.9 / 255, seed=3)
        drawn = np.random.random()  # noqa: NPY002
        np.random.seed(5)  # noqa: NPY002
        assert drawn == np.random.random()  # noqa: NPY002
        assert found.dtype == np.uint8 and np.array_equal(few.x, before)
        moved = np.abs(found.astype(int) - few.x.astype(int)).max()
        assert 0 < moved <= 12
        again = registry.make([name], BUDGET)[name]
        assert np.array_equal(
            found, again(trained.target(), few.x, few.y, epsilon=12.9 / 255, seed=3)
        )

    @pytest.mark.parametrize("epsilon", [0.0, 0.9 / 255])
    def test_less_than_a_pixel_step_gives_the_images_back(
        self, name: str, epsilon: float, trained: Trained
    ) -> None:
        few = trained.test.first(5)
        made = registry.make([name], BUDGET)[name]
        found = made(trained.target(), few.x, few.y, epsilon=epsilon, seed=0)
        assert np.array_equal(found, few.x) and found is not few.x

    def test_it_breaks_an_undefended_network(self, name: str, trained: Trained) -> None:
        """On the exported file: at 40/255 far below the clean accuracy."""
        few = trained.test.first(30)
        target = trained.target()
        made = registry.make([name], replace(BUDGET, queries=150))[name]
        clean = target.deployed(few.x, few.y)
        right = target.deployed(made(target, few.x, few.y, epsilon=40 / 255, seed=0), few.y)
        assert clean.mean() > 0.85
        assert right.mean() < clean.mean() - 0.15

    def test_parameters_can_be_trained_afterwards(self, name: str, trained: Trained) -> None:
        target = trained.target()
        few = trained.test.first(2)
        registry.make([name], BUDGET)[name](target, few.x, few.y, epsilon=0.1, seed=0)
        assert all(parameter.requires_grad for parameter in target.net.parameters())


def test_fgsm_moves_along_the_sign_of_the_gradient(trained: Trained) -> None:
    """Oracle: the definition, written out for one image."""
    net, x = trained.net, evaluate.tensor(trained.test.x[:1]).requires_grad_(True)
    y = torch.from_numpy(trained.test.y[:1])
    F.cross_entropy(value(net(x)), y).backward()
    assert x.grad is not None
    expected = (x + 0.1 * x.grad.sign()).clamp(0, 1)
    found = registry.make(["fgsm"], BUDGET)["fgsm"](
        trained.target(), trained.test.x[:1], trained.test.y[:1], epsilon=25.5 / 255, seed=0
    )
    assert np.abs(found / 255 - expected.detach().numpy()).max() <= 1 / 255


def test_square_sees_only_the_exported_file(trained: Trained) -> None:
    few = trained.test.first(5)
    target = replace(trained.target(), net=nn.Identity())  # would fail at the first look
    found = registry.make(["square"], BUDGET)["square"](target, few.x, few.y, epsilon=0.2, seed=0)
    assert not np.array_equal(found, few.x)


def test_logits_of_the_attacked_twin_never_tie(trained: Trained) -> None:
    """All equal ones come out a little apart, the first highest; the others as they were."""
    from resq_deploy.attack.toolbox import _Logits

    net, x = trained.net, evaluate.tensor(trained.test.x[:3])
    before = value(net(x)).double()
    assert (_Logits(net, 10)(x) - before).abs().max() <= 1.1e-6
    with torch.no_grad():
        layer = weight_layers(net)["fc"]
        layer.weight.zero_()  # type: ignore[union-attr, operator]
        layer.bias.zero_()  # type: ignore[union-attr, operator]
    assert (_Logits(net, 10)(x).diff(dim=1) < 0).all()


def test_square_runs_every_image_once_and_finds_what_it_found(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image a query, where ART asks for three; oracle: without a memory."""
    from resq_deploy.attack import toolbox

    few, queries = trained.test.first(6), 25
    plain = trained.target()
    ran: list[int] = []

    def counted(x: Any) -> Any:
        ran.append(len(x))
        return plain.scores(x)

    target = replace(plain, scores=counted)
    made = registry.make(["square"], replace(BUDGET, queries=queries))["square"]
    found = made(target, few.x, few.y, epsilon=0.02, seed=0)
    assert sum(ran) <= len(few) * (queries + 3)
    monkeypatch.setattr(
        toolbox, "_Scores", lambda target: lambda x: target.scores(toolbox._pixels(x))
    )
    ran.clear()
    assert np.array_equal(found, made(target, few.x, few.y, epsilon=0.02, seed=0))
    assert sum(ran) > 2 * queries


@pytest.mark.parametrize("name", ["apgd", "apgd-dlr"])
def test_apgd_runs_the_twin_once_a_step_and_finds_what_it_found(
    name: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every call a run of its own, nearly twice as many.

    Where the step size is halved, 8 times, APGD may go back to the best images.
    """
    from resq_deploy.attack import toolbox

    few, target, runs = trained.test.first(6), trained.target(), [0]
    target.net.register_forward_hook(lambda *_: runs.append(runs.pop() + 1))
    made = registry.make([name], replace(BUDGET, steps=8))[name]
    found = made(target, few.x, few.y, epsilon=0.02, seed=0)
    steps = toolbox.MORE_STEPS * 8
    assert runs[0] <= steps + 8 + 4, runs
    monkeypatch.setattr(toolbox._Logits, "forward", toolbox._Logits._run)
    runs[0] = 0
    assert np.array_equal(found, made(target, few.x, few.y, epsilon=0.02, seed=0))
    assert runs[0] >= 2 * steps - 2, runs


# ------------------------------------------------------------------------- the command


def test_result_counts_marks_worst_case_and_matrix(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    result = call(
        "attack", trained.model, "--twin", trained.twin, "--data", "digits", "--images", 24,
        "--eps", "10/255,20/255", "--attacks", "pgd,fgsm,square,apgd", "--steps", 2,
        "--queries", 20, "--rates", "1e-3,1e-2", "--draws", 2, "--json", out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    clean = found["clean_correct"]
    for i, worst in enumerate(found["worst"]):
        rows = [made["epsilons"][i] for made in found["attacks"].values()]
        for row in [*rows, worst]:
            assert row["epsilon"] == pytest.approx([10 / 255, 20 / 255][i])
            assert row["correct"].count("1") == row["deployed"]["n_correct"]
            assert len(row["correct"]) == row["deployed"]["n_total"] == 24
            accuracy = row["accuracy"]
            assert accuracy["low"] <= row["deployed"]["n_correct"] / 24 <= accuracy["high"]
        columns = zip(clean, *(row["correct"] for row in rows), strict=True)
        assert worst["correct"] == "".join(min(column) for column in columns)
    assert found["epsilons"] == found["attacks"]["pgd"]["epsilons"]
    assert found["attacks"]["square"]["white_box"] is False
    checks = {row["check"] for row in found["sanity"]}
    assert checks == {"more steps", "one step", "random restarts", "black box", "large radius"}
    assert "suspicious" not in {row["verdict"] for row in found["sanity"]}
    matrix = {(round(r["epsilon"] * 255), r["rate"]): r for r in found["matrix"]}
    assert set(matrix) == {(e, r) for e in (0, 10, 20) for r in (0, 1e-3, 1e-2)}
    assert matrix[0, 0]["mean"] == clean.count("1") / 24
    assert matrix[20, 0]["mean"] == found["worst"][1]["deployed"]["n_correct"] / 24
    for text in ("worst of each image", "random restarts", "bit error rate"):
        assert text in result.output


def test_the_matrix_has_the_patterns_of_inject(trained: Trained, tmp_path: Path) -> None:
    """Clean images under faults: the very campaign that `inject` runs."""
    few = trained.test.first(30)
    found = attacks.attack(
        trained.model, trained.twin, few, epsilons=[0.05], steps=1, check=False, rates=[0.01],
        draws=4, seed=7,
    )  # fmt: skip
    same = inject(trained.model, few, out=tmp_path / "s", rates=[0.01], draws=4, seed=7)
    row = next(r for r in found["matrix"] if r["epsilon"] == 0 and r["rate"] == 0.01)
    assert row["mean"] == same["per_rate"][0]["mean"] and row["n_patterns"] == 4
    counts = [trial.n_correct for trial in store.read([tmp_path / "s"])[1]]
    assert row["n_correct"] == counts


def test_a_finished_result_is_kept_until_an_option_changes(
    trained: Trained, tmp_path: Path
) -> None:
    few, out = trained.test.first(10), tmp_path / "attack.json"
    options: dict[str, Any] = {"epsilons": [0.1], "steps": 1, "check": False, "out": out}
    attacks.attack(trained.model, trained.twin, few, **options)
    artifacts.write_json(out, artifacts.read_json(out) | {"seen": True})
    assert attacks.attack(trained.model, trained.twin, few, **options)["seen"]
    assert "seen" not in attacks.attack(trained.model, trained.twin, few, **options | {"seed": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacks", "pgd,cw"], "attacks 'pgd,cw' given; expected different ones of fgsm, pgd"),
        (["--attacks", "pgd,pgd"], "expected different ones"),
        (["--eps", "2"], "epsilon must lie in [0, 1] (8/255 is 0.0314), got 2"),
        (["--eps", "0.1,0.1"], "one or more different radii"),
        (["--eps", "x"], "radii such as 2/255,0.03 expected"),
        (["--rates", "2"], "bit error rates must lie in (0, 1], got 2"),
        (["--rates", "0.1", "--draws", "0"], "draws must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, trained: Trained, tmp_path: Path
) -> None:
    out = tmp_path / "a.json"
    result = call(
        "attack", trained.model, "--twin", trained.twin, "--data", "digits", "--images", 4,
        "--json", out, *options, code=2,
    )  # fmt: skip
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not out.exists()


def test_labels_beyond_the_outputs_are_refused(trained: Trained) -> None:
    few = replace(trained.test.first(80), y=np.arange(80) % 11)
    with pytest.raises(InputError, match="labels up to 10, the model has 10 outputs"):
        attacks.attack(trained.model, trained.twin, few, epsilons=[0.1])
    with pytest.raises(InputError, match="labels up to 10, the model has 10 outputs"):
        bfa.bfa(trained.model, trained.twin, few, images=20, batch=20)


def another(trained: Trained, folder: Path) -> Path:
    """A checkpoint with one other weight than the twin."""
    net, facts = checkpoint.load(trained.twin)
    with torch.no_grad():
        weight_layers(net)["conv2"].weight[0, 0, 0, 0] += 1.0  # type: ignore[union-attr, operator, index]
    other = folder / "other.safetensors"
    checkpoint.save(other, net, inputs={}, quantized=True, net=facts["net"], stage="baseline")
    return other


def test_the_twin_of_another_file_is_named(trained: Trained, tmp_path: Path) -> None:
    """Its gradients break less: the file would look better than it is."""
    other = another(trained, tmp_path)
    few = trained.test.first(4)
    options: dict[str, Any] = {"epsilons": [0.1], "steps": 1, "check": False}
    assert attacks.attack(trained.model, trained.twin, few, **options)["warnings"] == []
    (warning,) = attacks.attack(trained.model, other, few, **options)["warnings"]
    assert "does not store the codes of conv2.weight" in warning
    shown = call(
        "attack", trained.model, "--twin", other, "--data", "digits", "--images", 4, "--eps", 0.1,
        "--steps", 1, "--no-sanity",
    )  # fmt: skip
    assert "conv2.weight" in shown.stderr


@pytest.mark.parametrize(
    "given",
    [{"encoding": "parity:nearest"}, {"profile": "po2-channel"}],
    ids=["encoding", "profile"],
)
def test_a_file_converted_by_export_has_a_twin_beside_its_manifest(
    trained: Trained, tmp_path: Path, given: dict[str, str]
) -> None:
    model = export(trained.twin, out=tmp_path / "bundle", images=trained.test, **given)
    few = trained.test.first(4)
    options: dict[str, Any] = {"epsilons": [0.1], "steps": 1, "check": False}
    found = attacks.attack(model, trained.twin, few, **options)
    assert found["warnings"] == []
    assert found["clean"]["twin"] == found["clean"]["deployed"]
    bfa.bfa(model, trained.twin, trained.test, images=20, flips=1, n_seeds=1, batch=20)
    elsewhere = tmp_path / "model.onnx"
    elsewhere.write_bytes(model.read_bytes())
    (warning,) = attacks.attack(elsewhere, trained.twin, few, **options)["warnings"]
    assert "leave the file beside its manifest.json" in warning


def test_images_of_another_type_are_refused(trained: Trained) -> None:
    floats = Dataset(name="floats", x=evaluate.as_float(trained.test.x[:4]), y=trained.test.y[:4])
    with pytest.raises(InputError, match=r"floats: uint8 images \(N, C, H, W\) expected"):
        attacks.attack(trained.model, trained.twin, floats, epsilons=[0.1])


def test_without_the_toolbox_one_line_says_what_to_install(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PGD needs nothing more; APGD prints the line that installs it, before any work."""
    for name in ("art", "art.attacks.evasion"):  # the second: where it was imported before
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "resq_deploy.attack.toolbox", raising=False)
    monkeypatch.delattr("resq_deploy.attack.toolbox", raising=False)
    assert registry.make(["fgsm", "pgd"], BUDGET)
    result = call(
        "attack", trained.model, "--twin", trained.twin, "--data", "digits", "--images", 2,
        "--steps", 1, "--attacks", "apgd", code=2,
    )  # fmt: skip
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and 'pip install "resq-deploy[attack]"' in lines[0]


# ------------------------------------------------------------------------- masked gradients


def marks(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


@pytest.mark.parametrize(
    ("weaker", "stronger", "verdict"),
    [
        ("1" * 20, "0" * 20, "ok"),
        ("0" * 20, "1" * 20, "suspicious"),  # p = 2e-6
        ("0" * 5 + "1" * 15, "1" * 20, "ok"),  # 5 against 0: p = 0.06
        ("01" * 10, "10" * 10, "ok"),
        ("0" * 20, "0" * 20, "ok"),
    ],
)
def test_a_comparison_is_suspicious_only_when_the_weaker_attack_wins_significantly(
    weaker: str, stronger: str, verdict: str
) -> None:
    row = sanity.compare("more steps", 0.1, ("a", marks(weaker)), ("b", marks(stronger)))
    assert row["verdict"] == verdict
    assert row["n_total"] == 20
    assert row["weaker"]["n_correct"] == weaker.count("1")


class Masked(nn.Module):
    """A network whose gradients are noise of its own making: attacks fail, accuracy stays."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return value(self.net(x)).detach() + 0 * x.flatten(1).sum(1, keepdim=True)


def test_masked_gradients_are_found(trained: Trained) -> None:
    """Gradients are zero: the black-box attack then wins, and a large radius leaves images."""
    few = trained.test.first(60)
    target = replace(trained.target(), net=Masked(trained.net))
    chosen = registry.make(["pgd", "square"], replace(BUDGET, queries=150))
    epsilon = 60 / 255
    correct = {
        name: {epsilon: target.deployed(made(target, few.x, few.y, epsilon=epsilon, seed=0), few.y)}
        for name, made in chosen.items()
    }
    found = sanity.checks(target, few.x, few.y, chosen, correct, seed=0, confidence=0.95)
    verdicts = {row["check"]: row["verdict"] for row in found}
    assert verdicts["black box"] == "suspicious" and verdicts["large radius"] == "suspicious"


def test_the_black_box_is_compared_with_attacks_that_use_gradients_alone(trained: Trained) -> None:
    """AutoAttack looks at the file too: what Square breaks, it breaks."""
    few, epsilon = trained.test.first(20), 0.1
    target = replace(trained.target(), net=Masked(trained.net))
    broken = {"autoattack": "0" * 20, "square": "0" * 20, "pgd": "1" * 20}
    correct = {name: {epsilon: marks(text)} for name, text in broken.items()}

    def compared(*names: str) -> list[dict[str, Any]]:
        chosen = registry.make(names, BUDGET)
        of = {name: correct[name] for name in names}
        rows = sanity.checks(target, few.x, few.y, chosen, of, seed=0, confidence=0.95)
        return [row for row in rows if row["check"] == "black box"]

    assert compared("autoattack", "square") == []  # it contains Square
    (row,) = compared("autoattack", "pgd", "square")
    assert row["weaker"]["attack"] == "Square-40" and row["verdict"] == "suspicious"


# ------------------------------------------------------------------------- adversarial bits


@pytest.fixture(scope="module")
def found(trained: Trained) -> dict[str, Any]:
    test = data.load("digits").test.first(250)
    return bfa.bfa(trained.model, trained.twin, test, images=200, flips=8, n_seeds=2, batch=48)


def test_results_of_attacks_become_a_page(
    found: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    attacked = attacks.attack(
        trained.model, trained.twin, trained.test.first(20), epsilons=(8 / 255,),
        attacks=("fgsm", "pgd"), steps=2, rates=(0.01,), draws=2,
    )  # fmt: skip
    for name, made in (("bfa.json", found), ("inputs.json", attacked)):
        (tmp_path / name).write_text(json.dumps(made))
    files = [tmp_path / "bfa.json", tmp_path / "inputs.json"]
    html = report(files, tmp_path / "page.html").read_text()
    shown = attacked["attacks"]["fgsm"]["epsilons"][0]["deployed"]["n_correct"]
    struck = found["searches"][0]["flips"][0]["tensor"]
    for part in ("bfa.json", "inputs.json", "FGSM", f"({shown}/20)", "more steps", "Searches"):
        assert part in html, part
    assert "Attack and fault together" in html and struck in html
    (tmp_path / "other.json").write_text('{"clean": 3}')
    with pytest.raises(InputError, match=r"other.json is not what `resq-deploy attack --json` or"):
        report([tmp_path / "other.json"], tmp_path / "page.html")


def test_the_page_has_the_confidence_and_the_warnings_of_the_result(
    found: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    attacked = attacks.attack(
        trained.model, trained.twin, trained.test.first(20), epsilons=(8 / 255,), steps=1,
        check=False, confidence=0.8,
    )  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(attacked | {"warnings": ["mind the twin"]}))
    (tmp_path / "b.json").write_text(json.dumps(found | {"confidence": 0.8}))
    page = report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "p.html").read_text()
    n = attacked["clean"]["deployed"]["n_correct"]
    interval = metrics.wilson(n, 20, 0.8)
    assert f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}] ({n}/20)" in page
    assert page.count("80 % intervals") == 2 and "mind the twin" in page
    assert found["confidence"] == 0.95


def test_bfa_does_more_harm_than_as_many_random_flips(found: dict[str, Any]) -> None:
    longest = max(found["searches"], key=lambda made: len(made["flips"]))
    worst_random = found["random"]["fault_accuracy"]["worst"]
    assert found["random"]["n_flips"] == len(longest["flips"])
    assert longest["flips"][-1]["n_correct"] / 200 < worst_random - 0.05


def test_bfa_repeats_and_draws_another_batch_for_another_search(
    found: dict[str, Any], trained: Trained
) -> None:
    test = data.load("digits").test.first(400)
    options: dict[str, Any] = {"images": 100, "flips": 2, "n_seeds": 2, "batch": 32}
    once = bfa.bfa(trained.model, trained.twin, test, **options)
    assert once == bfa.bfa(trained.model, trained.twin, test, **options)
    losses = [made["flips"][0]["loss"] for made in once["searches"]]
    assert losses[0] != losses[1]


def test_bfa_flips_distinct_stored_bits_and_the_twin_agrees_with_the_file(
    found: dict[str, Any], trained: Trained
) -> None:
    sizes = {f"{n}.weight": codes(m).numel() for n, m in weight_layers(trained.net).items()}
    for made in found["searches"]:
        sites = [(row["tensor"], row["offset"], row["bit"]) for row in made["flips"]]
        assert len(set(sites)) == len(sites) > 0
        for tensor, offset, bit in sites:
            assert 0 <= offset < sizes[tensor] and 0 <= bit < 8
        assert made["n_twin_differs"] <= 2  # parity: a rounding step apart


def test_a_search_ends_when_chance_is_reached(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a margin that puts the limit just below the clean accuracy, after the first flips."""
    monkeypatch.setattr(bfa, "MARGIN", 0.75)
    made = bfa.bfa(trained.model, trained.twin, trained.test, images=100, flips=9, n_seeds=1,
                   batch=32)  # fmt: skip
    counts = [row["n_correct"] for row in made["searches"][0]["flips"]]
    limit = made["limit"] * 100
    assert made["clean"]["n_correct"] > limit >= counts[-1]
    assert all(count > limit for count in counts[:-1])
    reached = {"n_reached": 1, "n_searches": 1, "mean": len(counts)}
    assert reached.items() <= made["flips_to_chance"].items()


def test_a_search_that_does_not_get_there_says_so(found: dict[str, Any]) -> None:
    limit = found["limit"] * found["n_images"]
    for made in found["searches"]:
        assert made["flips_to_chance"] is None and len(made["flips"]) == 8
        assert made["flips"][-1]["n_correct"] > limit
    assert found["flips_to_chance"] == {"n_reached": 0, "n_searches": 2, "more_than": 8}


def test_flips_replayed_by_inject_give_the_same_accuracy(
    found: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    """Oracle: the campaign of `inject --sites` with the reload engine."""
    path = tmp_path / "sites.csv"
    path.write_text(bfa.sites_csv(found))
    replayed = inject(trained.model, trained.test, out=tmp_path / "s", sites=path, engine="reload")
    last = [made["flips"][-1]["n_correct"] for made in found["searches"]]
    assert replayed["n_trials"] == len(last)
    assert replayed["fault_accuracy"]["mean"] == pytest.approx(np.mean(last) / 200)
    assert replayed["fault_accuracy"]["worst"] == min(last) / 200


def test_flips_change_the_loss_as_the_gradient_says(trained: Trained) -> None:
    """First order, for steps of 32 codes and more: below, logits round the change away."""
    net, batch = trained.net, trained.test.first(128)
    x, y = evaluate.tensor(batch.x), torch.from_numpy(batch.y)
    file = bfa._Attacked(trained.model.read_bytes(), batch)
    before = file.damage()
    ranked = [c for c in bfa.candidates(net, {}, x, y, 200) if c.layer != "conv1"]
    large = [c for bit in (5, 6, 7) for c in ranked if c.sites[0].bit == bit][::6]
    assert len(large) >= 15
    changes = [file.damage(c.sites) - before for c in large]
    assert np.mean(np.array(changes) > 0) >= 0.8
    assert np.corrcoef([c.gain for c in large], changes)[0, 1] > 0.5


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_damage_of_an_image_is_bounded(scale: float) -> None:
    """Right by far: 0; a tie of all: ln(n); wrong by far: the bound, 2 ln(n)."""
    scores = scale * torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    expected = {0.0: np.log(4), 1.0: (2 * np.log(np.e + 3) - 1) / 2, 1e4: np.log(4)}
    assert float(bfa.damage(scores, torch.tensor([0, 0]))) == pytest.approx(expected[scale])


def test_candidates_are_the_best_bits_of_each_layer(trained: Trained) -> None:
    """Oracle: gradient times scale times the change of code under `bits.flip`, for every bit."""
    net, batch = trained.net, trained.test.first(32)
    x, y = evaluate.tensor(batch.x), torch.from_numpy(batch.y)
    layer = weight_layers(net)["fc"]
    quantized = layer.quant_weight()  # type: ignore[operator]
    stored, scale = codes(layer).numpy(), quantized.scale.detach().numpy()
    with bfa._weight_values(net) as weights:
        bfa.damage(value(net(x)), y).backward()
    gradient = weights["fc"][0].grad
    assert gradient is not None
    step = [bits.flip(stored, bit=b).astype(int) - stored.astype(int) for b in range(8)]
    gains = np.stack([gradient.numpy() * scale * s for s in step]).reshape(8, -1)
    best = [c for c in bfa.candidates(net, {}, x, y, 5) if c.layer == "fc"]
    assert [c.gain for c in best] == pytest.approx(np.sort(gains, axis=None)[::-1][:5], rel=1e-4)
    assert all(
        gains[c.sites[0].bit, c.sites[0].offset] == pytest.approx(c.gain, rel=1e-4) for c in best
    )


def test_a_flipped_bit_is_not_a_candidate_again(trained: Trained) -> None:
    net, batch = trained.net, trained.test.first(32)
    x, y = evaluate.tensor(batch.x), torch.from_numpy(batch.y)
    first = bfa.candidates(net, {}, x, y, 1)[0]
    shape = weight_layers(net)[first.layer].weight.shape
    masks = first.flipped({}, shape)  # type: ignore[arg-type]
    mask = masks[first.layer].numpy()
    assert int(np.bitwise_count(mask.view(np.uint8)).sum()) == 1
    ((offset, bit),) = first.places
    struck = bits.flip_sites(np.zeros(mask.size, np.int8), [offset], [bit])
    assert struck.tolist() == mask.reshape(-1).tolist()
    again = bfa.candidates(net, masks, x, y, 10)
    assert (first.layer, first.places) not in {(c.layer, c.places) for c in again}


def slope_of_fc(net: nn.Module, trained: Trained) -> tuple[Tensor, Tensor, np.ndarray]:
    """Images, labels, and the rise of the damage for a code step of every weight of the layer."""
    batch = trained.test.first(32)
    x, y = evaluate.tensor(batch.x), torch.from_numpy(batch.y)
    with bfa._weight_values(net) as weights:
        bfa.damage(value(net(x)), y).backward()
    leaf, scale = weights["fc"]
    assert leaf.grad is not None
    return x, y, (leaf.grad * scale).numpy().reshape(-1)


def check_search(model: Path, trained: Trained, folder: Path, n_flips: tuple[int, ...]) -> None:
    """A search of 9 flips does more harm than random ones, and so says a replay of its flips."""
    found = bfa.bfa(model, trained.twin, trained.test, images=100, flips=9, n_seeds=1, batch=32)
    (made,) = found["searches"]
    assert len(made["flips"]) in n_flips and made["n_twin_differs"] <= 2
    assert made["flips"][-1]["n_correct"] < found["random"]["fault_accuracy"]["worst"] * 100
    path = folder / "sites.csv"
    path.write_text(bfa.sites_csv(found))
    replayed = inject(model, trained.test.first(100), out=folder / "s", sites=path, engine="reload")
    assert replayed["fault_accuracy"]["mean"] == made["flips"][-1]["n_correct"] / 100


def test_where_single_flips_are_corrected_several_bits_of_a_byte_flip(
    trained: Trained, tmp_path: Path
) -> None:
    """Oracle: every change of every byte of a layer, by what it is read as, for each flip."""
    model = export(trained.twin, out=tmp_path / "b", images=trained.test, encoding="hamming")
    net, _ = load_twin(model, trained.twin)
    kind, (x, y, slope) = parse_encoding("hamming"), slope_of_fc(net, trained)
    stored = kind.encode(codes(weight_layers(net)["fc"]).numpy()).reshape(-1).view(np.uint8)
    masks = np.arange(1, 256, dtype=np.uint8)[:, None]
    now, then = (kind.decode(at.view(np.int8)).astype(int) for at in (stored, stored ^ masks))
    gains = slope * (then - now) / np.bitwise_count(masks)
    best = [c for c in bfa.candidates(net, {}, x, y, 5) if c.layer == "fc"]
    assert [c.gain for c in best] == pytest.approx(np.sort(gains, axis=None)[::-1][:5], rel=1e-4)
    assert all(len(c.places) >= 2 for c in best)
    check_search(model, trained, tmp_path, (7, 8, 9))


@pytest.mark.parametrize("name", ["secded", "secded:zero"])
def test_where_a_word_corrects_single_flips_several_of_it_flip(
    name: str, trained: Trained, tmp_path: Path
) -> None:
    """Oracle: each pair of bits of every word of a layer, by what the word is read as.

    Where two seen flips zero the word, three that are taken for one do more.
    """
    model = export(trained.twin, out=tmp_path / "b", images=trained.test, encoding=name)
    net, _ = load_twin(model, trained.twin)
    kind, (x, y, slope) = parse_encoding(name), slope_of_fc(net, trained)
    stored = kind.encode(codes(weight_layers(net)["fc"]).numpy()).reshape(-1)
    assert stored.size % 8 == 0
    now, gains = kind.decode(stored).astype(int), []
    for first, second in combinations(range(64), 2):
        struck = stored.view(np.uint8).reshape(-1, 8).copy()
        for place in (first, second):
            struck[:, place // 8] ^= np.uint8(1 << place % 8)
        then = kind.decode(struck.reshape(-1).view(np.int8)).astype(int)
        gains.append((slope * (then - now)).reshape(-1, 8).sum(1) / 2)
    every = [c for c in bfa.candidates(net, {}, x, y, 10**6) if c.layer == "fc"]
    assert all(len({offset // 8 for offset, _ in c.places}) == 1 for c in every)
    pairs = {c.places[0][0] // 8: c.gain for c in every if len(c.places) == 2}
    expected = {word: gain for word, gain in enumerate(np.max(gains, axis=0)) if gain > 0}
    if not kind.zero:  # else the two are those that would do most if they were read
        assert pairs == pytest.approx(expected, rel=1e-4)
    triple = next(c for c in every if len(c.places) == 3)
    struck = stored.view(np.uint8).copy()
    for offset, bit in triple.places:
        struck[offset] ^= np.uint8(1 << bit)
    rise = slope * (kind.decode(struck.view(np.int8)).astype(int) - now)
    assert triple.gain == pytest.approx(rise.sum() / 3, rel=1e-4)
    assert (triple.gain > max(pairs.values())) == kind.zero
    check_search(model, trained, tmp_path, (8, 9))


def test_bytes_behind_whole_words_are_attacked_one_by_one() -> None:
    """They are stored as they are; a flip of a check bit of a whole word does nothing alone."""
    kind = parse_encoding("secded")
    stored = kind.encode(np.arange(-5, 6, dtype=np.int8))  # 8 and 3
    slope, none = np.ones(11), np.zeros(11, np.uint8)
    moves = list(bfa._in_words(kind, stored, none, slope, 2))
    (pair,) = [m for m in moves if len(m[1]) == 2]
    assert {offset for offset, _ in pair[1]} <= set(range(8)) and pair[0] == 64.0  # two signs
    singles = {(m[1][0], m[0]) for m in moves if len(m[1]) == 1}
    assert {s for s in singles if s[1] >= 64} == {((o, 6), 64.0) for o in (8, 9, 10)}


def test_sign_bit_of_a_mask_is_the_sign_bit(trained: Trained) -> None:
    """Flipping bit 7 fits into an int8 mask: -128."""
    made = Candidate(layer="fc", places=((1, 7),), gain=1.0).flipped({}, torch.Size([2, 2]))
    assert made["fc"].tolist() == [[0, -128], [0, 0]]


@pytest.mark.parametrize(
    ("y", "expected"), [([0, 1, 2, 3], 0.25), ([0, 0, 0, 1], 0.75)], ids=["even", "one label"]
)
def test_chance_is_what_guessing_gets(y: list[int], expected: float) -> None:
    assert bfa.chance(4, np.array(y)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flips": 0}, "flips, seeds and batch must be at least 1, got 0, 5 and 128"),
        ({"images": 150, "batch": 60}, "150 images to measure and 60 to attack with"),
        ({"batch": 200}, "none may be in both"),
        ({"images": 150, "batch": 50}, "which each of 5 searches would attack with"),
    ],
)
def test_bfa_with_a_wrong_option_is_refused(
    options: dict[str, Any], message: str, trained: Trained
) -> None:
    with pytest.raises(InputError, match=message):
        bfa.bfa(trained.model, trained.twin, trained.test, **options)


def test_bfa_refuses_a_twin_of_another_file(trained: Trained, tmp_path: Path) -> None:
    other = another(trained, tmp_path)
    with pytest.raises(InputError, match=r"does not store the codes of conv2.weight in the twin"):
        bfa.bfa(trained.model, other, trained.test, images=50, batch=50)


def test_bfa_command_writes_result_and_sites(trained: Trained, tmp_path: Path) -> None:
    sites, out = tmp_path / "sites.csv", tmp_path / "b.json"
    result = call(
        "bfa", trained.model, "--twin", trained.twin, "--data", "digits", "--images", 60,
        "--flips", 2, "--seeds", 1, "--batch", 16, "--sites-csv", sites, "--json", out,
    )  # fmt: skip
    made = json.loads(out.read_text())
    assert sites.read_text().splitlines()[0] == "Injection,Layer,TensorIndex,Bit"
    assert len(sites.read_text().splitlines()) == 1 + len(made["searches"][0]["flips"])
    assert "flips to chance" in result.output and "random flips" in result.output
