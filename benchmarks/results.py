"""Write docs/results.md, docs/results/NAME.json and the table of README.md from finished runs.

    resq-deploy run models/cifar10-resnet20.toml       # and the others
    python benchmarks/methods.py models/cifar10-resnet8.toml        # rows of the table of methods
    python benchmarks/results.py runs/cifar10-resnet20 runs/cifar10-resnet8 runs/digits-resnet8

Only what the stores of the runs say: no number is typed by hand. A run whose folder is not given
keeps what docs/results/NAME.json holds of it, a row of methods that is not in runs/methods what
docs/results/methods holds; without arguments the pages are written again.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import method_tables
import pages
from tabulate import tabulate

from resq_deploy import artifacts
from resq_deploy.report import sources, table

ROOT = Path(__file__).parent.parent
PARTLY = "\u00b9"
HEAD = """\
# Results

Written by `python benchmarks/results.py RUN...` from the stores of finished runs; the numbers
behind the tables stand in [results/](results). Each table says its n, intervals, versions and
hardware. Fault patterns, and the images under attack, are the same for everything in a table.

First what each stage of a recipe bought, from whole runs of `resq-deploy run`; then what each
method does, one row a method, for these networks:

{methods}

What each method is: [methods.md](methods.md).
"""


def summary(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the README: clean, and the mildest attack and fault rate that the verdict uses.

    None of an undertrained network: its page says that the way works, not what is gained.
    """
    if undertrained(found["notes"]):
        return []
    wanted = {
        "clean": lambda row: True,
        "adversarial": lambda row: row["epsilon"] == found["verdict"]["attack"].get("epsilon"),
        "fault": lambda row: row["rate"] == found["verdict"]["fault"].get("rate"),
    }
    mark = PARTLY if found["notes"].get("data", {}).get("train") else ""
    return [
        [
            found["name"] + mark,
            row["label"],
            table.percent(row["stages"]["baseline"]),
            table.percent(row["stages"]["adjust"]),
            table.points(row["gain"]),
            table.row_size(row),
        ]
        for row in found["rows"]
        if row["measure"] in wanted and wanted[row["measure"]](row)
    ]


def read(run: Path) -> dict[str, Any]:
    """The table of a finished run and, under "notes", how it was made."""
    attack = artifacts.read_json(run / "prove" / "baseline" / "attack.json")
    facts = artifacts.read_json(run / "fault" / "checkpoint.json")
    recipe = artifacts.read_json(run / "recipe.json")
    stages = ("float", "baseline", "attack", "fault")
    notes = {
        "attack": {key: attack[key] for key in ("steps", "restarts")},
        "held_out": artifacts.read_json(run / "adjust" / "checkpoint.json")["held_out"],
        "training": {key: facts[key] for key in ("precision", "threads")}
        | {key: facts["versions"][key] for key in ("torch", "brevitas")},
        "data": {key: recipe["data"].get(key) for key in ("name", "train", "test", "train_images")},
        "model": {key: recipe["model"].get(key) for key in ("net", "width", "profile")},
        "epochs": {stage: recipe[stage]["epochs"] for stage in stages},
    }
    files = sorted((run / "export").glob("*/manifest.json"))
    pairs = [pair for file in files for pair in artifacts.read_json(file)["parity"]]
    if pairs:
        notes["parity"] = {
            "files": len(files),
            "images": pairs[0]["n_images"],
            "within_one_step": min(pair["within_one_step"] for pair in pairs),
            "max_steps": max(pair["max_steps"] for pair in pairs),
        }
    return table.build(sources.load(run)) | {"notes": notes}


def agreement(notes: dict[str, Any]) -> str:
    """How far torch, onnxruntime and qonnx are apart; nothing where an old result is silent."""
    if "parity" not in notes:
        return ""
    parity = notes["parity"]
    return (
        f"Parity of torch, onnxruntime and qonnx on the {parity['files']} exported files: at least "
        f"{parity['within_one_step']} of {parity['images']} images within one output step, at most "
        f"{parity['max_steps']} step(s) apart.  \n"
    )


def undertrained(notes: dict[str, Any]) -> int | None:
    """How many training images a short run was given; None for the others."""
    return notes.get("data", {}).get("train_images")


