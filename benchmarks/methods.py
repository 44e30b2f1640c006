"""The table of methods: train the rows of methods.toml, measure the exported files, compare.

    python benchmarks/methods.py models/cifar10-resnet8.toml --epochs 1 --rows baseline,fault
    python benchmarks/methods.py models/cifar10-resnet8.toml --measure fgsm,autoattack,ber,bfa,time
    python benchmarks/methods.py --write docs

The first line trains and measures what is not there yet (it can be interrupted at any moment and
continues; rows share the checkpoints they have in common); --epochs replaces those of the stages
behind the float network. The second adds columns to the rows that are finished, from their files
and twins, without training anything. The third writes docs/methods-table.md from every row in
--out, and the rows beside it; without a row in --out what docs holds is written again. Differences
are those to the row `baseline`, paired on the same images and fault patterns.

`autoattack` runs on the first images of the row's PGD attack, on those that withstood it: what PGD
broke is broken. `cost` is processor time of training steps, relative to plain quantization-aware
training (training_cost.py says how), times the epochs of the stages behind the baseline.
"""

from __future__ import annotations

import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resq_deploy import artifacts, metrics, recipe, runtime, store
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError, ResqError
from resq_deploy.report import table

HERE = Path(__file__).parent
EPOCHS = ("baseline", "attack", "fault")
RATES = (1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
EPSILONS = tuple(k / 255 for k in (1, 2, 4, 8))
RARE = 1e-5
"""A rate at which few patterns matter: measured beside the others, and not part of the area."""
BOTH = (1e-3, 1e-2)
"""Bit error rates under which images of PGD at the first of EPSILONS run too."""
ABSENT = "–"


def rows(names: str | None) -> list[dict[str, Any]]:
    """The rows of methods.toml, all or those named, in the order of the file."""
    found = {row["name"]: row for row in tomllib.loads((HERE / "methods.toml").read_text())["row"]}
    wanted = list(found) if names is None else names.split(",")
    for name in wanted:
        if name not in found:
            raise InputError(f"row {name!r} is unknown; expected one of {', '.join(found)}")
    return [found[name] for name in wanted]


def plan(base: recipe.Recipe, row: dict[str, Any], epochs: int | None, **prove: Any) -> Any:
    """The base recipe with the row's fields in place of its own."""
    raw = base.model_dump(exclude_unset=True)
    for section in EPOCHS if epochs is not None else ():
        raw.setdefault(section, {})["epochs"] = epochs
    for section in row.keys() - {"name", "about", "stages"}:
        raw.setdefault(section, {}).update(row[section])
    return recipe.parse(raw | {"prove": prove}, f"row {row['name']}")


def checkpoint(made: recipe.Recipe, stages: list[str], pool: Path) -> Path:
    """Train, or find, the stages in order; rows with the same beginning share its folders."""
    from resq_deploy import data
    from resq_deploy.adjust import adjust
    from resq_deploy.data import calibration
    from resq_deploy.train import train

    given = made.model_dump(mode="json", exclude_unset=True)
    last, key = None, artifacts.digest([given["name"], made.seed, given["data"], given["model"]])
    for stage in ("float", "baseline", *stages):
        keeps = stage == "fault" and made.fault.keep_attack
        key = artifacts.digest([key, stage, given.get(stage), given["attack"] if keeps else None])
        out = pool / f"{stage}-{key[:12]}"
        if stage == "adjust":
            assert last is not None
            images = calibration.load(made.data, data.of(made.data))
            last = adjust(last, out=out, images=images, config=made.adjust, seed=made.seed)
        else:
            last = train(made, stage, out=out, start=last)
    assert last is not None
    return last


def measure(made: recipe.Recipe, twin: Path, out: Path) -> dict[str, Any]:
    """Clean, attacked and faulty counts of the exported file."""
    from resq_deploy import data, pipeline
    from resq_deploy.export import MANIFEST, export

    test = data.of(made.data).test
    model = export(twin, out=out / "export", images=test, config=made.export)
    pipeline.prove("row", model, twin, test, made.prove, out=out, seed=made.seed, workers=1)
    clean, attack = (artifacts.read_json(out / f"{name}.json") for name in ("clean", "attack"))
    header, trials, _ = store.read([out / "ber.store"])
    counts: dict[float, list[int]] = {}
    for trial in trials:
        counts.setdefault(trial.rate, []).append(trial.n_correct)
    sidecar = artifacts.read_json(artifacts.sidecar(twin))
    return {
        "model_sha256": header.model_sha256,
        "data_sha256": header.data_sha256,
        "n_bytes": artifacts.read_json(out / "export" / MANIFEST)["weights"]["n_bytes"],
        "clean": pack(clean["correct"]),
        "attack": {
            "what": f"PGD-{attack['steps']}, {attack['restarts']} random start",
            "radii": [
                {"epsilon": row["epsilon"]} | pack(row["correct"]) for row in attack["epsilons"]
            ],
        },
        "fault": {
            "n_images": header.n_images,
            "rates": [{"rate": rate, "n_correct": found} for rate, found in counts.items()],
        },
        "held_out": sidecar.get("held_out"),
        "versions": artifacts.versions(),
        "cpu": header.cpu["name"],
    }


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A row that has been measured, and what further columns are measured on."""

    made: recipe.Recipe
    stages: list[str]
    row: dict[str, Any]
    folder: Path
    """Where its attacks, stores and exported files are."""
    twin: Path
    baseline: Path
    """The exported file of the row `baseline`."""
    attacked: int
    """Images of `autoattack`."""

    @property
    def model(self) -> Path:
        return exported(self.folder)

    def test(self, n: int | None = None) -> Dataset:
        """The first `n` test images, or all."""
        from resq_deploy import data

        test = data.of(self.made.data).test
        return test if n is None else test.first(n)


def exported(folder: Path) -> Path:
    """The file that was measured."""
    from resq_deploy.export import QDQ

    return folder / "export" / QDQ


def finished(base: recipe.Recipe, row: dict[str, Any], out: Path, attacked: int) -> Finished | None:
    """A row of methods.toml as it was trained and measured; None where it was not yet.

    The twin is found by the digest in the manifest: a checkpoint that older code trained counts.
    """
    from resq_deploy.export import MANIFEST

    target, folder = out / "rows" / f"{row['name']}.json", out / "measured" / row["name"]
    if not target.is_file() or not (folder / "export" / MANIFEST).is_file():
        return None
    digest = artifacts.read_json(folder / "export" / MANIFEST)["inputs"]["checkpoint_sha256"]
    twins = [path for path in sorted((out / "checkpoints").glob("*/checkpoint.safetensors"))
             if artifacts.sha256(path) == digest]  # fmt: skip
    if not twins:
        raise InputError(f"row {row['name']}: the checkpoint {digest[:12]} is not in {out}")
    return Finished(
        made=plan(base, row, None), stages=row["stages"], row=artifacts.read_json(target),
        folder=folder, twin=twins[0], baseline=exported(out / "measured" / "baseline"),
        attacked=attacked,
    )  # fmt: skip


def fgsm(of: Finished) -> dict[str, Any]:
    """FGSM on the images of the row's PGD."""
    from resq_deploy.attack import attack

    images = of.test(of.row["attack"]["radii"][0]["n"])
    found = attack(
        of.model, of.twin, images, epsilons=EPSILONS, attacks=("fgsm",), check=False,
        out=of.folder / "fgsm.json",
    )  # fmt: skip
    rows = found["attacks"]["fgsm"]["epsilons"]
    return {"radii": [{"epsilon": at["epsilon"]} | pack(at["correct"]) for at in rows]}


def autoattack(of: Finished) -> dict[str, Any]:
    """AutoAttack on what PGD left of the first images."""
    from resq_deploy.attack import attack

    images, radii, settings = of.test(of.attacked), [], {}
    for at in of.row["attack"]["radii"]:
        right = unpack(at)[: of.attacked]
        left = np.flatnonzero(right)
        if left.size:
            found = attack(
                of.model, of.twin, images.take(left), epsilons=(at["epsilon"],),
                attacks=("autoattack",), check=False,
                out=of.folder / f"autoattack-{255 * at['epsilon']:.4g}.json",
            )  # fmt: skip
            settings = found["attacks"]["autoattack"]["members"]
            right[left] = [
                mark == "1" for mark in found["attacks"]["autoattack"]["epsilons"][0]["correct"]
            ]
        marks = "".join(f"{r:.0f}" for r in right)
        radii.append({"epsilon": at["epsilon"]} | pack(marks))
    return {"members": settings, "radii": radii}


def ber(of: Finished) -> dict[str, Any]:
    """Fault patterns at the rate RARE, as many and on as many images as at the others."""
    from resq_deploy.inject import inject

    fault = of.row["fault"]
    draws = len(fault["rates"][0]["n_correct"])
    path = of.folder / f"rare-{draws}.store"
    inject(
        of.model, of.test(fault["n_images"]), out=path, fault="ber", rates=(RARE,),
        draws=draws, seed=of.made.seed, resume=path.exists(),
    )  # fmt: skip
    trials = store.read([path])[1]
    return {"rate": RARE, "n_correct": [trial.n_correct for trial in trials]}


def both(of: Finished) -> dict[str, Any]:
    """Attacked images under bit errors: PGD as in the row, as many patterns as at the rates."""
    from resq_deploy.attack import attack

    images = of.test(of.row["attack"]["radii"][0]["n"])
    found = attack(
        of.model, of.twin, images, epsilons=EPSILONS[:1], steps=of.row["measured"]["steps"],
        restarts=1, check=False, rates=BOTH, draws=of.row["measured"]["draws"],
        seed=of.made.seed, out=of.folder / "both.json",
    )  # fmt: skip
    cells = [cell for cell in found["matrix"] if cell["epsilon"] and cell["rate"]]
    kept = ("epsilon", "rate", "n_images", "n_correct")
    return {"cells": [{key: cell[key] for key in kept} for cell in cells]}


def bfa(of: Finished) -> dict[str, Any]:
    """Adversarial bits, five searches of at most 50 flips; or why there are none."""
    from resq_deploy.attack.bfa import bfa as search

    try:
        found = search(of.model, of.twin, of.test(), images=1000, seed=of.made.seed)
    except InputError as error:
        return {"refused": str(error)}
    artifacts.write_json(of.folder / "bfa.json", found)
    kept = ("clean", "limit", "flips_to_chance", "max_flips", "n_images", "batch", "random")
    return {key: found[key] for key in kept} | {
        "flips": [search["flips_to_chance"] for search in found["searches"]]
    }


def seconds(of: Finished) -> dict[str, Any]:
    """Processor time per image, one a run, one thread; the file and the baseline take turns."""
    files = {"row": of.model, "baseline": of.baseline}
    sessions = {name: runtime.session(path.read_bytes()) for name, path in files.items()}
    x = of.test(1).x
    feeds = {name: runtime.adapt(x, session) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    order = np.random.default_rng(0)
    for _ in range(200):
        for name in order.permutation(list(files)).tolist():
            start = time.thread_time()
            for _ in range(20):
                runtime.run(sessions[name], feeds[name])
            times[name].append((time.thread_time() - start) / 20)
    ratio = metrics.bootstrap_mean(np.array(times["row"]) / np.array(times["baseline"]))
    return {"seconds": float(np.median(times["row"])), "ratio": vars(ratio)}


def cost(of: Finished) -> dict[str, Any]:
    """Training behind the baseline in epochs of plain quantization-aware training."""
    from training_cost import Bench

    from resq_deploy.train import objective_of
    from resq_deploy.train.objectives import CrossEntropy

    trained = [stage for stage in of.stages if stage != "adjust"]
    faults = of.made.fault.model_copy(update={"start_loss": 1e9})  # from the first step on
    made = of.made.model_copy(update={"fault": faults})
    benches = {"plain": Bench(CrossEntropy())}
    for stage in trained:
        benches[stage] = Bench(objective_of(made, stage), faults.encoding)
    times: dict[str, list[float]] = {name: [] for name in benches}
    for bench in benches.values():
        bench.seconds(2)  # the first steps allocate
    for _ in range(10):
        for name, bench in benches.items():
            times[name].append(bench.seconds(2))
    steps = {s: float(np.mean(t) / np.mean(times["plain"])) for s, t in times.items()}
    epochs = dict(part.rsplit(" ", 1) for part in of.row["epochs"].split(", "))
    return {
        "per_step": {stage: steps[stage] for stage in trained},
        "epochs": sum(steps[stage] * int(epochs[stage]) for stage in trained),
        "adjusted": "adjust" in of.stages,
    }


MEASURES: dict[str, Callable[[Finished], dict[str, Any]]] = {
    "fgsm": fgsm, "autoattack": autoattack, "ber": ber, "both": both, "bfa": bfa, "time": seconds,
    "cost": cost,
}  # fmt: skip
"""Columns that are measured after the fact, by the name that --measure takes."""


def measures(names: str) -> list[str]:
    """What --measure names; InputError for what it does not know."""
    for name in names.split(","):
        if name not in MEASURES:
            raise InputError(f"column {name!r} is unknown; expected some of {', '.join(MEASURES)}")
    return names.split(",")


def add(of: Finished, names: list[str], target: Path) -> None:
    """Measure what a finished row lacks of these columns, and write each into it."""
    for name in names:
        radii = len(of.row["attack"]["radii"])
        settings = {"attacked": of.attacked, "radii": radii} if name == "autoattack" else {}
        if of.row.get("more", {}).get(name, {}).get("settings") != settings:
            found = same_file(of, name, settings, target.parent)
            if found is None:
                click.echo(f"row {target.stem}: {name}", err=True)
                found = {"settings": settings} | MEASURES[name](of)
            row = artifacts.read_json(target)  # it may have got other columns meanwhile
            artifacts.write_json(target, row | {"more": row.get("more", {}) | {name: found}})


def same_file(
    of: Finished, name: str, settings: dict[str, int], rows: Path
) -> dict[str, Any] | None:
    """The column of another row whose file is the same, as where stage 3 changed nothing."""
    for path in sorted(rows.glob("*.json")):
        row = artifacts.read_json(path)
        found: dict[str, Any] = row.get("more", {}).get(name, {})
        alike = all(row[key] == of.row[key] for key in ("model_sha256", "data_sha256", "measured"))
        if name != "cost" and alike and found.get("settings") == settings:
            return found
    return None


def pack(marks: str) -> dict[str, Any]:
    """Which images were right, as counts and as the hex digits of their bits."""
    right = np.array([mark == "1" for mark in marks])
    return {
        "n_correct": int(right.sum()),
        "n": len(right),
        "bits": np.packbits(right).tobytes().hex(),
    }


def unpack(packed: dict[str, Any]) -> NDArray[np.float64]:
    """The inverse of `pack`: 1.0 for every image that was right, else 0.0."""
    raw = np.frombuffer(bytes.fromhex(packed["bits"]), np.uint8)
    return np.unpackbits(raw)[: packed["n"]].astype(np.float64)


def samples(row: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """What each column averages: one value per image or per fault pattern, in [0, 1]."""
    more = row.get("more", {})
    found = {"clean": unpack(row["clean"])}
    for label, radii in (
        ("FGSM", more.get("fgsm", {}).get("radii", [])),
        ("PGD", row["attack"]["radii"]),
        ("AA", more.get("autoattack", {}).get("radii", [])),
    ):
        found |= {f"{label} {table.epsilon_label(at['epsilon'])}": unpack(at) for at in radii}
    faults = row["fault"]
    if "ber" in more:
        rare = np.array(more["ber"]["n_correct"]) / faults["n_images"]
        found[f"BER {more['ber']['rate']:g}"] = rare
    rates = [at["rate"] for at in faults["rates"]]
    faulty = np.array([at["n_correct"] for at in faults["rates"]]) / faults["n_images"]
    found |= {f"BER {rate:g}": values for rate, values in zip(rates, faulty, strict=True)}
    if len(rates) > 1:
        x = np.log10(rates)
        found["area"] = np.trapezoid(faulty, x, axis=0) / (x[-1] - x[0])
    for cell in more.get("both", {}).get("cells", []):
        label = f"PGD {table.epsilon_label(cell['epsilon'])}, BER {cell['rate']:g}"
        found[label] = np.array(cell["n_correct"]) / cell["n_images"]
    return found


def over_patterns(column: str) -> bool:
    """Whether a column averages fault patterns, not images."""
    return column.startswith("area") or "BER" in column


def accuracy(column: str, values: NDArray[np.float64] | None) -> str:
    """Mean in percent with its 95 % interval: Wilson over images, bootstrap over patterns."""
    if values is None:
        return ABSENT
    if over_patterns(column):
        found = metrics.bootstrap_mean(values)
    else:
        found = metrics.wilson(int(values.sum()), len(values))
    return table.percent(vars(found))


def difference(values: NDArray[np.float64] | None, base: NDArray[np.float64] | None) -> str:
    """Paired difference in percentage points with its 95 % interval."""
    if values is None or base is None or len(values) != len(base):
        return ABSENT
    found = metrics.bootstrap_mean(100 * (values - base))
    return table.points({"points": found.value, "low": found.low, "high": found.high})


def tail(values: NDArray[np.float64] | None) -> str:
    """5 % quantile and minimum in percent."""
    if values is None:
        return ABSENT
    return f"{100 * np.quantile(values, 0.05):.1f}; {100 * values.min():.1f}"


def chance(found: dict[str, Any] | None) -> str:
    """Flips to chance level, with interval where every search got there."""
    if found is None:
        return ABSENT
    if "refused" in found:
        return "refused"
    flips = found["flips_to_chance"]
    if "mean" in flips:
        return f"{flips['mean']:.1f} [{flips['low']:.1f}, {flips['high']:.1f}]"
    return (
        f"more than {flips['more_than']} ({flips['n_reached']} of {flips['n_searches']} got there)"
    )


def costs(row: dict[str, Any]) -> list[str]:
    """Bytes, time per image, training, flips to chance."""
    more = row.get("more", {})
    took, trained = more.get("time"), more.get("cost")
    cells = [f"{row['n_bytes']:,}", ABSENT, ABSENT, ABSENT, chance(more.get("bfa"))]
    if took is not None:
        ratio = took["ratio"]
        cells[1] = f"{1e6 * took['seconds']:.0f}"
        cells[2] = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    if trained is not None:
        cells[3] = f"{trained['epochs']:.1f}" + ", and stage 3" * trained["adjusted"]
    return cells


def grid(body: list[list[Any]], head: list[str]) -> str:
    return str(tabulate(body, head, tablefmt="github", disable_numparse=True))


def section(name: str, found: dict[str, dict[str, Any]]) -> str:
    """The tables of one base recipe, in Markdown."""
    first = found["baseline"]
    same = ("data_sha256", "measured")
    kept = {n: row for n, row in found.items() if all(row[k] == first[k] for k in same)}
    left = sorted(found.keys() - kept.keys())
    columns = {n: samples(row) for n, row in kept.items()}
    # those of the row that has most: some are measured after the fact
    names, base = list(max(columns.values(), key=len)), columns["baseline"]
    about = [[n, row["about"], " -> ".join(row["stages"]) or "none", row["epochs"]]
             for n, row in kept.items()]  # fmt: skip
    aa = next((len(of[c]) for of in columns.values() for c in of if c.startswith("AA")), None)
    versions = ", ".join(
        f"{k} {first['versions'][k]}" for k in ("torch", "brevitas", "onnxruntime")
    )
    lines = [
        f"## {name}",
        "",
        f"Exported int8 files in onnxruntime; {len(base['clean'])} test images for clean, "
        f"{first['attack']['radii'][0]['n']} under attack ({first['attack']['what']}, "
        f"white-box on the twin, replayed on the file; FGSM likewise), "
        f"{len(first['fault']['rates'][0]['n_correct'])} fault patterns per rate on "
        f"{first['fault']['n_images']} images; 95 % intervals. `area`: mean over log10 BER, from "
        f"BER {first['fault']['rates'][0]['rate']:g} on. `{ABSENT}`: not measured. {versions}, "
        f"{first['cpu']}.",
        "",
        *([f"AA: AutoAttack (APGD-100, APGD-DLR-100, Square with 1,000 iterations, see "
           f"[attacks.md](attacks.md)) on the first {aa} images; what PGD broke of them is "
           "broken.", ""] if aa else []),
        grid(about, ["row", "what", "stages behind the baseline", "epochs per stage"]),
        "",
    ]  # fmt: skip
    for title, part in (
        ("clean and under attack", [c for c in names if not over_patterns(c)]),
        ("under bit errors", [c for c in names if over_patterns(c) and "," not in c]),
        ("under attack and bit errors", [c for c in names if "," in c]),
    ):
        if not part:
            continue
        levels = [[n, *(accuracy(c, of.get(c)) for c in part)] for n, of in columns.items()]
        gains = [[n, *(difference(of.get(c), base.get(c)) for c in part)]
                 for n, of in columns.items() if n != "baseline"]  # fmt: skip
        lines += [
            f"Accuracy {title}, %:",
            "",
            grid(levels, ["row", *part]),
            "",
            "Difference to `baseline` in percentage points, paired:",
            "",
            grid(gains, ["row", *part]),
            "",
        ]
    rates = [c for c in names if c.startswith("BER")]
    lines += [
        "5 % quantile over patterns; worst pattern, %:",
        "",
        grid([[n, *(tail(of.get(c)) for c in rates)] for n, of in columns.items()],
             ["row", *rates]),
        "",
        "What it costs, and adversarial bits:",
        "",
        grid([[n, *costs(row)] for n, row in kept.items()],
             ["row", "bytes of weights", "µs per image", "relative to `baseline`",
              "training, epochs", "flips to chance"]),
        "",
        "µs per image: processor time, one image a run, one thread. Training: what the stages "
        "behind the baseline cost in processor time, in epochs of plain quantization-aware "
        "training of the same network; stage 3 trains nothing and is not counted. Flips to "
        "chance: [progressive bit search](attacks.md#adversarial-bits), 5 searches, 128 images to "
        "attack with, 1,000 others to measure on.",
        "",
        *([f"Measured otherwise, and left out: {', '.join(left)}.", ""] if left else []),
        f"Commands: `python benchmarks/methods.py models/{name}.toml {first['command']}`, then "
        f"`--measure {','.join(MEASURES)}`.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def write(out: Path, docs: Path) -> None:
    """docs/methods-table.md, and the rows it was made from in docs/results/methods/."""
    stored = docs / "results" / "methods"
    for path in sorted(out.glob("*/rows/*.json")):
        target = stored / path.parents[1].name / path.name
        artifacts.write_json(target, artifacts.read_json(path))
    order = [row["name"] for row in rows(None)]
    parts = [
        "# Table of methods\n",
        "Written by `python benchmarks/methods.py --write docs`; the rows stand in\n"
        "[results/methods](results/methods). What each method is: [methods.md](methods.md).\n",
    ]
    for folder in sorted(path for path in stored.glob("*") if path.is_dir()):
        found = {path.stem: artifacts.read_json(path) for path in folder.glob("*.json")}
        known = {name: found[name] for name in order if name in found}
        if "baseline" in known:
            parts.append(section(folder.name, known))
    text = "\n".join(parts)
    artifacts.write(docs / "methods-table.md", lambda p: p.write_text(text, encoding="utf-8"))


def work(
    base: recipe.Recipe, row: dict[str, Any], folder: Path, epochs: int | None, **prove: Any
) -> None:
    """Train and measure one row, unless it is there already."""
    made = plan(base, row, epochs, **prove)
    inputs = made.model_dump(mode="json", exclude_unset=True) | {"stages": row["stages"]}
    for section, path in (("data", "root"), ("data", "calibration"), ("float", "checkpoint")):
        inputs[section].pop(path, None)  # of this machine
    target = folder / "rows" / f"{row['name']}.json"
    if target.is_file() and artifacts.read_json(target)["inputs"] == inputs:
        return
    click.echo(f"row {row['name']}", err=True)
    twin = checkpoint(made, row["stages"], folder / "checkpoints")
    found = measure(made, twin, folder / "measured" / row["name"])
    options = {"epochs": epochs, "images": prove["images"], "draws": prove["draws"]}
    facts = {
        "about": row["about"],
        "stages": row["stages"],
        "epochs": ", ".join(
            f"{s} {getattr(made, s).epochs}" for s in ("baseline", *row["stages"]) if s != "adjust"
        ),
        "measured": {key: list(v) if isinstance(v, tuple) else v for key, v in prove.items()},
        "command": " ".join(f"--{k} {v}" for k, v in options.items() if v is not None),
        "inputs": inputs,
    }
    artifacts.write_json(target, facts | found)


@click.command()
@click.argument("base", required=False, type=click.Path(path_type=Path))
@click.option("--rows", "names", help="Rows by name, with commas.  [all]")
@click.option("--epochs", type=int, help="Epochs of every stage.  [those of the recipe]")
@click.option("--images", default=1000, show_default=True, help="Test images.")
@click.option("--draws", default=50, show_default=True, help="Fault patterns per rate.")
@click.option("--steps", default=20, show_default=True, help="PGD steps.")
@click.option("--measure", "more", help="Only add columns to finished rows: names with commas.")
@click.option("--attacked", default=100, show_default=True, help="Images of autoattack.")
@click.option("--out", default=Path("runs/methods"), type=click.Path(path_type=Path))
@click.option("--write", "docs", type=click.Path(path_type=Path), help="Folder of the page.")
def main(
    base: Path | None, names: str | None, epochs: int | None, images: int, draws: int, steps: int,
    more: str | None, attacked: int, out: Path, docs: Path | None,
) -> None:  # fmt: skip
    """Train and measure rows of methods.toml on a base recipe; write the table."""
    failed = []
    loaded = None if base is None else recipe.load(base)
    if loaded is not None and more is not None:
        wanted = measures(more)
        for row in rows(names):
            of = finished(loaded, row, out / loaded.name, attacked)
            if of is not None:
                add(of, wanted, out / loaded.name / "rows" / f"{row['name']}.json")
    elif loaded is not None:
        prove = {"images": images, "draws": draws, "steps": steps, "rates": RATES,
                 "epsilons": EPSILONS}  # fmt: skip
        for row in rows(names):
            try:
                work(loaded, row, out / loaded.name, epochs, **prove)
            except ResqError as error:
                click.echo(f"row {row['name']}: {error}", err=True)
                failed.append(row["name"])
    if docs is not None:
        write(out, docs)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
