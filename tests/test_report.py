"""The report: every number against an independent computation, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resq_deploy import store
from resq_deploy.errors import InputError, MissingExtra
from resq_deploy.metrics import bootstrap_mean
from resq_deploy.records import Count, Site, Trial
from resq_deploy.report import report, sources, stage_table, table
from resq_deploy.report.page import cell_text

STAGES = ("baseline", "attack", "fault", "adjust")
RATES = (1e-4, 1e-3, 1e-2)
LAYERS = ("stem.weight", "blocks.0.conv1.weight", "fc.weight")
EPSILONS = (4 / 255, 8 / 255)
HOSTILE = '<script>alert("x")</script>'
N_IMAGES = 200


@dataclass
class Made:
    """What a synthetic run holds; a test changes the one thing that it is about."""

    accuracy: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {  # mean accuracy at RATES
            "baseline": (0.94, 0.85, 0.50),
            "attack": (0.94, 0.86, 0.55),
            "fault": (0.95, 0.92, 0.80),
            "adjust": (0.95, 0.93, 0.82),
        }
    )
    adversarial: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "baseline": (0.60, 0.20),
            "attack": (0.80, 0.60),
            "fault": (0.81, 0.59),
            "adjust": (0.80, 0.58),
        }
    )
    clean: dict[str, int] = field(
        default_factory=lambda: {"baseline": 480, "attack": 478, "fault": 476, "adjust": 477}
    )
    golden: int = 190
    """Correct of N_IMAGES without faults, for every stage."""
    draws: int = 6
    layers: tuple[str, ...] = LAYERS
    spread: float = 0.02


def header(made: Made, stage: str, **changes: Any) -> store.Header:
    space = [
        {"name": name, "dtype": "int8", "shape": [16, 3], "n_bits": 384} for name in made.layers
    ]
    fields: dict[str, Any] = {
        "model_sha256": f"{STAGES.index(stage):064x}",
        "data_sha256": "d" * 64,
        "n_images": N_IMAGES,
        "fault": "ber",
        "plan": {"kind": "sweep", "rates": list(RATES), "draws": made.draws},
        "seed": 1,
        "engine": "reload",
        "shard": "0/1",
        "golden": Count(n_correct=made.golden, n_total=N_IMAGES),
        "space": space,
        "versions": {"onnxruntime": "1.0", "numpy": "2.0"},
        "cpu": {"machine": "x86_64", "name": "Testium", "vnni": ["avx_vnni"]},
        "warnings": [],
    }
    return store.Header(**{**fields, **changes})


def ber_trials(made: Made, stage: str) -> list[Trial]:
    rng = np.random.default_rng(STAGES.index(stage))
    trials = []
    for r, rate in enumerate(RATES):
        for d in range(made.draws):
            accuracy = made.accuracy[stage][r] + made.spread * rng.uniform(-1, 1)
            n_correct = int(np.clip(round(accuracy * N_IMAGES), 0, N_IMAGES))
            trials.append(
                Trial(
                    trial=r * made.draws + d,
                    rate=rate,
                    n_flips=10**r,
                    site=None,
                    n_total=N_IMAGES,
                    n_correct=n_correct,
                    n_sdc=abs(made.golden - n_correct),
                    n_changed=N_IMAGES,
                )
            )
    return trials


def single_trials(made: Made, stage: str) -> list[Trial]:
    rng = np.random.default_rng(7)
    harm = 3 if stage == "baseline" else 1
    trials = []
    for number in range(120):
        layer, bit = int(rng.integers(len(made.layers))), int(rng.integers(8))
        hit = bit >= 8 - harm
        site = Site(tensor=made.layers[layer], offset=int(rng.integers(48)), bit=bit)
        trials.append(
            Trial(
                trial=number,
                rate=None,
                n_flips=1,
                site=site,
                n_total=N_IMAGES,
                n_correct=made.golden - hit,
                n_sdc=int(hit),
                n_changed=int(bit > 1),
            )
        )
    return trials


def write_store(path: Path, head: store.Header, trials: list[Trial]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.create(path, head) as made:
        made.add(trials, seconds=1.5)
    return path


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def ones(rate: float, seed: int) -> str:
    """N_IMAGES marks, `rate` of them 1, in an order of its own."""
    marked = np.zeros(N_IMAGES, int)
    marked[: round(rate * N_IMAGES)] = 1
    return "".join(map(str, np.random.default_rng(seed).permutation(marked)))


def attack(made: Made, stage: str) -> dict[str, Any]:
    def both(n: int) -> dict[str, Any]:
        return {
            "twin": {"n_correct": n - 1, "n_total": N_IMAGES},
            "deployed": {"n_correct": n, "n_total": N_IMAGES},
        }

    found = []
    for e, (epsilon, rate) in enumerate(zip(EPSILONS, made.adversarial[stage], strict=True)):
        correct = ones(rate, 10 * e + STAGES.index(stage))
        found.append({"epsilon": epsilon, **both(correct.count("1")), "correct": correct})
    clean = ones(made.golden / N_IMAGES, 99)
    return {
        "model_sha256": f"{STAGES.index(stage):064x}",
        "twin_sha256": "t" * 64,
        "n_total": N_IMAGES,
        "steps": 20,
        "restarts": 1,
        "clean": both(made.golden),
        "clean_correct": clean,
        "epsilons": found,
    }


def histogram(width: float) -> list[int]:
    return [int(500 * np.exp(-((code / width) ** 2))) for code in range(-128, 128)]


def make_run(folder: Path, made: Made | None = None) -> Path:
    made = made or Made()
    recipe = {
        "name": "toy",
        "seed": 1,
        "data": {"name": "digits", "calibration": "/far/away/calibration/digits.toml"},
        "prove": {"confidence": 0.9, "rates": list(RATES)},
    }
    write_json(folder / "recipe.json", recipe)
    for name in ("float", *STAGES):
        sidecar: dict[str, Any] = {
            "stage": name,
            "sha256": "c" * 64,
            "versions": {"torch": "2.13.0"},
            "history": [{"epoch": i, "loss": 2.0 / (i + 1)} for i in range(8)],
        }
        if name == "fault":
            sidecar["criticality"] = [
                {"layer": layer, "score": 1 / (i + 1), "norm": 10 / (i + 1)}
                for i, layer in enumerate(made.layers)
            ]
        if name == "adjust":
            sidecar |= {
                "decisions": [
                    {"layer": layer, "ratio": 0.8 if i else 1.0, "scale_before": 0.01}
                    for i, layer in enumerate(made.layers)
                ],
                "bias_correction": {"kept": True},
                "held_out": {
                    "kept": False,
                    "change": {"value": -0.003, "low": -0.011, "high": 0.004, "n": 32},
                },
                "codes": {
                    layer: {"before": histogram(30), "after": histogram(50 if i else 30)}
                    for i, layer in enumerate(made.layers)
                },
            }
        write_json(folder / name / "checkpoint.json", sidecar)
    for stage in STAGES:
        sha = f"{STAGES.index(stage):064x}"
        manifest = {
            "files": {"model.qdq.onnx": sha, "model.qonnx.onnx": "e" * 64},
            "versions": {"onnx": "1.22.0"},
            "kernels": {"QLinearConv": 9, "QLinearAdd": 3},
            "parity": [
                {"a": "torch", "b": "onnxruntime all", "n_images": 1000, "argmax_equal": 999}
            ],
        }
        write_json(folder / "export" / stage / "manifest.json", manifest)
        prove = folder / "prove" / stage
        write_json(prove / "clean.json", {"n_correct": made.clean[stage], "n_total": 500})
        write_json(prove / "attack.json", attack(made, stage))
        write_store(prove / "ber.store", header(made, stage), ber_trials(made, stage))
        if stage in ("baseline", "adjust"):
            plan = {"kind": "random", "trials": 120, "margin": 0.05, "confidence": 0.9}
            single = header(made, stage, fault="single", plan=plan)
            write_store(prove / "single.store", single, single_trials(made, stage))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def build(folder: Path) -> dict[str, Any]:
    return table.build(sources.load(folder))


def row(made: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    found = [r for r in made["rows"] if wanted.items() <= r.items()]
    assert len(found) == 1
    return found[0]


def wilson_by_hand(k: int, n: int, z: float) -> tuple[float, float]:
    """The textbook formula, Wilson 1927."""
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half


class TestNumbers:
    Z = 1.6448536269514722  # 90 %: the confidence of the recipe

    def test_clean(self, run_dir: Path) -> None:
        cells = row(build(run_dir), measure="clean")["stages"]
        for stage, k in Made().clean.items():
            assert (cells[stage]["n_correct"], cells[stage]["n_total"]) == (k, 500)
            low, high = wilson_by_hand(k, 500, self.Z)
            assert cells[stage]["low"] == pytest.approx(low)
            assert cells[stage]["high"] == pytest.approx(high)

    def test_adversarial_counts_the_exported_file(self, run_dir: Path) -> None:
        made = build(run_dir)
        for e, epsilon in enumerate(EPSILONS):
            found = row(made, epsilon=epsilon)
            for stage, rates in Made().adversarial.items():
                k = round(rates[e] * N_IMAGES)
                assert found["stages"][stage]["n_correct"] == k
                assert found["stages"][stage]["twin"]["n_correct"] == k - 1
                assert found["stages"][stage]["low"] == pytest.approx(
                    wilson_by_hand(k, N_IMAGES, self.Z)[0]
                )

    def test_fault_accuracy_from_sql(self, run_dir: Path) -> None:
        made = build(run_dir)
        for stage in STAGES:
            db = sqlite3.connect(run_dir / "prove" / stage / "ber.store")
            for rate in RATES:
                query = "SELECT n_correct FROM trials WHERE rate = ?"
                values = np.array([r[0] for r in db.execute(query, (rate,))])
                cell = row(made, rate=rate)["stages"][stage]
                assert cell["n_patterns"] == len(values) == 6
                assert cell["n_correct"] == values.sum()
                assert cell["value"] == pytest.approx(values.mean() / N_IMAGES)
                assert cell["worst"] == values.min() / N_IMAGES
                assert cell["q05"] == pytest.approx(np.percentile(values, 5) / N_IMAGES)
                assert cell["low"] == bootstrap_mean(values / N_IMAGES, 0.9).low
            db.close()

    def test_gains_are_paired(self, run_dir: Path) -> None:
        made = build(run_dir)
        runs = {s: {t.trial: t for t in ber_trials(Made(), s)} for s in ("baseline", "adjust")}
        for r, rate in enumerate(RATES):
            gain = row(made, rate=rate)["gain"]
            points = [
                100 * (runs["adjust"][i].n_correct - runs["baseline"][i].n_correct) / N_IMAGES
                for i in range(6 * r, 6 * r + 6)
            ]
            assert gain["points"] == pytest.approx(np.mean(points))
            assert gain["low"] == pytest.approx(bootstrap_mean(np.array(points), 0.9).low)
            assert (gain["n"], gain["unit"], gain["paired"]) == (6, "patterns", True)
        gain = row(made, epsilon=EPSILONS[0])["gain"]
        a, b = (ones(Made().adversarial[s][0], STAGES.index(s)) for s in ("baseline", "adjust"))
        points = [100 * (int(y) - int(x)) for x, y in zip(a, b, strict=True)]
        assert gain["low"] == pytest.approx(bootstrap_mean(np.array(points), 0.9).low)
        assert (gain["n"], gain["unit"]) == (N_IMAGES, "images")

    def test_clean_gain_without_marks_is_not_called_paired(self, run_dir: Path) -> None:
        made = build(run_dir)
        gain = row(made, measure="clean")["gain"]
        assert gain["points"] == pytest.approx(100 * (477 - 480) / 500)
        assert not gain["paired"]
        assert "not paired: clean" in table.markdown(made)

    def test_newcombe_as_published(self) -> None:
        # Newcombe 1998, table II, case (a), method 10: 56/70 - 48/80 = 0.2, 0.0524 to 0.3339.
        a = sources.Clean(n_correct=48, n_total=80)
        b = sources.Clean(n_correct=56, n_total=70)
        gain = table._clean_gain(a, b, 0.95)
        assert gain["low"] == pytest.approx(5.24, abs=0.005)
        assert gain["high"] == pytest.approx(33.39, abs=0.005)

    def test_clean_gain_with_marks_is_paired(self, run_dir: Path) -> None:
        for stage, correct in (("baseline", "1100"), ("adjust", "1110")):
            value = {"n_correct": correct.count("1"), "n_total": 4, "correct": correct}
            write_json(run_dir / "prove" / stage / "clean.json", value)
        gain = row(build(run_dir), measure="clean")["gain"]
        assert gain["paired"]
        assert gain["points"] == 25

    def test_golden_run_on_the_same_images(self, run_dir: Path) -> None:
        found = row(build(run_dir), measure="golden")
        assert found["stages"]["fault"]["n_correct"] == 190
        assert found["gain"] is None

    def test_area_is_the_mean_over_log10_rates(self, run_dir: Path) -> None:
        # Equal steps of one decade: the trapezoid weighs the ends half.
        cell = row(build(run_dir), measure="area")["stages"]["fault"]
        mean = [
            np.mean(
                [t.n_correct / N_IMAGES for t in ber_trials(Made(), "fault")[6 * r : 6 * r + 6]]
            )
            for r in range(3)
        ]
        assert cell["value"] == pytest.approx((mean[0] / 2 + mean[1] + mean[2] / 2) / 2)
        assert cell["n_patterns"] == 6

    def test_text_and_markdown_show_value_interval_and_n(self, run_dir: Path) -> None:
        made = build(run_dir)
        low, high = wilson_by_hand(480, 500, self.Z)
        wanted = f"96.0 [{100 * low:.1f}, {100 * high:.1f}]"
        assert wanted in table.markdown(made)
        assert "500 images" in table.markdown(made)
        assert "6 patterns x 200 images" in table.markdown(made)
        assert wanted.split(" ", 1)[1] in stage_table(run_dir)
        for part in ("90 % intervals", "Testium", "onnxruntime 1.0", "Seed 1"):
            assert part in table.markdown(made)
            assert part in stage_table(run_dir)
        rows = stage_table(run_dir).partition("\nFaults:")[0].splitlines()
        assert max(map(len, rows)) <= 100

    @pytest.mark.parametrize(
        ("value", "label"),
        [(1e-5, "1e-5"), (3e-3, "3e-3"), (0.05, "5e-2"), (0.0, "0"), (0.25, "2.5e-1")],
    )
    def test_rate_label(self, value: float, label: str) -> None:
        assert table.rate_label(value) == label


def flat(value: float) -> tuple[float, ...]:
    return (value,) * 3


class TestVerdict:
    """Golden is 190 of 200 = 95 %; no spread, so that every mean is exact."""

    def verdict(self, folder: Path, **changes: Any) -> dict[str, Any]:
        return build(make_run(folder, Made(spread=0.0, **changes)))["verdict"]

    @pytest.mark.parametrize(
        ("baseline", "adjust", "rate", "status"),
        [
            # exactly 15 points lost at 1e-3, exactly 12.5 gained: both limits are inclusive
            ((0.95, 0.80, 0.10), (0.95, 0.925, 0.10), 1e-3, "reached"),
            ((0.95, 0.80, 0.10), (0.95, 0.92, 0.90), 1e-3, "not reached"),
            # half a point less lost: the next rate decides
            ((0.95, 0.805, 0.10), (0.95, 0.80, 0.90), 1e-2, "reached"),
            ((0.95, 0.95, 0.85), (0.95, 0.95, 0.95), None, "not decided"),
        ],
    )
    def test_fault(
        self,
        tmp_path: Path,
        baseline: tuple[float, ...],
        adjust: tuple[float, ...],
        rate: float | None,
        status: str,
    ) -> None:
        accuracy = {**Made().accuracy, "baseline": baseline, "adjust": adjust}
        found = self.verdict(tmp_path / "run", accuracy=accuracy)["fault"]
        assert found["status"] == status
        assert found.get("rate") == rate
        assert found["text"].endswith(status)
        if rate is None:
            assert "at most 10.0" in found["text"]

    @pytest.mark.parametrize(
        ("baseline", "adjust", "epsilon", "status"),
        [
            ((0.65, 0.1), (0.76, 0.1), EPSILONS[0], "reached"),
            ((0.65, 0.1), (0.75, 0.9), EPSILONS[0], "not reached"),  # 10.0 points
            ((0.655, 0.1), (0.65, 0.9), EPSILONS[1], "reached"),
            ((0.90, 0.70), (0.95, 0.95), None, "not decided"),
        ],
    )
    def test_attack(
        self,
        tmp_path: Path,
        baseline: tuple[float, ...],
        adjust: tuple[float, ...],
        epsilon: float | None,
        status: str,
    ) -> None:
        rates = {**Made().adversarial, "baseline": baseline, "adjust": adjust}
        found = self.verdict(tmp_path / "run", adversarial=rates)["attack"]
        assert found["status"] == status
        assert found.get("epsilon") == epsilon

    @pytest.mark.parametrize(
        ("hardened", "status"),
        [(500, "reached"), (470, "reached"), (469, "not reached")],  # of 500; baseline 480
    )
    def test_clean(self, tmp_path: Path, hardened: int, status: str) -> None:
        found = self.verdict(tmp_path / "run", clean={**Made().clean, "adjust": hardened})
        assert found["clean"]["status"] == status

    def test_no_pairs_no_verdict(self, run_dir: Path) -> None:
        (run_dir / "prove/adjust/ber.store").unlink()
        other = header(Made(), "adjust", seed=2)
        write_store(run_dir / "prove/adjust/ber.store", other, ber_trials(Made(), "adjust"))
        made = build(run_dir)
        assert made["verdict"]["fault"]["status"] == "not decided"
        assert (
            "BER sweeps of baseline and hardened differ in seed: no paired gain"
            in (made["warnings"])
        )


class TestMissing:
    @pytest.mark.parametrize(
        "name",
        [
            "recipe.json",
            "float/checkpoint.json",
            "fault/checkpoint.json",
            "adjust/checkpoint.json",
            "export/baseline/manifest.json",
            "prove/baseline/clean.json",
            "prove/baseline/ber.store",
            "prove/baseline/attack.json",
            "prove/adjust/ber.store",
            "prove/adjust/attack.json",
            "prove/adjust/single.store",
        ],
    )
    def test_one_piece_is_named_everywhere(self, run_dir: Path, tmp_path: Path, name: str) -> None:
        (run_dir / name).unlink()
        page = report([run_dir], tmp_path / "out" / "page.html")
        made = json.loads(page.with_name("table.json").read_text())
        assert made["missing"] == [name]
        for text in (page.read_text(), page.with_name("table.md").read_text(), table.text(made)):
            assert name in text

    @pytest.mark.parametrize("part", ["prove", "export"])
    def test_a_whole_part(self, run_dir: Path, tmp_path: Path, part: str) -> None:
        shutil.rmtree(run_dir / part)
        assert f"{part}/adjust/" in report([run_dir], tmp_path / "page.html").read_text()
        assert f"missing: {part}/adjust/" in stage_table(run_dir)

    def test_unfinished_campaign(self, run_dir: Path) -> None:
        path = run_dir / "prove/adjust/ber.store"
        path.unlink()
        write_store(path, header(Made(), "adjust"), ber_trials(Made(), "adjust")[:-2])
        made = build(run_dir)
        assert made["missing"] == ["prove/adjust/ber.store: 2 of 18 planned trials"]
        assert row(made, rate=1e-2)["gain"]["n"] == 4
        assert row(made, measure="area")["stages"]["adjust"]["n_patterns"] == 4

    def test_proof_of_another_file_is_warned_about(self, run_dir: Path) -> None:
        path = run_dir / "prove/adjust/ber.store"
        path.unlink()
        other = header(Made(), "adjust", model_sha256="f" * 64)
        write_store(path, other, ber_trials(Made(), "adjust"))
        assert build(run_dir)["warnings"] == [
            "prove/adjust/ber.store was measured on another file than export/adjust/model.qdq.onnx"
        ]

    def test_a_warning_of_several_campaigns_is_said_once(self, run_dir: Path) -> None:
        for stage in ("fault", "adjust"):
            path = run_dir / f"prove/{stage}/ber.store"
            path.unlink()
            changes = {"warnings": ["a Clip", f"only {stage}"]}
            write_store(path, header(Made(), stage, **changes), ber_trials(Made(), stage))
        assert build(run_dir)["warnings"] == [
            "prove/fault/ber.store, prove/adjust/ber.store: a Clip",
            "prove/fault/ber.store: only fault",
            "prove/adjust/ber.store: only adjust",
        ]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, ids, and visible text."""

    VOID = ("meta", "br", "use", "path", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


class TestPage:
    def test_is_self_contained(self, run_dir: Path, tmp_path: Path) -> None:
        html = report([run_dir], tmp_path / "page.html").read_text()
        page = Page(html)
        assert not re.search(r"https?://|@import|url\((?!#)", html)
        assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        for target in page.values("href") + page.values("xlink:href"):
            assert target.startswith("#")
            assert target[1:] in ids

    def test_has_every_section(self, run_dir: Path, tmp_path: Path) -> None:
        html = report([run_dir], tmp_path / "page.html").read_text()
        ids = Page(html).values("id")
        wanted = "verdict stages curves maps criticality codes decisions training parity files"
        assert [i for i in ids if i in f"{wanted} provenance"] == [*wanted.split(), "provenance"]
        assert html.count("<svg") == html.count("<figcaption>") == 6
        assert "Not in this run" not in html
        for part in ("onnxruntime all", "999", "e" * 64, "QLinearConv: 9", "torch", "Testium"):
            assert part in html
        assert "1 left alone" in html
        assert "-0.0030 [-0.0110, +0.0040] (paired over 32 patterns): not kept" in html
        assert "resq-deploy inject runs/toy/export/adjust/model.qdq.onnx --data digits" in html
        assert "/far/away" not in html

    def test_escapes_hostile_names(self, tmp_path: Path) -> None:
        names = (HOSTILE, "a$b_c$ --> d", "fc.weight")
        run_dir = make_run(tmp_path / "run", Made(layers=names))
        recipe = json.loads((run_dir / "recipe.json").read_text())
        write_json(run_dir / "recipe.json", {**recipe, "name": HOSTILE})
        page = report([run_dir], tmp_path / "page.html")
        html = page.read_text()
        assert "<script" not in html
        assert html.count("&lt;script&gt;") > 3
        assert "<script" not in page.with_name("table.md").read_text()
        assert html.rstrip().endswith("</html>")

    def test_same_inputs_same_bytes(self, tmp_path: Path) -> None:
        made = []
        for name in ("a", "b"):
            make_run(tmp_path / name / "run")
            # A process of its own: hash seeds and caches differ.
            code = "from resq_deploy.report import report; report('run', 'page.html')"
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path / name, check=True)
            files = ("page.html", "table.json", "table.md")
            made.append([(tmp_path / name / file).read_bytes() for file in files])
        assert made[0] == made[1]

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "–"),
            (True, "yes"),
            (0.123456, "0.1235"),
            ([1, 2], "1, 2"),
            (list(range(20)), "0 to 19 (20 values)"),
            ({"a": 1.5}, "a: 1.5"),
            ("/home/x/model.toml", "model.toml"),
        ],
    )
    def test_cell_text(self, value: Any, text: str) -> None:
        assert cell_text(value) == text