def made(notes: dict[str, Any]) -> str:
    """The data and epochs of a run; nothing where an older result does not say."""
    if "data" not in notes:
        return ""
    data = notes["data"]
    files = [f"{split} images {data[split]}" for split in ("train", "test") if data[split]]
    epochs = ", ".join(f"{stage} {n}" for stage, n in notes["epochs"].items())
    return f"Data: {', '.join([data['name'], *files])}; epochs: {epochs}.  \n"


def warning(notes: dict[str, Any]) -> str:
    """What stands above the table of a short run."""
    images = undertrained(notes)
    if images is None:
        return ""
    model = notes["model"]
    return (
        f"**Undertrained**: {model['net']} of width {model['width']:g} on {images:,} training "
        f"images,\n{notes['epochs']['float']} float epochs. It shows that every stage works on "
        "this network, not what it can reach.\n\n"
    )


def section(found: dict[str, Any]) -> str:
    """One run in Markdown."""
    notes = found["notes"]
    attack, training, check = notes["attack"], notes["training"], notes["held_out"]
    change, kept = check["change"], "kept" if check["kept"] else "not kept"
    title, _, text = table.markdown(found).partition("\n\n")
    return (
        f"#{title}\n\n{warning(notes)}{text}\n"
        f"Attack: PGD with {attack['steps']} steps, {attack['restarts']} random start, "
        "step size 1.25 epsilon / sqrt(steps).  \n"
        f"Stage 3 on images and patterns it had not seen: objective {change['value']:+.4f} "
        f"[{change['low']:+.4f}, {change['high']:+.4f}], {kept}.  \n"
        f"{made(notes)}{agreement(notes)}"
        f"Training: {training['precision']}, {training['threads']} thread(s), torch "
        f"{training['torch']}, Brevitas {training['brevitas']}; another "
        "number of threads sums in another order and moves the last bits.  \n"
        f"Command: `resq-deploy run models/{found['name']}.toml`\n"
    )


def methods(rows: Path) -> list[str]:
    """Take over what is new in `rows`; the tables of methods, one for every network."""
    stored = ROOT / "docs" / "results" / "methods"
    for path in sorted(rows.glob("*/rows/*.json")):
        target = stored / path.parents[1].name / path.name
        artifacts.write_json(target, artifacts.read_json(path))
    order = tomllib.loads((ROOT / "benchmarks" / "methods.toml").read_text())["row"]
    return method_tables.sections(stored, [row["name"] for row in order])


def anchor(heading: str) -> str:
    """The link to a heading of the page, as it is made of its letters, digits and hyphens."""
    kept = (c for c in heading.lower() if c.isalnum() or c in " -")
    return "#" + "".join(kept).replace(" ", "-")


def main(runs: list[Path]) -> None:
    """One section for every run that is given or stored, in the order of their names."""
    stored = ROOT / "docs" / "results"
    for run in runs:
        found = read(run)
        artifacts.write_json(stored / f"{found['name']}.json", found)
    sections: list[str] = []
    rows, footers = [], []
    for path in sorted(stored.glob("*.json")):
        found = artifacts.read_json(path)
        found["verdict"] = {key: found["verdict"][key] for key in table.TITLES}  # JSON is sorted
        sections.append(section(found))
        rows += summary(found)
        footers.append(f"onnxruntime {found['versions']['onnxruntime']}, {found['cpu']['name']}")
    tables = methods(ROOT / "runs" / "methods")
    titles = [text.partition("\n")[0].removeprefix("## ") for text in tables]
    links = "\n".join(f"- [{title.partition(':')[0]}]({anchor(title)})" for title in titles)
    page = "\n".join([HEAD.format(methods=links), *sections, *tables])
    partly = any(PARTLY in row[0] for row in rows)
    artifacts.write(ROOT / "docs" / "results.md", lambda p: p.write_text(page, encoding="utf-8"))
    headers = ["recipe", "accuracy, %", "int8 baseline", "hardened", "gain, points", "n"]
    block = "\n".join(
        [
            tabulate(rows, headers, tablefmt="github", disable_numparse=True),
            "",
            "Exported int8 files in onnxruntime, 95 % intervals; gains are paired on the same",
            "images and fault patterns. Attacks: white-box PGD on the Brevitas twin, replayed on",
            "the file. " + "; ".join(dict.fromkeys(footers)) + ".",
            *([f"{PARTLY} Trained on part of the training images, see its recipe."] * partly),
            "Every stage, rate and radius, with the commands: [docs/results.md](docs/results.md).",
        ]
    )
    pages.put(ROOT / "README.md", "table", block)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
