"""The gate: every limit kept and missed, the exit codes, JUnit XML that build servers read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

import models
from resq_deploy import gate, store
from resq_deploy.cli import main
from resq_deploy.errors import InputError
from resq_deploy.gate.limits import LIMITS
from resq_deploy.inject import inject, results

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that can be measured on one small file; the JSON files in the writers' form."""
    folder = tmp_path_factory.mktemp("gate")
    model = folder / "m.onnx"
    model.write_bytes(models.quantized("qdq-channel"))
    data = models.data(20)
    inject(model, data, out=folder / "ber.store", rates=(1e-3, 1e-2), draws=12)
    inject(model, data, out=folder / "few.store", rates=(1e-2,), draws=9)
    inject(model, data, out=folder / "single.store", trials=60)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    pair = {"a": "torch", "b": "qonnx", "n_images": 100, "max_steps": 1}
    files = {
        "manifest": {
            "files": {"model.qdq.onnx": digest},
            "parity": [pair, {**pair, "max_steps": 0, "n_images": 50}],
            "weights": {"n_bytes": 1024},
        },
        "attack": {
            "model_sha256": digest,
            "clean": {"deployed": {"n_correct": 80, "n_total": 100}},
            "epsilons": [{"epsilon": 8 / 255, "deployed": {"n_correct": 40, "n_total": 100}}],
        },
        "clean": {"inputs": {"model_sha256": digest}, "n_correct": 900, "n_total": 1000},
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


EVIDENCE = ("ber.store", "single.store", "manifest.json", "attack.json", "clean.json")


def call(folder: Path, *args: str, files: tuple[str, ...] = EVIDENCE) -> Any:
    return CliRunner().invoke(main, ["gate", *(str(folder / name) for name in files), *args])


def refused(result: Any) -> str:
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    return line


# The far end of each interval, from what stands in the fixture: (options, name, that end).


def _row(folder: Path) -> dict[str, Any]:
    return results([folder / "ber.store"])["per_rate"][1]


CASES = {
    # Wilson at 95 %: 900 of 1,000 and 40 of 100, from Wilson's formula by hand
    "min-clean": (lambda f: 0.87985, ()),
    "min-accuracy": (lambda f: _row(f)["low"], ("--at-ber", "1e-2")),
    "max-sdc": (lambda f: results([f / "single.store"])["sdc_rate"]["high"], ()),
    "min-adversarial": (lambda f: 0.30943, ("--at-eps", "8/255")),
    "max-parity-steps": (lambda f: 1, ()),
    "max-weight-bytes": (lambda f: 1024, ()),
}


def test_every_limit_has_a_case() -> None:
    assert {name.replace("-", "_") for name in CASES} == set(LIMITS)


@pytest.mark.parametrize("name", CASES)
def test_a_limit_is_kept_and_missed_by_the_far_end_of_the_interval(folder: Path, name: str) -> None:
    end, extra = CASES[name]
    bound = end(folder)
    step = 1e-4 if bound < 1 else 1  # intervals by hand have four digits
    sign = 1 if name.startswith("min") else -1
    kept = bound if bound >= 1 else bound - sign * step
    assert call(folder, f"--{name}", str(kept), *extra).exit_code == 0
    result = call(folder, f"--{name}", str(bound + sign * step), *extra)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("resq-deploy: error: 1 of 1 limits missed: ")
    assert "FAIL" in result.stdout


ALL = (
    "--min-clean", "0.5", "--min-accuracy", "0,1", "--at-ber", "1e-3,1e-2", "--max-sdc", "1",
    "--min-adversarial", "0.9", "--at-eps", "8/255", "--max-parity-steps", "2",
    "--max-weight-bytes", "1KiB",
)  # fmt: skip


def test_junit_markdown_and_json_say_the_same(folder: Path, tmp_path: Path) -> None:
    names = ["--junit", "g.xml", "--markdown", "g.md", "--json", "g.json"]
    outputs = [str(tmp_path / n) if "." in n else n for n in names]
    assert call(folder, *ALL, *outputs).exit_code == 1
    suite = ElementTree.parse(tmp_path / "g.xml").getroot()
    cases = suite.findall("testcase")
    assert suite.tag == "testsuite" and suite.get("tests") == "7" == str(len(cases))
    failed = {str(c.get("name")) for c in cases if c.find("failure") is not None}
    assert failed == {"fault accuracy at BER 0.01", "adversarial accuracy at epsilon 8/255"}
    assert suite.get("failures") == "2" and suite.get("errors") == "0"
    found = json.loads((tmp_path / "g.json").read_text())
    assert {c["name"] for c in found["checks"] if not c["passed"]} == failed
    assert found["passed"] is False
    page = (tmp_path / "g.md").read_text()
    assert page.startswith("# Gate: 2 of 7 limits missed\n") and found["model_sha256"] in page
    assert page.count("**fail**") == 2 and page.count("| pass |") == 5
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert call(folder, *ALL, *outputs).exit_code == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


def test_limits_come_from_a_file_and_the_command_line_wins(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text('min-accuracy = [0.0, 1.0]\nat-ber = [1e-3, 1e-2]\nat-eps = "8/255"\n'
                    "min-adversarial = 0.0\nconfidence = 0.5\n")  # fmt: skip
    out = tmp_path / "g.json"
    result = call(folder, "--limits", str(file), "--json", str(out))
    assert result.exit_code == 1 and "fault accuracy at BER 0.01 is" in result.stderr
    found = json.loads(out.read_text())
    assert [c["limit"] for c in found["checks"]] == [0.0, 1.0, 0.0]
    assert {c["found"]["confidence"] for c in found["checks"]} == {0.5}
    assert call(folder, "--limits", str(file), "--min-accuracy", "0,0").exit_code == 0
    file.write_text("min-acuracy = 0.5\n")
    assert "unknown limit 'min-acuracy'; expected one of min-clean" in refused(
        call(folder, "--limits", str(file))
    )


def test_the_example_limits_are_valid() -> None:
    found = gate.read_file(ROOT / "docs/gate.example.toml")
    assert set(found) == {*LIMITS, "at_ber", "at_eps", "confidence"}


def test_clean_accuracy_is_that_of_the_most_images(folder: Path) -> None:
    evidence = gate.read([folder / "attack.json", folder / "clean.json"])
    (check,) = gate.check(evidence, {"min_clean": [0.5]})
    assert check.source.endswith("clean.json") and check.found.n == 1000


@pytest.mark.parametrize(
    ("files", "args", "message"),
    [
        (("single.store",), ("--min-accuracy", "0.5", "--at-ber", "1e-3"), "none has rates"),
        (("ber.store",), ("--min-accuracy", "0.5", "--at-ber", "1e-4"), "there are: 0.001, 0.01"),
        (("ber.store",), ("--max-sdc", "0.5"), "needs a store of single flips"),
        (("few.store",), ("--min-accuracy", "0.5", "--at-ber", "1e-2"), "has 9 patterns"),
        (("ber.store",), ("--max-parity-steps", "2"), "needs the manifest.json"),
        (("ber.store",), ("--max-weight-bytes", "2"), "needs the manifest.json"),
        (("ber.store",), ("--min-adversarial", "0.1", "--at-eps", "0.1"), "no attack is given"),
        (("attack.json",), ("--min-adversarial", "0.1", "--at-eps", "0.1"), "there are: 0.0313725"),
        (("manifest.json",), ("--min-clean", "0.1"), "--min-clean needs a campaign store"),
        (EVIDENCE, (), "no limit given"),
        (EVIDENCE, ("--min-accuracy", "0.5"), "--min-accuracy has 1 values and --at-ber 0"),
        (EVIDENCE, ("--min-clean", "85"), "--min-clean must lie in [0, 1], got 85"),
        (EVIDENCE, ("--min-clean", "nan"), "--min-clean must lie in [0, 1], got nan"),
        (("missing.store",), ("--min-clean", "0"), "does not exist"),
        (("m.onnx",), ("--min-clean", "0"), "file is not a database"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_one_line(
    folder: Path, files: tuple[str, ...], args: tuple[str, ...], message: str
) -> None:
    assert message in refused(call(folder, *args, files=files))


def test_evidence_of_another_file_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"x")
    line = refused(call(folder, "--min-clean", "0", "--model", str(other)))
    assert "measured on different files" in line and "other.onnx" in line


def test_half_a_campaign_and_a_shard_are_refused(folder: Path, tmp_path: Path) -> None:
    header, trials, _ = store.read([folder / "single.store"])
    with store.create(tmp_path / "half.store", header) as half:
        half.add(trials[:30], seconds=1.0)
    with pytest.raises(InputError, match=r"30 of 60 planned trials; finish it with inject"):
        gate.read([tmp_path / "half.store"])
    inject(folder / "m.onnx", models.data(20), out=tmp_path / "s.store", trials=4, shard=(0, 2))
    with pytest.raises(InputError, match=r"is shard 0/2 of a campaign; `merge`"):
        gate.read([tmp_path / "s.store"])


@pytest.mark.parametrize("text", ['{"parity": []}', '{"epsilons": 3}', "[]", "{}", '"parity"'])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="is no evidence"):
        gate.read([tmp_path / "x.json"])


def test_due_and_protected_campaigns_are_named(folder: Path, tmp_path: Path) -> None:
    inject(folder / "m.onnx", models.data(20), out=tmp_path / "p.store", rates=(1e-2,), draws=10,
           protection="parity")  # fmt: skip
    evidence = gate.read([folder / "ber.store", tmp_path / "p.store"])
    checks = gate.check(evidence, {"min_accuracy": [0.0], "at_ber": [1e-2]})
    assert [c.name for c in checks] == [
        "fault accuracy at BER 0.01", "fault accuracy at BER 0.01 (parity)"
    ]  # fmt: skip
    assert all(c.passed and np.isclose(c.limit, 0) for c in checks)
