"""The whole pipeline: same table twice, stages alone, interrupted anywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import write_recipe

from resq_deploy import artifacts, pipeline, recipe, store
from resq_deploy.cli import main
from resq_deploy.errors import InputError

STAGES = ("float", "baseline", "attack", "fault", "adjust")


def digests(run: Path) -> dict[str, str]:
    """Of everything that must repeat: checkpoints, exported files, the table."""
    files = [run / stage / "checkpoint.safetensors" for stage in STAGES]
    files += sorted((run / "export").glob("*/*.onnx"))
    files += [run / "table.json", run / "table.md"]
    return {str(f.relative_to(run)): artifacts.sha256(f) for f in files}


def test_same_recipe_and_seed_give_the_same_files_and_table_with_two_workers(
    tiny_run: Path, tmp_path: Path
) -> None:
    page = pipeline.run(recipe.load(write_recipe(tmp_path)), out=tmp_path / "run", workers=2)
    assert page.is_file()
    assert digests(tmp_path / "run") == digests(tiny_run)


def test_another_seed_gives_another_network(tiny_run: Path, tmp_path: Path) -> None:
    from resq_deploy.train import train

    loaded = recipe.load(write_recipe(tmp_path)).model_copy(update={"seed": 2})
    other = train(loaded, "float", out=tmp_path / "float")
    assert artifacts.sha256(other) != artifacts.sha256(tiny_run / "float/checkpoint.safetensors")


def test_unchanged_stages_are_not_run_again(tiny_run: Path, tmp_path: Path) -> None:
    """A second call only writes the report: no checkpoint, export or store is touched."""
    watched = [
        *tiny_run.glob("*/checkpoint.safetensors"),
        *tiny_run.glob("export/*/*.onnx"),
        *tiny_run.glob("prove/*/attack.json"),
    ]
    assert len(watched) == 5 + 8 + 4
    before = {path: path.stat().st_mtime_ns for path in watched}
    pipeline.run(recipe.load(write_recipe(tmp_path)), out=tiny_run, workers=1)
    assert {path: path.stat().st_mtime_ns for path in watched} == before


def test_a_stage_that_changed_nothing_takes_over_what_was_proved(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is attacked or struck again; the single flips, which only the last stage has, are."""
    out, began = tmp_path / "run", []
    shutil.copytree(tiny_run, out)
    shutil.rmtree(out / "prove" / "adjust")
    found = {stage: out / stage / "checkpoint.safetensors" for stage in pipeline.COMPARED}
    monkeypatch.setattr(pipeline, "harden", lambda *_, **__: found | {"adjust": found["fault"]})
    for name in ("attack", "inject"):
        real = getattr(pipeline, name)

        def watched(*args: Any, out: Path, real: Any = real, **options: Any) -> Any:
            began.append((out.parent.name, out.name, out.exists()))
            return real(*args, out=out, **options)

        monkeypatch.setattr(pipeline, name, watched)
    pipeline.run(recipe.load(write_recipe(tmp_path)), out=out, workers=1)
    last = [(name, there) for stage, name, there in began if stage == "adjust"]
    assert last == [("attack.json", True), ("ber.store", True), ("single.store", False)]
    for name in ("clean.json", "attack.json"):
        assert (out / "prove/adjust" / name).read_bytes() == (
            out / "prove/fault" / name
        ).read_bytes()
    trials = [store.read([out / "prove" / s / "ber.store"])[1] for s in ("fault", "adjust")]
    assert len(trials[0]) > 0 and trials[0] == trials[1]
    copies = [out / "prove/adjust" / name for name in ("clean.json", "attack.json", "ber.store")]
    before = [path.stat().st_mtime_ns for path in copies]
    pipeline._take_over(out / "prove/fault", out / "prove/adjust", fresh=False)
    assert [path.stat().st_mtime_ns for path in copies] == before
    copies[0].unlink()  # killed before the last of them
    pipeline._take_over(out / "prove/fault", out / "prove/adjust", fresh=False)
    assert all(path.stat().st_mtime_ns > then for path, then in zip(copies, before, strict=True))


