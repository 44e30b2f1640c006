"""The table of methods: train the rows of methods.toml, measure the exported files, compare.

    python benchmarks/methods.py models/cifar10-resnet8.toml --epochs 1 --rows baseline,fault
    python benchmarks/methods.py models/cifar10-resnet8.toml --measure fgsm,autoattack,ber,bfa,time
    python benchmarks/methods.py models/cifar10-resnet8.toml --epochs 1 --measure bfa --again
    python benchmarks/results.py

The first line trains and measures what is not there yet (it can be interrupted at any moment and
continues; rows share the checkpoints they have in common); --epochs replaces those of the stages
behind the float network. The second adds columns to the rows that are finished, from their files
and twins, without training anything. The third does so for rows of docs whose checkpoints are gone:
they are trained once more, and the columns, which the table marks, are those of what comes out. The
fourth writes the tables of docs/results.md from every row in --out, and the rows beside it; without
a row in --out what docs holds is written again.

`autoattack` runs on the first images of the row's PGD attack, on those that withstood it: what PGD
broke is broken. `time` runs the file and that of the row `baseline` in turns. `cost` is processor
time of training steps, relative to plain quantization-aware training (training_cost.py says how),
times the epochs of the stages behind the baseline.
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
from method_tables import pack, unpack
from numpy.typing import NDArray

from resq_deploy import artifacts, metrics, recipe, runtime, store
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError, ResqError

HERE = Path(__file__).parent
EPOCHS = ("baseline", "attack", "fault")
RATES = (1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
EPSILONS = tuple(k / 255 for k in (1, 2, 4, 8))
RARE = 1e-5
"""A rate at which few patterns matter: measured beside the others, and not part of the area."""
BOTH = (1e-3, 1e-2)
"""Bit error rates under which images of PGD at the first of EPSILONS run too."""
STORED = HERE.parent / "docs" / "results" / "methods"


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
    baseline: Callable[[], Path]
    """The exported file of the row `baseline`."""
    attacked: int
    """Images of `autoattack`."""
    again: dict[str, Any] | None = None
    """What is to be known of a second training, if the twin comes from one."""

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
        folder=folder, twin=twins[0], baseline=lambda: exported(out / "measured" / "baseline"),
        attacked=attacked,
    )  # fmt: skip


def trained_again(
    base: recipe.Recipe, row: dict[str, Any], out: Path, attacked: int, epochs: int | None
) -> Finished:
    """A row whose checkpoint is gone, trained once more from the same recipe.

    InputError unless the recipe, with `epochs`, is the one that the row was made from.
    """
    from resq_deploy import data
    from resq_deploy.export import export

    stored = artifacts.read_json(out / "rows" / f"{row['name']}.json")
    made = plan(base, row, epochs, **stored["measured"])
    if inputs_of(made, row["stages"]) != stored["inputs"]:
        raise InputError(
            f"row {row['name']} was not made from this recipe; its command: {stored['command']}"
        )
    twin, folder = checkpoint(made, row["stages"], out / "checkpoints"), out / "again" / row["name"]
    test = data.of(made.data).test
    model = export(twin, out=folder / "export", images=test, config=made.export)
    logits = runtime.run(runtime.session(model.read_bytes()), test.x)
    right = int((metrics.top1(logits) == test.y).sum())

    def baseline() -> Path:
        (plain,) = rows("baseline")
        return trained_again(base, plain, out, attacked, epochs).model

    return Finished(
        made=made, stages=row["stages"], row=stored, folder=folder, twin=twin, attacked=attacked,
        baseline=(lambda: model) if row["name"] == "baseline" else baseline,
        again={
            "model_sha256": artifacts.sha256(model), "n_correct": right, "n": len(test),
            "versions": artifacts.versions(), "cpu": runtime.cpu_features()["name"],
        },
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


def withstood(of: Finished) -> list[tuple[float, NDArray[np.float64]]]:
    """For each radius which of the first images PGD left right, 1.0 or 0.0."""
    from resq_deploy.attack import attack

    radii = of.row["attack"]["radii"]
    if of.again is None:
        return [(at["epsilon"], unpack(at)[: of.attacked]) for at in radii]
    found = attack(
        of.model, of.twin, of.test(of.attacked), epsilons=[at["epsilon"] for at in radii],
        steps=of.row["measured"]["steps"], check=False, seed=of.made.seed,
        out=of.folder / f"pgd-{of.attacked}.json",
    )  # fmt: skip
    return [(at["epsilon"], unpack(pack(at["correct"]))) for at in found["epsilons"]]


def autoattack(of: Finished) -> dict[str, Any]:
    """AutoAttack on what PGD left of the first images."""
    from resq_deploy.attack import attack

    images, radii, settings = of.test(of.attacked), [], {}
    for epsilon, right in withstood(of):
        left = np.flatnonzero(right)
        if left.size:
            found = attack(
                of.model, of.twin, images.take(left), epsilons=(epsilon,),
                attacks=("autoattack",), check=False,
                out=of.folder / f"autoattack-{255 * epsilon:.4g}.json",
            )  # fmt: skip
            settings = found["attacks"]["autoattack"]["members"]
            right[left] = [
                mark == "1" for mark in found["attacks"]["autoattack"]["epsilons"][0]["correct"]
            ]
        marks = "".join(f"{r:.0f}" for r in right)
        radii.append({"epsilon": epsilon} | pack(marks))
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
        test = of.test()
        images = min(1000, len(test) // 2)  # searches draw from the rest
        found = search(of.model, of.twin, test, images=images, seed=of.made.seed)
    except InputError as error:
        return {"refused": str(error)}
    artifacts.write_json(of.folder / "bfa.json", found)
    kept = ("clean", "limit", "flips_to_chance", "max_flips", "n_images", "batch", "random")
    return {key: found[key] for key in kept} | {
        "flips": [search["flips_to_chance"] for search in found["searches"]]
    }


def seconds(of: Finished) -> dict[str, Any]:
    """Processor time per image, one a run, one thread; the file and the baseline take turns."""
    files = {"row": of.model, "baseline": of.baseline()}
    sessions = {name: runtime.session(runtime.read_model(path)) for name, path in files.items()}
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


def add(
    target: Path, names: list[str], attacked: int, finished: Callable[[], Finished | None]
) -> None:
    """Measure what the row in `target` lacks of these columns, and write each into it.

    `finished` is called where there is something to measure; None: nothing can be.
    """
    of = None
    for name in names:
        row = artifacts.read_json(target)  # it may have got other columns meanwhile
        settings = {}
        if name == "autoattack":
            settings = {"attacked": attacked, "radii": len(row["attack"]["radii"])}
        if row.get("more", {}).get(name, {}).get("settings") == settings:
            continue
        found = same_file(row, name, settings, target.parent)
        if found is None:
            of = of or finished()
            if of is None:
                return
            click.echo(f"row {target.stem}: {name}", err=True)
            found = {"settings": settings} | MEASURES[name](of)
            found |= {} if of.again is None else {"again": of.again}
        row = artifacts.read_json(target)
        artifacts.write_json(target, row | {"more": row.get("more", {}) | {name: found}})


def same_file(
    of: dict[str, Any], name: str, settings: dict[str, int], rows: Path
) -> dict[str, Any] | None:
    """The column of another row whose file is the same, as where stage 3 changed nothing."""
    for path in sorted(rows.glob("*.json")):
        row = artifacts.read_json(path)
        found: dict[str, Any] = row.get("more", {}).get(name, {})
        alike = all(row[key] == of[key] for key in ("model_sha256", "data_sha256", "measured"))
        if name != "cost" and alike and found.get("settings") == settings:
            return found
    return None


def inputs_of(made: recipe.Recipe, stages: list[str]) -> dict[str, Any]:
    """What a row is made from, as it is stored with it."""
    inputs = made.model_dump(mode="json", exclude_unset=True) | {"stages": stages}
    for section, path in (("data", "root"), ("data", "calibration"), ("float", "checkpoint")):
        inputs[section].pop(path, None)  # of this machine
    return inputs


def work(
    base: recipe.Recipe, row: dict[str, Any], folder: Path, epochs: int | None, **prove: Any
) -> None:
    """Train and measure one row, unless it is there already."""
    made = plan(base, row, epochs, **prove)
    inputs = inputs_of(made, row["stages"])
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
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--rows", "names", help="Rows by name, with commas.  [all]")
@click.option("--epochs", type=int, help="Epochs of every stage.  [those of the recipe]")
@click.option("--images", default=1000, show_default=True, help="Test images.")
@click.option("--draws", default=50, show_default=True, help="Fault patterns per rate.")
@click.option("--steps", default=20, show_default=True, help="PGD steps.")
@click.option("--measure", "more", help="Only add columns to finished rows: names with commas.")
@click.option("--again", is_flag=True, help="With --measure: train rows that are gone once more.")
@click.option("--attacked", default=100, show_default=True, help="Images of autoattack.")
@click.option("--out", default=Path("runs/methods"), type=click.Path(path_type=Path))
def main(
    base: Path, names: str | None, epochs: int | None, images: int, draws: int, steps: int,
    more: str | None, again: bool, attacked: int, out: Path,
) -> None:  # fmt: skip
    """Train and measure rows of methods.toml on a base recipe."""
    failed = []
    try:
        loaded, chosen = recipe.load(base), rows(names)
        wanted = [] if more is None else measures(more)
    except ResqError as error:
        raise click.UsageError(str(error)) from None
    if more is not None:
        folder = out / loaded.name
        for stored in (STORED / loaded.name).glob("*.json") if again else ():
            if not (folder / "rows" / stored.name).is_file():
                artifacts.write_json(folder / "rows" / stored.name, artifacts.read_json(stored))
        for row in chosen:
            target = folder / "rows" / f"{row['name']}.json"
            if not target.is_file():
                continue

            def of(row: dict[str, Any] = row) -> Finished | None:
                found = finished(loaded, row, folder, attacked)
                if found is None and again:
                    found = trained_again(loaded, row, folder, attacked, epochs)
                return found

            try:
                add(target, wanted, attacked, of)
            except ResqError as error:
                click.echo(f"row {row['name']}: {error}", err=True)
                failed.append(row["name"])
    else:
        prove = {"images": images, "draws": draws, "steps": steps, "rates": RATES,
                 "epsilons": EPSILONS}  # fmt: skip
        for row in chosen:
            try:
                work(loaded, row, out / loaded.name, epochs, **prove)
            except ResqError as error:
                click.echo(f"row {row['name']}: {error}", err=True)
                failed.append(row["name"])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