class TestStores:
    def test_page(self, run_dir: Path, tmp_path: Path) -> None:
        paths = [run_dir / "prove/baseline" / n for n in ("ber.store", "single.store")]
        html = report(paths, tmp_path / "page.html").read_text()
        low, high = wilson_by_hand(190, 200, 1.959963984540054)
        assert f"95.0 [{100 * low:.1f}, {100 * high:.1f}] % (200 images)" in html
        sdc = sum(t.outcome == "sdc" for t in single_trials(Made(), "baseline"))
        assert f">{sdc}: {100 * sdc / 120:.1f} [" in html
        assert html.count("<svg") == 2
        for part in ("ber.store", "single.store", "1e-3", *LAYERS):
            assert part in html
        assert not list(tmp_path.glob("table.*"))

    def test_equal_names_are_told_apart(self, run_dir: Path, tmp_path: Path) -> None:
        paths = [run_dir / "prove" / s / "ber.store" for s in ("baseline", "adjust")]
        html = report(paths, tmp_path / "page.html").read_text()
        assert "baseline/ber.store" in html
        assert "adjust/ber.store" in html


class TestInputErrors:
    def check(self, paths: list[Path], out: Path, words: str) -> None:
        with pytest.raises(InputError, match=words) as error:
            report(paths, out)
        assert "\n" not in str(error.value)
        assert not out.exists()

    def test_nothing(self, tmp_path: Path) -> None:
        self.check([], tmp_path / "p.html", "nothing to report")

    def test_absent(self, tmp_path: Path) -> None:
        self.check([tmp_path / "no.store"], tmp_path / "p.html", "does not exist")

    def test_folder_without_a_run(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        self.check([tmp_path / "d"], tmp_path / "p.html", "holds no run")

    def test_not_a_store(self, tmp_path: Path) -> None:
        (tmp_path / "x.store").write_bytes(b"not a database, really" * 100)
        self.check([tmp_path / "x.store"], tmp_path / "p.html", "x.store")

    def test_store_with_a_broken_header(self, run_dir: Path, tmp_path: Path) -> None:
        path = run_dir / "prove/baseline/ber.store"
        with sqlite3.connect(path) as db:
            db.execute("UPDATE meta SET value = '{\"golden\": {}}' WHERE key = 'header'")
        db.close()
        self.check([path], tmp_path / "p.html", "broken header")
        self.check([run_dir], tmp_path / "p.html", "broken header")

    def test_empty_store(self, tmp_path: Path) -> None:
        path = write_store(tmp_path / "e.store", header(Made(), "baseline"), [])
        self.check([path], tmp_path / "p.html", "no finished trial")

    def test_mixture_and_doubles(self, run_dir: Path, tmp_path: Path) -> None:
        path = run_dir / "prove/baseline/ber.store"
        self.check([run_dir, path], tmp_path / "p.html", "one run directory")
        self.check([path, path], tmp_path / "p.html", "twice")
        detour = run_dir / "prove/adjust/../baseline/ber.store"
        self.check([path, detour], tmp_path / "p.html", "twice")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"n_total": 5}, "marked correct"),
            ({"epsilons": 3}, "epsilons"),
            ({"clean_correct": "2" * N_IMAGES}, "marked correct"),
        ],
    )
    def test_attack_that_contradicts_itself(
        self, run_dir: Path, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        path = run_dir / "prove/baseline/attack.json"
        write_json(path, {**json.loads(path.read_text()), **change})
        self.check([run_dir], tmp_path / "p.html", f"attack.json: .*{words}")

    def test_more_correct_than_images(self, run_dir: Path, tmp_path: Path) -> None:
        write_json(run_dir / "prove/fault/clean.json", {"n_correct": 6, "n_total": 5})
        self.check([run_dir], tmp_path / "p.html", "clean.json: .*n_correct")

    def test_broken_json(self, run_dir: Path, tmp_path: Path) -> None:
        (run_dir / "recipe.json").write_text("{")
        self.check([run_dir], tmp_path / "p.html", "recipe.json")

    def test_out_is_a_folder(self, run_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            report([run_dir], tmp_path)


def test_without_matplotlib_the_table_still_prints(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"resq_deploy.report.{name}", raising=False)
        monkeypatch.delattr(sys.modules["resq_deploy.report"], name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"resq-deploy\[report\]"):
        report([run_dir], tmp_path / "p.html")
    assert "baseline" in stage_table(run_dir)