def test_a_changed_field_reruns_its_stage_and_those_after_it_only(
    tiny_run: Path, tmp_path: Path
) -> None:
    from resq_deploy.train import train

    changed = recipe.load(write_recipe(tmp_path, attack={"lr": 0.011}))
    start = tiny_run / "float/checkpoint.safetensors"
    same = train(changed, "baseline", out=tiny_run / "baseline", start=start)
    assert same == tiny_run / "baseline/checkpoint.safetensors"
    other = train(changed, "attack", out=tmp_path / "attack", start=same)
    assert artifacts.sha256(other) != artifacts.sha256(tiny_run / "attack/checkpoint.safetensors")


def test_every_stage_is_its_own_command(tiny_run: Path, tmp_path: Path) -> None:
    """Stage by stage on the command line ends with the very bytes of `run`."""
    path, out = str(write_recipe(tmp_path)), tmp_path / "alone"
    last: list[str] = []
    for stage in STAGES[:4]:
        arguments = ["train", path, "--stage", stage, *last, "--out", str(out / stage)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        last = ["--from", str(out / stage / "checkpoint.safetensors")]
    for arguments in (
        ["adjust", last[1], "--recipe", path, "--out", str(out / "adjust")],
        ["export", str(out / "adjust/checkpoint.safetensors"), "--out", str(out / "export")],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    for name in (*(f"{s}/checkpoint.safetensors" for s in STAGES),):
        assert artifacts.sha256(out / name) == artifacts.sha256(tiny_run / name)
    assert artifacts.sha256(out / "export/model.qdq.onnx") == artifacts.sha256(
        tiny_run / "export/adjust/model.qdq.onnx"
    )


def test_attack_command_repeats_the_proof(tiny_run: Path, tmp_path: Path) -> None:
    arguments = [
        "attack", str(tiny_run / "export/adjust/model.qdq.onnx"),
        "--twin", str(tiny_run / "adjust/checkpoint.safetensors"), "--data", "digits",
        "--images", "60", "--eps", "0.05", "--steps", "2", "--seed", "1",
        "--json", str(tmp_path / "a.json"),
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    proof = artifacts.read_json(tiny_run / "prove/adjust/attack.json")
    assert json.loads((tmp_path / "a.json").read_text())["epsilons"] == proof["epsilons"]


def test_public_functions_are_where_the_documentation_says() -> None:
    import resq_deploy

    for name in ("harden", "export", "inject", "report", "run"):
        assert callable(getattr(resq_deploy, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = resq_deploy.nothing


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from resq_deploy.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_training_and_in_a_campaign_the_run_ends_with_the_same_table(
    tiny_run: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first epoch of stage 1, SIGINT in the first campaign, then to the end."""
    out = tmp_path / "run"
    arguments = ["run", str(write_recipe(tmp_path)), "--out", str(out), "--workers", "1"]
    first = _start(arguments)
    _wait_for(out / "attack/resume.json", first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "attack/checkpoint.safetensors").exists()
    second = _start(arguments)
    _wait_for(out / "prove/baseline/ber.store", second, 300)
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 130
    assert errors.decode().strip().splitlines()[-1].startswith("resq-deploy: error: interrupted")
    last = _start(arguments)
    last.communicate(timeout=600)
    assert last.returncode == 0
    assert digests(out) == digests(tiny_run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"nett": "x"}}, "model.nett: unknown field; expected one of net"),
        ({"fault": {"rate": 1.5}}, "fault.rate: Input should be less than 1, got 1.5"),
        ({"model": {"net": "resnet9"}}, "net 'resnet9' is unknown"),
        ({"data": {"name": "cifar10"}}, "RESQ_DATA"),
        ({"data": {"name": "mnist"}}, "data set 'mnist' is unknown"),
        ({"data": {"calibration": "none"}}, "none.toml cannot be read"),
        ({"float": {"checkpoint": "no.safetensors"}}, "float.checkpoint: no file"),
    ],
    ids=["key", "range", "net", "missing data", "unknown data", "manifest", "checkpoint"],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(
    changes: dict[str, dict[str, object]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RESQ_DATA", raising=False)
    path = write_recipe(tmp_path, **changes)
    result = CliRunner().invoke(main, ["run", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_template_is_a_valid_recipe() -> None:
    import tomllib

    result = CliRunner().invoke(main, ["recipe", "--template"])
    assert recipe.parse(tomllib.loads(result.output)).name == "my-model"


@pytest.mark.parametrize("path", sorted(Path("models").glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_workspace_are_valid(path: Path) -> None:
    result = CliRunner().invoke(main, ["recipe", "--check", str(path)])
    assert result.exit_code == 0, result.output


def test_manifest_of_another_data_set_is_refused(tmp_path: Path) -> None:
    from resq_deploy import data
    from resq_deploy.data import calibration

    loaded = recipe.load(write_recipe(tmp_path))
    (tmp_path / "calibration/tiny.toml").write_text('data = "cifar10"\nimages = 4\n')
    with pytest.raises(InputError, match="made for data set 'cifar10', the recipe uses 'digits'"):
        calibration.load(loaded.data, data.load("digits"))
    (tmp_path / "calibration/tiny.toml").write_text('data = "digits"\nimages = 9999\n')
    with pytest.raises(InputError, match="9999 images of split 'train' asked for; there are 797"):
        calibration.load(loaded.data, data.load("digits"))


def test_test_images_calibrate_only_where_there_are_no_others(tmp_path: Path) -> None:
    """Stage 3 chooses on the calibration images: the proof must be on others."""
    from resq_deploy import data
    from resq_deploy.data import calibration

    loaded = recipe.load(write_recipe(tmp_path))
    Path(loaded.data.calibration).write_text('data = "digits"\nsplit = "test"\nimages = 64\n')
    both = data.load("digits")
    with pytest.raises(InputError, match=r"split 'test' given; .* has training images"):
        calibration.load(loaded.data, both)
    alone = dataclasses.replace(both, train=None)
    assert len(calibration.load(loaded.data, alone)) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"weight_bits": 4}, "fault": {"encoding": "secded"}},
         "fault.encoding = secded is for 8-bit weights, not for model.weight_bits = 4"),
        ({"model": {"profile": "asymmetric-tensor"}, "fault": {"encoding": "guard:zero"}},
         "model.profile = asymmetric-tensor goes with 8-bit weights and fault.encoding = plain"),
        ({"model": {"profile": "asymmetric-tensor", "weight_bits": 4}}, "goes with 8-bit weights"),
        ({"fault": {"method": "advbet", "encoding": "secded:zero"}},
         "fault.method = advbet has no worst bit where fault.encoding = secded:zero corrects each"),
        ({"model": {"profile": "po2-channel"}, "adjust": {"activations": True}},
         "adjust.activations needs model.profile = float-channel, not po2-channel"),
        ({"model": {"profile": "po2-channel"}, "attack": {"graft": 0.1}},
         "attack.graft needs model.profile = float-channel, not po2-channel"),
        ({"attack": {"graft": 0.1, "epochs": 0}}, "graft = 0.1 is done at the start of this stage"),
        ({"export": {"weights": "int4"}}, "export.weights = int4 needs model.weight_bits = 4"),
    ],
)  # fmt: skip
def test_what_a_late_stage_would_refuse_is_refused_at_once(
    changes: dict[str, dict[str, object]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        recipe.load(write_recipe(tmp_path, **changes))


def test_a_network_without_int8_form_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    from resq_deploy.train import train

    model = {"net": "mobilenetv2", "width": 0.125, "profile": "po2-tensor"}
    loaded = recipe.load(write_recipe(tmp_path, model=model))
    with pytest.raises(InputError, match="ReLU6 saturates at 6"):
        train(loaded, "float", out=tmp_path / "float")
    assert not (tmp_path / "float").exists()
