"""The table of methods: train the rows of methods.toml, measure the exported files, compare.

    python benchmarks/methods.py models/cifar10-resnet8.toml --epochs 1 --rows baseline,fault
    python benchmarks/methods.py --write docs

The first line trains and measures what is not there yet (it can be interrupted at any moment and
continues; rows share the checkpoints they have in common); --epochs replaces those of the stages
behind the float network. The second writes docs/methods-table.md from every row in --out, and the
rows beside it; without a row in --out what docs holds is written again. Differences are those to
the row `baseline`, paired on the same images and fault patterns.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resq_deploy import artifacts, metrics, recipe, store
from resq_deploy.errors import InputError, ResqError
from resq_deploy.report import table

HERE = Path(__file__).parent
EPOCHS = ("baseline", "attack", "fault")
RATES = (1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
EPSILONS = tuple(k / 255 for k in (1, 2, 4, 8))


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
    found = {"clean": unpack(row["clean"])}
    for at in row["attack"]["radii"]:
        found[f"PGD {table.epsilon_label(at['epsilon'])}"] = unpack(at)
    rates = [at["rate"] for at in row["fault"]["rates"]]
    faulty = np.array([at["n_correct"] for at in row["fault"]["rates"]]) / row["fault"]["n_images"]
    found |= {f"BER {rate:g}": values for rate, values in zip(rates, faulty, strict=True)}
    if len(rates) > 1:
        x = np.log10(rates)
        found["area"] = np.trapezoid(faulty, x, axis=0) / (x[-1] - x[0])
    return found


def accuracy(column: str, values: NDArray[np.float64]) -> str:
    """Mean in percent with its 95 % interval: Wilson over images, bootstrap over patterns."""
    if column.startswith(("BER", "area")):
        found = metrics.bootstrap_mean(values)
    else:
        found = metrics.wilson(int(values.sum()), len(values))
    return table.percent(vars(found))


def difference(values: NDArray[np.float64], base: NDArray[np.float64]) -> str:
    """Paired difference in percentage points with its 95 % interval."""
    found = metrics.bootstrap_mean(100 * (values - base))
    return table.points({"points": found.value, "low": found.low, "high": found.high})


def section(name: str, found: dict[str, dict[str, Any]]) -> str:
    """The tables of one base recipe, in Markdown."""
    first = found["baseline"]
    same = ("data_sha256", "measured")
    kept = {n: row for n, row in found.items() if all(row[k] == first[k] for k in same)}
    left = sorted(found.keys() - kept.keys())
    columns = {n: samples(row) for n, row in kept.items()}
    names, base = list(columns["baseline"]), columns["baseline"]
    head = ["row", *names]
    levels = [[n, *(accuracy(c, v) for c, v in columns[n].items())] for n in kept]
    gains = [[n, *(difference(columns[n][c], base[c]) for c in names)]
             for n in kept if n != "baseline"]  # fmt: skip
    tails = [
        [n, *(f"{100 * np.quantile(v, 0.05):.1f}; {100 * v.min():.1f}"
              for c, v in columns[n].items() if c.startswith("BER"))]
        for n in kept
    ]  # fmt: skip
    about = [[n, row["about"], " -> ".join(row["stages"]) or "none", row["epochs"]]
             for n, row in kept.items()]  # fmt: skip
    draws = len(first["fault"]["rates"][0]["n_correct"])

    def grid(body: list[list[Any]], headers: list[str]) -> str:
        return str(tabulate(body, headers, tablefmt="github", disable_numparse=True))

    versions = ", ".join(
        f"{k} {first['versions'][k]}" for k in ("torch", "brevitas", "onnxruntime")
    )
    return "\n".join(
        [
            f"## {name}",
            "",
            f"Exported int8 files in onnxruntime; {len(base['clean'])} test images for clean, "
            f"{first['attack']['radii'][0]['n']} under attack ({first['attack']['what']}, "
            f"white-box on the twin, replayed on the file), {draws} fault patterns per rate on "
            f"{first['fault']['n_images']} images; 95 % intervals. `area`: mean over log10 BER. "
            f"{versions}, {first['cpu']}.",
            "",
            grid(about, ["row", "what", "stages behind the baseline", "epochs per stage"]),
            "",
            "Accuracy, %:",
            "",
            grid(levels, head),
            "",
            "Difference to `baseline` in percentage points, paired:",
            "",
            grid(gains, head),
            "",
            "5 % quantile over patterns; worst pattern, %:",
            "",
            grid(tails, ["row", *(c for c in names if c.startswith("BER"))]),
            "",
            *([f"Measured otherwise, and left out: {', '.join(left)}.", ""] if left else []),
            f"Command: `python benchmarks/methods.py models/{name}.toml {first['command']}`",
            "",
        ]
    )


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
@click.option("--out", default=Path("runs/methods"), type=click.Path(path_type=Path))
@click.option("--write", "docs", type=click.Path(path_type=Path), help="Folder of the page.")
def main(
    base: Path | None, names: str | None, epochs: int | None, images: int, draws: int, steps: int,
    out: Path, docs: Path | None,
) -> None:  # fmt: skip
    """Train and measure rows of methods.toml on a base recipe; write the table."""
    failed = []
    if base is not None:
        loaded = recipe.load(base)
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
