"""Campaigns: a trial is what its number says, however and wherever it runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import models
from resq_deploy import metrics, progress, runtime, store
from resq_deploy.data import Dataset
from resq_deploy.errors import HeaderMismatch, InputError
from resq_deploy.inject import campaign, compare, inject, results, rows, write_csv, write_sites
from resq_deploy.inject.discovery import discover
from resq_deploy.inject.evaluator import Evaluator
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.reload import Reload
from resq_deploy.records import Site

DATA = models.data(12)
SWEEP = {"fault": "ber", "rates": [1e-3, 0.02], "draws": 5}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    return file


def trials(path: Path) -> list:
    return store.read([path])[1]


@pytest.mark.parametrize("name", models.ALL)
def test_every_kind_of_file_runs(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.quantized(name))
    found = inject(file, DATA, out=tmp_path / "s", trials=12)
    assert found["n_trials"] == sum(found["outcomes"].values()) == 12
    assert found["outcomes"]["masked"] < 12
    assert sum(found["outcomes_images"].values()) == 12 * len(DATA)


def test_counts_equal_a_plain_loop(model: Path, tmp_path: Path) -> None:
    """Golden run, corrupt, compare: written out once more without the campaign."""
    inject(model, DATA, out=tmp_path / "s", trials=20, seed=4)
    found = discover(onnx.load(model))
    engine = Reload(found.model, found.space, DATA.x)
    golden = engine.run({})
    for trial in trials(tmp_path / "s"):
        output = engine.run(Memory.of(found).read(np.array([found.space.flat(trial.site)])))
        top1 = output.argmax(1)
        assert trial.n_correct == (top1 == DATA.y).sum()
        assert trial.n_sdc == (top1 != golden.argmax(1)).sum()
        assert trial.n_changed == (output != golden).any(1).sum()


def test_exhaustive_visits_every_bit_exactly_once(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.quantized("qdq-matmul"))
    found = inject(file, models.data(2), out=tmp_path / "s", exhaustive=True)
    sites = [t.site for t in trials(tmp_path / "s")]
    assert len(set(sites)) == len(sites) == found["n_bits"] == 1600
    assert [row["n_trials"] for row in found["per_bit"]] == [200] * 8
    assert [row["n_trials"] for row in found["per_layer"]] == [1440, 160]
    per_layer_bit = [(row["tensor"], row["bit"]) for row in found["per_layer_bit"]]
    assert per_layer_bit == [(t, b) for t in ("m1_quantized", "m2_quantized") for b in range(8)]
    # high bits must matter more than low ones, or bits are numbered the wrong way round
    rates = [row["sdc_rate"]["value"] for row in found["per_bit"]]
    assert rates[7] > 2 * rates[1]


@pytest.mark.parametrize("options", [{"trials": 11}, {"trials": 5, "fault": "k:3"}, SWEEP])
def test_workers_shards_and_resume_give_the_same_trials(
    model: Path, tmp_path: Path, options: dict
) -> None:
    one = inject(model, DATA, out=tmp_path / "one", seed=7, **options)
    two = inject(model, DATA, out=tmp_path / "two", seed=7, workers=2, **options)
    expected = trials(tmp_path / "one")
    assert trials(tmp_path / "two") == expected
    shards = [tmp_path / f"shard{i}" for i in range(3)]
    for i, path in enumerate(shards):
        inject(model, DATA, out=path, seed=7, shard=(i, 3), **options)
        assert {t.trial % 3 for t in trials(path)} == {i}
    store.merge(shards, tmp_path / "merged")
    assert trials(tmp_path / "merged") == expected
    for found in (two, results(shards), results([tmp_path / "merged"])):
        found = {**found, "seconds": one["seconds"]}
        assert json.dumps(found) == json.dumps(one)


def test_workers_that_cannot_start_end_the_campaign(tmp_path: Path) -> None:
    """More data than a pipe holds, and a main module that workers cannot import."""
    (tmp_path / "model.onnx").write_bytes(models.quantized("qdq-channel"))
    np.savez(tmp_path / "data.npz", x=models.data(600).x, y=models.data(600).y)
    script = (
        "from pathlib import Path; from resq_deploy import inject; from resq_deploy.data import "
        "load_test; inject(Path('model.onnx'), load_test('data.npz', None), out=Path('s'), "
        "trials=9, workers=2)"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=script, cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "a worker process died" in done.stderr and "__main__" in done.stderr


def test_resume_runs_only_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(model, DATA, out=tmp_path / "whole", trials=9)
    whole, ran = trials(tmp_path / "whole"), []
    original = Evaluator.observe

    def interrupted(self: Evaluator, number: int):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(number)
        return original(self, number)

    monkeypatch.setattr(Evaluator, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inject(model, DATA, out=tmp_path / "s", trials=9)
    assert trials(tmp_path / "s") == whole[:4]
    ran.append(-1)  # no interrupt any more
    found = inject(model, DATA, out=tmp_path / "s", trials=9, resume=True)
    assert ran == [0, 1, 2, 3, -1, 4, 5, 6, 7, 8]
    assert trials(tmp_path / "s") == whole
    assert found["warnings"] == []


def test_an_incomplete_campaign_says_so(model: Path, tmp_path: Path) -> None:
    inject(model, DATA, out=tmp_path / "s", trials=4, shard=(0, 2))
    with store.open_store(tmp_path / "s") as opened:
        opened._db.execute("DELETE FROM trials WHERE trial = 2")
        opened._db.commit()
    assert results([tmp_path / "s"])["warnings"] == ["1 of 2 planned trials are missing"]


def test_single_flips_are_prefix_stable(model: Path, tmp_path: Path) -> None:
    inject(model, DATA, out=tmp_path / "few", trials=3)
    inject(model, DATA, out=tmp_path / "many", trials=8)
    assert trials(tmp_path / "many")[:3] == trials(tmp_path / "few")


def test_a_rate_gives_the_same_patterns_in_every_sweep(model: Path, tmp_path: Path) -> None:
    inject(model, DATA, out=tmp_path / "a", fault="ber", rates=[0.01], draws=4)
    inject(model, DATA, out=tmp_path / "b", fault="ber", rates=[0.1, 0.01, 0.5], draws=6)

    def at_rate(path: Path) -> list:
        return [(t.n_flips, t.n_correct, t.n_changed) for t in trials(path) if t.rate == 0.01]

    assert at_rate(tmp_path / "b")[:4] == at_rate(tmp_path / "a")


def test_a_sweep_is_summarized_by_rate(model: Path, tmp_path: Path) -> None:
    rates = [0.0, 1e-3, 0.05]
    found = inject(model, DATA, out=tmp_path / "s", fault="ber", rates=rates, draws=6)
    assert [row["rate"] for row in found["per_rate"]] == rates
    none, _, many = found["per_rate"]
    golden = found["golden"]["n_correct"] / found["golden"]["n_total"]
    assert (none["mean"], none["worst"], none["mean_flips"]) == (golden, golden, 0)
    assert none["n"] == many["n"] == 6
    assert 1568 * 0.05 / 2 < many["mean_flips"] < 1568 * 0.05 * 2
    for row in found["per_rate"]:
        assert row["worst"] <= row["q05"] <= row["mean"]
        assert row["low"] <= row["mean"] <= row["high"]


def test_the_statistical_plan_has_the_size_of_the_formula(model: Path, tmp_path: Path) -> None:
    found = inject(model, models.data(2), out=tmp_path / "s", margin=0.2, confidence=0.9)
    n = metrics.sample_size(1568, 0.2, 0.9)
    assert found["n_trials"] == found["fault_accuracy"]["n"] == n
    assert found["fault_accuracy"]["confidence"] == found["sdc_rate"]["confidence"] == 0.9


def test_sites_are_written_and_read_again(model: Path, tmp_path: Path) -> None:
    for i, options in enumerate([{"trials": 6}, {"trials": 4, "fault": "k:3"}]):
        a, b, file = tmp_path / f"a{i}", tmp_path / f"b{i}", tmp_path / f"{i}.csv"
        inject(model, DATA, out=a, **options)
        write_sites([a], file)
        assert file.read_text().splitlines()[0] == "Injection,Layer,TensorIndex,Bit"
        inject(model, DATA, out=b, sites=file)
        assert trials(b) == trials(a)


def test_csv_has_a_row_a_trial_and_draws_sites_again(model: Path, tmp_path: Path) -> None:
    inject(model, DATA, out=tmp_path / "s", seed=2, **SWEEP)
    write_csv([tmp_path / "s"], tmp_path / "plain.csv")
    write_csv([tmp_path / "s"], tmp_path / "sites.csv", sites=True)
    plain, sites = (
        list(csv.DictReader((tmp_path / name).open())) for name in ("plain.csv", "sites.csv")
    )
    assert ",".join(plain[0]) == ",".join(rows.COLUMNS)
    assert len(plain) == 10
    found = discover(onnx.load(model))
    engine = Reload(found.model, found.space, DATA.x)
    golden = engine.run({})
    for bare, row in zip(plain, sites, strict=True):
        hit = [row[name].split(";") if row[name] else [] for name in ("tensor", "offset", "bit")]
        assert {len(column) for column in hit} == {int(row["n_flips"])}
        if int(row["n_flips"]) > 1:
            assert bare["tensor"] == bare["offset"] == bare["bit"] == ""
        starts = dict(zip([t.name for t in found.space.tensors], found.space.starts, strict=False))
        flat = [starts[t] + 8 * int(o) + int(b) for t, o, b in zip(*hit, strict=True)]
        output = engine.run(Memory.of(found).read(np.array(flat, np.int64)))
        assert int(row["n_changed"]) == metrics.changed(golden, output).sum()


def test_the_csv_begins_with_the_agreed_columns(model: Path, tmp_path: Path) -> None:
    inject(model, DATA, out=tmp_path / "s", trials=2)
    write_csv([tmp_path / "s"], tmp_path / "c.csv")
    first = (tmp_path / "c.csv").read_text().splitlines()[0]
    agreed = "trial,tensor,offset,bit,n_flips,n_total,n_correct,n_sdc,n_changed"
    later = "rate,n_sdc5,n_nonfinite,margin_lost,margin_worst,outcome"
    assert first == f"{agreed},{later}"


def test_site_files_of_other_tools_may_hold_tuple_indices(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sites.csv"
    file.write_text(
        'Injection,Layer,TensorIndex,Bit\n4,w2_quantized,"(3, 1, 0, 2)",7\n4,w1_quantized,0,0\n'
        "9,w1_quantized,35,1\n",
        encoding="utf-8-sig",  # as spreadsheets write it
    )
    inject(model, DATA, out=tmp_path / "s", sites=file)
    first, second = trials(tmp_path / "s")
    assert (first.trial, first.n_flips, first.site) == (4, 2, None)
    assert (second.trial, second.site.offset) == (9, 35)
    write_sites([tmp_path / "s"], tmp_path / "out.csv")
    assert f"4,w2_quantized,{3 * 36 + 1 * 9 + 0 * 3 + 2},7" in (tmp_path / "out.csv").read_text()


@pytest.mark.parametrize(
    "line, message",
    [
        ("0,nothing,0,0", "line 2: no tensor 'nothing'"),
        ('0,nothing,"(1, 2)",0', "line 2: no tensor 'nothing'"),
        ("0,w1_quantized,36,0", "line 2: .*offset 36"),
        ("0,w1_quantized,0,8", "line 2: .*bit 8"),
        ("0,w1_quantized,x,0", "line 2"),
        ('0,w1_quantized,"(9, 0, 0, 0)",0', "line 2"),
        ('0,w1_quantized,"(1, 2)",0', r"line 2: index \(1, 2\) given for the shape \(4, 1, 3, 3\)"),
        ("-1,w1_quantized,0,0", "line 2: Injection -1"),
        ("0,w1_quantized,0", "line 2"),
        ("0,w1_quantized,0,0\n0,w1_quantized,0,0", "twice"),
        ("", "lists no sites"),
    ],
)
def test_wrong_sites_are_refused_with_their_line(
    model: Path, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "sites.csv"
    file.write_text(f"Injection,Layer,TensorIndex,Bit\n{line}\n")
    with pytest.raises(InputError, match=message):
        inject(model, DATA, out=tmp_path / "s", sites=file)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "no plan given"),
        ({"trials": 3, "margin": 0.1}, "--trials and --margin given"),
        ({"trials": 0}, "--trials 0"),
        ({"trials": 1569}, "1 to 1568"),
        (
            {"fault": "single", "rates": [0.1]},
            "single with --rates given; single goes with --trials or --margin",
        ),
        ({"fault": "ber", "trials": 3}, "ber with --trials given; ber goes with --rates$"),
        ({"fault": "0to1", "margin": 0.1}, "0to1 goes with --rates$"),
        (
            {"fault": "burst:4", "exhaustive": True},
            "burst:4 goes with --trials or --margin or --until-width$",
        ),
        ({"fault": "byte", "trials": 196 * 255 + 1}, "1 to 49980"),
        ({"fault": "adjacent:1153", "trials": 1}, "no tensor has so many"),
        ({"fault": "ber", "rates": [0.1, 2]}, r"lie in \[0, 1\]"),
        ({"fault": "ber", "rates": [0.1, float("nan")]}, r"lie in \[0, 1\]"),
        ({"fault": "ber", "rates": [0.1, 0.1]}, "distinct"),
        ({"fault": "ber", "rates": [0.1], "draws": 0}, "--draws"),
        ({"trials": 3, "draws": 3}, "--draws 3 given without --rates"),
        (
            {"fault": "k:2", "exhaustive": True},
            "k:2 goes with --trials or --margin or --until-width$",
        ),
        ({"fault": "k:2000", "trials": 3}, "2000 flips asked for"),
        ({"margin": 1.5}, "margin"),
        ({"trials": 3, "engine": "slow"}, "engine 'slow' does not exist"),
        ({"trials": 3, "workers": 0}, "--workers"),
        ({"trials": 3, "workers": 2, "scheduler": "tcp://127.0.0.1:9"}, "--scheduler"),
        ({"trials": 3, "seed": -1}, "--seed"),
        ({"trials": 3, "shard": (2, 2)}, "--shard 2/2"),
        ({"trials": 3, "confidence": 1.0}, "confidence"),
    ],
)
def test_options_that_make_no_campaign_are_refused(
    model: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        inject(model, DATA, out=tmp_path / "s", **options)


def test_compare_pairs_the_same_faults(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(models.quantized("qdq-tensor"))  # same sizes, other codes
    a, b = tmp_path / "a", tmp_path / "b"
    found = [inject(m, DATA, out=out, **SWEEP) for m, out in [(model, a), (other, b)]]
    paired = compare(a, b)
    rows = zip(trials(a), trials(b), strict=True)
    points = [100 * (y.n_correct - x.n_correct) / len(DATA) for x, y in rows]
    assert paired["n_paired"] == 10
    assert paired["difference"]["mean"] == pytest.approx(np.mean(points))
    for i, row in enumerate(paired["per_rate"]):
        means = [f["per_rate"][i]["mean"] for f in found]
        assert row["mean"] == pytest.approx(100 * (means[1] - means[0]))
        assert row["low"] <= row["mean"] <= row["high"]
    same = compare(a, a)
    assert (same["difference"]["low"], same["difference"]["high"]) == (0, 0)


def test_compare_tests_pairs_exactly(model: Path, tmp_path: Path) -> None:
    """Discordant trials and p values against the trials of both stores."""
    other = tmp_path / "other.onnx"
    other.write_bytes(models.quantized("qdq-tensor"))
    a, b = tmp_path / "a", tmp_path / "b"
    for file, out in ((model, a), (other, b)):
        inject(file, DATA, out=out, **{**SWEEP, "draws": 12})
    paired = compare(a, b)
    hits = [
        (x.outcome == "sdc", y.outcome == "sdc") for x, y in zip(trials(a), trials(b), strict=True)
    ]
    only = hits.count((True, False)), hits.count((False, True))
    assert (paired["sdc"]["only_a"], paired["sdc"]["only_b"]) == only
    assert paired["sdc"]["p_value"] == metrics.mcnemar(*only)
    assert sum(row["sdc"]["only_b"] for row in paired["per_rate"]) == only[1]
    assert sum(v for k, v in paired["sdc"].items() if k != "p_value") == len(hits) == 24
    assert 0 < paired["per_rate"][1]["p_value"] <= 1
    same = compare(a, a)
    assert same["sdc"]["p_value"] == same["difference"]["p_value"] == 1.0


def test_compare_weights_strata(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(models.quantized("qdq-tensor"))
    a, b = tmp_path / "a", tmp_path / "b"
    for file, out in ((model, a), (other, b)):
        inject(file, DATA, out=out, margin=0.2, per_layer=True)
    found = [results([path])["fault_accuracy"]["mean"] for path in (a, b)]
    assert compare(a, b)["difference"]["mean"] == pytest.approx(100 * (found[1] - found[0]))


def test_immune_bits_are_compared_on_the_same_faults(model: Path, tmp_path: Path) -> None:
    for name in ("none", "top:2", "parity"):
        inject(model, DATA, out=tmp_path / name, protection=name, **SWEEP)
    assert compare(tmp_path / "none", tmp_path / "top:2")["n_paired"] == 10
    with pytest.raises(HeaderMismatch, match="space differs"):
        compare(tmp_path / "none", tmp_path / "parity")


@pytest.mark.parametrize(
    "field, change",
    [
        ("seed", {"seed": 1}),
        ("plan", {"draws": 4}),
        ("data_sha256", {"data": models.data(12, seed=9)}),
    ],
)
def test_compare_refuses_other_faults_and_images(
    model: Path, tmp_path: Path, field: str, change: dict
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    inject(model, DATA, out=a, **SWEEP)
    options = {**SWEEP, **change}
    inject(model, options.pop("data", DATA), out=b, **options)
    with pytest.raises(HeaderMismatch, match=f"{field} differs"):
        compare(a, b)


def test_faults_that_change_nothing_are_reported(model: Path, tmp_path: Path) -> None:
    """All images black: the first convolution multiplies nothing but zeros."""
    black = Dataset(name="black", x=np.zeros_like(DATA.x), y=DATA.y)
    file = tmp_path / "sites.csv"
    file.write_text("Injection,Layer,TensorIndex,Bit\n0,w1_quantized,0,7\n")
    found = inject(model, black, out=tmp_path / "s", sites=file)
    assert found["outcomes"] == {"masked": 1, "benign": 0, "sdc": 0, "due": 0}
    assert any("no fault changed any output" in warning for warning in found["warnings"])


def test_a_golden_run_that_does_not_repeat_is_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "_golden_repeats", lambda job, found: False)
    found = inject(model, DATA, out=tmp_path / "s", trials=2)
    assert any("two runs without faults differ" in warning for warning in found["warnings"])


def test_a_cpu_that_saturates_is_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = runtime.cpu_features("flags : avx2", "x86_64")
    monkeypatch.setattr(runtime, "cpu_features", lambda: old)
    found = inject(model, DATA, out=tmp_path / "s", trials=2)
    assert found["cpu"]["x64quantprecision"] is True
    assert any("VNNI" in warning for warning in found["warnings"])


def test_progress_counts_every_trial(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inject(model, DATA, out=tmp_path / "s", trials=3, show=progress.bar)
    captured = capsys.readouterr()
    assert "3/3 trials" in captured.err
    assert captured.out == ""


def test_summary_has_the_agreed_fields(model: Path, tmp_path: Path) -> None:
    found = inject(model, DATA, out=tmp_path / "s", trials=6)
    agreed = (
        "model_sha256 data_sha256 n_images golden engine fault n_trials outcomes outcomes_images "
        "fault_accuracy per_layer per_bit per_layer_bit per_rate sdc_rate seconds versions cpu "
        "warnings"
    ).split()
    assert set(agreed) <= set(found)
    assert set(found["golden"]) == {"n_correct", "n_total"}
    assert {"mean", "low", "high", "confidence", "worst", "n"} <= set(found["fault_accuracy"])
    json.dumps(found, allow_nan=False)
    by_outcome = Counter(t.outcome for t in trials(tmp_path / "s"))
    assert found["outcomes"] == {k: by_outcome[k] for k in ("masked", "benign", "sdc", "due")}
    assert found["sdc_rate"]["value"] == found["outcomes"]["sdc"] / 6


# --------------------------------------------------------------------------- targets, faults


FAULTS = {
    "adjacent:3": {"trials": 6},
    "burst:8": {"trials": 6},
    "byte": {"trials": 6},
    "stuck0": {"trials": 6},
    "stuck1": {"rates": [0.01], "draws": 4},
    "0to1": {"rates": [0.01], "draws": 4},
    "1to0": {"rates": [0.01], "draws": 4},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_model_runs_and_its_sites_are_drawn_again(
    model: Path, tmp_path: Path, fault: str
) -> None:
    """The struck sites, applied by hand to the stored codes, give the counts of the store."""
    inject(
        model, DATA, out=tmp_path / "s", fault=fault, targets=["weight", "bias"], **FAULTS[fault]
    )
    write_csv([tmp_path / "s"], tmp_path / "c.csv", sites=True)
    found = discover(onnx.load(model), ["weight", "bias"])
    memory, engine = Memory.of(found), Reload(found.model, found.space, DATA.x)
    golden = engine.run({})
    for row in csv.DictReader((tmp_path / "c.csv").open()):
        hit = [row[name].split(";") if row[name] else [] for name in ("tensor", "offset", "bit")]
        sites = [Site(tensor=t, offset=int(o), bit=int(b)) for t, o, b in zip(*hit, strict=True)]
        cells = np.array([found.space.flat(site) for site in sites], np.int64)
        source = {"stuck0": 1, "stuck1": 0, "0to1": 0, "1to0": 1}.get(fault)
        flips = cells if source is None else cells[memory.bits(cells) == source]
        assert len(flips) == int(row["n_flips"])
        output = engine.run(memory.read(flips))
        assert metrics.changed(golden, output).sum() == int(row["n_changed"])


def test_stuck_cells_may_be_listed(model: Path, tmp_path: Path) -> None:
    a, b, file = tmp_path / "a", tmp_path / "b", tmp_path / "sites.csv"
    inject(model, DATA, out=a, fault="stuck1", trials=20)
    write_sites([a], file)
    found = inject(model, DATA, out=b, fault="stuck1", sites=file)
    assert found["fault"] == "stuck1"
    assert trials(b) == trials(a)
    assert {t.n_flips for t in trials(a)} == {0, 1}
    assert all(t.site is not None for t in trials(a)), "cells that do not change count too"
    assert results([b])["n_trials"] == 20


def test_a_file_that_onnxruntime_refuses_is_an_outcome(tmp_path: Path) -> None:
    """A scale that becomes infinite: QDQ files load, but no bias fits it any more."""
    file = tmp_path / "model.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    found = inject(file, DATA, out=tmp_path / "s", targets=["scale"], exhaustive=True)
    due = [t for t in trials(tmp_path / "s") if t.outcome == "due"]
    assert found["outcomes"]["due"] == len(due) > 0
    assert {(t.n_correct, t.n_sdc, t.n_changed) for t in due} == {(0, 0, 0)}
    assert sum(found["outcomes"].values()) == found["n_bits"]
    worst = found["fault_accuracy"]["worst"]
    assert worst == 0.0, "no answer is no right answer"


def test_packed_int4_weights(tmp_path: Path) -> None:
    """Against the same network with a flipped nibble written by onnx itself."""
    raw = models.quantized("qdq-int4")
    file = tmp_path / "model.onnx"
    file.write_bytes(raw)
    found = inject(file, DATA, out=tmp_path / "s", trials=30, seed=2)
    assert found["n_bits"] == 4 * (36 + 144 + 16)
    golden = runtime.run(runtime.session(raw), DATA.x)
    for trial in trials(tmp_path / "s"):
        patched = onnx.load_model_from_string(raw)
        proto = next(t for t in patched.graph.initializer if t.name == trial.site.tensor)
        codes = onnx.numpy_helper.to_array(proto).astype(np.int64).reshape(-1)
        flipped = int(codes[trial.site.offset]) & 15 ^ 1 << trial.site.bit
        codes[trial.site.offset] = flipped - 16 * (flipped > 7)
        proto.CopyFrom(
            onnx.helper.make_tensor(proto.name, proto.data_type, proto.dims, codes.tolist())
        )
        output = runtime.run(runtime.session(patched.SerializeToString()), DATA.x)
        assert trial.n_changed == metrics.changed(golden, output).sum()
        assert trial.n_correct == (output.argmax(1) == DATA.y).sum()


def test_protection_is_in_front_of_the_network(model: Path, tmp_path: Path) -> None:
    plain = inject(model, DATA, out=tmp_path / "none", trials=40)
    assert plain["outcomes"]["masked"] < 40
    secded = inject(model, DATA, out=tmp_path / "secded", trials=40, protection="secded")
    assert secded["outcomes"]["masked"] == 40
    assert secded["protection"] == {
        "name": "secded",
        "data_bytes": 196,
        "check_bytes": 5 + 18 + 2,
        "hardened_bytes": 0,
        "overhead": 25 / 196,
    }
    assert secded["n_bits"] == 8 * (196 + 25)
    assert secded["warnings"] == []
    top = inject(model, DATA, out=tmp_path / "top", trials=40, protection="top:8")
    assert [t.site for t in trials(tmp_path / "top")] == [t.site for t in trials(tmp_path / "none")]
    assert top["outcomes"]["masked"] == 40
    with pytest.raises(HeaderMismatch, match="protection differs"):
        inject(model, DATA, out=tmp_path / "top", trials=40, resume=True)
