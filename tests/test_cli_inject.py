"""The command line of fault campaigns: results on standard output, one line for every error."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import models
from resq_deploy import store
from resq_deploy.cli import main
from resq_deploy.inject.evaluator import Evaluator

RUN = [
    sys.executable,
    "-c",
    # a test run in the background may have Ctrl-C ignored, which processes inherit
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from resq_deploy.cli import main; main()",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with m.onnx and d.npz."""
    (tmp_path / "m.onnx").write_bytes(models.quantized("qdq-channel"))
    data = models.data(12)
    np.savez(tmp_path / "d.npz", x=data.x, y=data.y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESQ_DATA", raising=False)
    return tmp_path


def call(*args: str, code: int = 0) -> str:
    """Standard output of a command that must end with `code`."""
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("resq-deploy: error: ")
        return lines[0]
    return result.stdout


def inject(*args: str, code: int = 0) -> str:
    return call("inject", "m.onnx", "--data", "d.npz", "--out", "s", *args, code=code)


def test_inject_prints_and_writes_the_same_campaign(folder: Path) -> None:
    shown = inject("--trials", "8", "--json", "r.json")
    found = json.loads((folder / "r.json").read_text())
    assert found["n_trials"] == 8
    assert f"{found['outcomes']['sdc']} sdc" in shown
    assert f"worst {100 * found['fault_accuracy']['worst']:.2f} %" in shown
    call("results", "s", "--json", "again.json", "--csv", "r.csv", "--sites-csv", "s.csv")
    assert json.loads((folder / "again.json").read_text()) == found
    assert len((folder / "r.csv").read_text().splitlines()) == 9
    assert len((folder / "s.csv").read_text().splitlines()) == 9


def test_a_sweep_shows_every_rate(folder: Path) -> None:
    shown = inject("--rates", "1e-3,1e-2", "--draws", "3")  # --fault ber goes without saying
    assert "6 of 6, ber" in shown
    assert "0.001" in shown and "0.01" in shown
    call("results", "s", "--csv", "r.csv", "--sites")
    assert "rate" in (folder / "r.csv").read_text().splitlines()[0]


def test_options_of_faults_protections_and_intervals(folder: Path) -> None:
    args = ["--target", "weight,bias", "--protect", "top:2", "--raw-fit", "700"]
    shown = inject("--trials", "20", *args, "--interval", "exact", "--json", "r.json")
    found = json.loads((folder / "r.json").read_text())
    assert found["targets"] == ["weight", "bias"]
    assert "Clopper-Pearson, 95 %" in shown and "FIT/Mbit" in shown
    assert "protection        top:2: 0 check bytes for 244 (0.0 %), 52 hardened" in shown
    assert found["outcomes"]["due"] == 0
    call("results", "s", "--raw-fit", "700", "--interval", "exact", "--json", "again.json")
    assert json.loads((folder / "again.json").read_text()) == found


def test_a_sequential_campaign_says_how_it_ended(folder: Path) -> None:
    shown = inject("--until-width", "0.4", "--json", "r.json")
    found = json.loads((folder / "r.json").read_text())
    assert f"corrected for {len(found['until']['looks'])} looks" in shown
    assert found["until"]["widths"][0] <= 0.4
    call("inject", "m.onnx", "--data", "d.npz", "--out", "t", "--fault", "ber", "--rates", "0.05")
    args = ["--fault", "ber", "--rates", "0.05", "--draws", "3", "--until-width", "0.001"]
    done = CliRunner().invoke(main, ["inject", "m.onnx", "--data", "d.npz", "--out", "u", *args])
    assert "still wider than 0.001: give more --draws" in done.stderr


def test_intervals_are_called_what_they_are(folder: Path) -> None:
    assert "(bootstrap over 5 patterns, 95 %)" in inject("--trials", "5")
    shown = inject("--margin", "0.4", "--per-layer", "--out", "strata")
    assert "(stratified, Wilson, 95 %)" in shown and "(stratified, normal, 95 %)" in shown


def test_parquet_has_the_rows_of_the_csv(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    inject("--fault", "ber", "--rates", "1e-3,1e-2", "--draws", "3")
    call("results", "s", "--csv", "r.csv", "--parquet", "r.parquet", "--sites")
    rows = parquet.read_table("r.parquet").to_pylist()
    for row, text in zip(rows, csv.DictReader((folder / "r.csv").open()), strict=True):
        assert list(row) == list(text)
        assert {k: "" if v is None else str(v) for k, v in row.items()} == text


def test_parquet_without_pyarrow_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject("--trials", "2")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = call("results", "s", "--parquet", "r.parquet", code=2)
    assert 'pip install "resq-deploy[report]"' in line


def test_inspect_shows_other_targets(folder: Path) -> None:
    shown = call("inspect", "m.onnx", "--target", "bias, scale")
    assert "b1_quantized" in shown and "float32" in shown and "w1_quantized" not in shown
    assert "expected some of weight" in call("inspect", "m.onnx", "--target", "x", code=2)


def test_shards_merge_and_compare(folder: Path) -> None:
    for i in (0, 1):
        args = ["--out", f"s{i}", "--trials", "6", "--shard", f"{i}/2"]
        call("inject", "m.onnx", "--data", "d.npz", *args)
    call("merge", "s0", "s1", "--out", "all", "--json", "m.json")
    assert json.loads((folder / "m.json").read_text())["n_trials"] == 6
    shown = call("compare", "all", "all", "--json", "c.json")
    assert "SDC in A only: 0 trials, in B only: 0 (exact McNemar test, p = 1)" in shown
    assert "+0.00 [+0.00, +0.00]" in shown
    assert json.loads((folder / "c.json").read_text())["n_paired"] == 6
    line = call("compare", "s0", "nothing", code=2)
    assert "nothing does not exist" in line


def test_inspect_and_verify(folder: Path) -> None:
    shown = call("inspect", "m.onnx", "--json", "i.json")
    assert "w1_quantized" in shown and "1568 bits" in shown and "QLinearConv" in shown
    assert json.loads((folder / "i.json").read_text())["n_bits"] == 1568
    (folder / "n.onnx").write_bytes(models.quantized("qdq-tensor"))
    args = ["--against", "n.onnx", "--data", "d.npz", "--json", "v.json"]
    shown = call("verify", "m.onnx", *args)
    found = json.loads((folder / "v.json").read_text())
    assert set(found["accuracy"]) == set(found["against"]) == {"off", "all"}
    assert f"{found['against']['all']['max_abs_diff']:g}" in shown
    assert found["against"]["all"]["max_abs_diff"] > 0
    own = call("verify", "m.onnx", "--against", "m.onnx", "--data", "d.npz")
    assert "against other, all: largest difference 0, same top-1 on 12/12" in own


def _save(name: str, x: np.ndarray) -> None:
    np.savez(name, x=x, y=np.zeros(len(x), np.int64))


X = models.data(4).x
BROKEN = {
    "missing model": (lambda: Path("m.onnx").unlink(), [], "m.onnx cannot be read"),
    "no ONNX": (lambda: Path("m.onnx").write_text("hello"), [], "not an ONNX model"),
    "empty model": (lambda: Path("m.onnx").write_bytes(b""), [], "not an ONNX model"),
    "truncated model": (
        lambda: Path("m.onnx").write_bytes(models.quantized("qdq-channel")[:-900]),
        [],
        "m",
    ),
    "folder as model": (lambda: (Path("m.onnx").unlink(), Path("m.onnx").mkdir()), [], "m.onnx"),
    "float model": (
        lambda: onnx.save(models.float_resnet(), "m.onnx"),
        [],
        "no 8-bit or 4-bit weights",
    ),
    "missing data": (lambda: Path("d.npz").unlink(), [], "d.npz cannot be read"),
    "no npz": (lambda: Path("d.npz").write_text("hello"), [], "d.npz cannot be read"),
    "unknown data": (lambda: None, ["--data", "mnist"], "'mnist' is unknown"),
    "no root": (lambda: None, ["--data", "cifar10"], "RESQ_DATA"),
    "too many images": (lambda: None, ["--images", "99"], "99 images asked for"),
    "wrong shape": (lambda: _save("d.npz", X.reshape(4, 6, 6, 1)), [], "of shape (N, 1, 6, 6)"),
    "wrong type": (lambda: _save("d.npz", X.astype(np.float64)), [], "the data has float64"),
    "NaN": (lambda: _save("d.npz", np.full_like(X, np.nan)), [], "NaN"),
    "no images": (lambda: _save("d.npz", X[:0]), [], "N > 0"),
    "store is a text": (lambda: Path("s").write_text("x" * 5000), ["--resume"], "not a database"),
    "no such fault": (lambda: None, ["--fault", "zap"], "'zap' is unknown"),
    "missing sites": (lambda: None, ["--sites", "none.csv"], "none.csv cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_input_is_one_line_and_code_2(folder: Path, name: str) -> None:
    breakage, args, message = BROKEN[name]
    breakage()
    plan = [] if "--sites" in args else ["--trials", "2"]
    assert message in inject(*plan, *args, code=2)


def test_one_line_from_the_real_process_too(folder: Path) -> None:
    """Nothing below Python (onnxruntime's logger) may write to standard error either."""
    model = onnx.load_model_from_string(models.quantized("qdq-channel"))
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, "m.onnx")
    args = ["inject", "m.onnx", "--data", "d.npz", "--out", "s", "--trials", "2"]
    done = subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "NoSuchOperator" in done.stderr


@pytest.mark.parametrize(
    "args",
    [["--engine", "slow"], ["--rates", "a,b"], ["--shard", "1"], ["--json", "no/r.json"],
     ["--memory", "much"], ["--memory", "infGiB"]],
)  # fmt: skip
def test_usage_errors_are_code_2(folder: Path, args: list[str]) -> None:
    assert f"Invalid value for '{args[0]}'" in inject("--trials", "1", *args, code=2)
    assert not Path("s").exists()


def test_resume_with_another_seed_names_the_field(folder: Path) -> None:
    inject("--trials", "2")
    assert "--resume" in inject("--trials", "2", code=2)
    assert "seed differs: 0 and 5" in inject("--trials", "2", "--seed", "5", "--resume", code=2)
    assert 'plan differs: {"kind":"random","trials":2}' in inject(
        "--trials", "3", "--resume", code=2
    )


def test_a_full_disk_is_one_line_and_code_2(folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    inject("--trials", "2")
    line = call("results", "s", "--csv", "/dev/full", code=2)
    assert "No space left on device" in line


def test_ctrl_c_is_one_line_and_code_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "observe", interrupt)
    assert "interrupted" in inject("--trials", "2", code=130)


def _running_workers(parent: int) -> list[int]:
    """Processes whose parent is (or was, when started) `parent`, by their session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                session = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3])
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except (OSError, IndexError):
                continue
            if session == parent and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_killed_in_the_middle_and_resumed_gives_the_same_store(
    folder: Path, number: signal.Signals, workers: str
) -> None:
    plan = ["--trials", "500", "--seed", "3"]
    inject(*plan, "--workers", "2")
    whole = store.read([Path("s")])[1]
    args = ["inject", "m.onnx", "--data", "d.npz", *plan, "--out", "k", "--workers", workers]
    process = subprocess.Popen(
        [*RUN, *args], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(3000):
        try:
            stored = len(store.read([Path("k")])[1])
        except ValueError:  # not created yet
            stored = 0
        if stored >= 5:
            break
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to all processes
    else:
        process.kill()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # whatever went wrong, nothing stays behind
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert [line for line in errors.splitlines() if "trials" not in line] == [
            "resq-deploy: error: interrupted; everything finished so far is kept"
        ]
    for _ in range(500):  # workers notice the death of their parent and follow
        if not _running_workers(process.pid):
            break
        time.sleep(0.02)
    assert _running_workers(process.pid) == []
    part = store.read([Path("k")])[1]
    assert 5 <= len(part) < 500
    call(*args, "--resume")
    assert store.read([Path("k")])[1] == whole


HEAVY = ["numpy", "scipy", "onnx", "onnxruntime", "torch", "tqdm", "tabulate"]


@pytest.mark.parametrize("args", [["--help"], ["inject", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    """The condition for answering in under 0.3 s, without a clock."""
    code = (
        "import sys\nfrom resq_deploy.cli import main\n"
        f"try: main({args!r})\nexcept SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_a_campaign_imports_no_training_library(folder: Path) -> None:
    args = ["inject", "m.onnx", "--data", "d.npz", "--out", "s", "--trials", "1"]
    banned = ["torch", "brevitas", "qonnx", "pydantic", "matplotlib"]
    code = (
        "import sys\nfrom resq_deploy.cli import main\n"
        f"try: main({args!r})\nexcept SystemExit as end: assert not end.code\n"
        f"print(sorted(set({banned!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
