"""A float network under weight faults, by how its weights are stored and its activations bounded.

    python benchmarks/floats.py models/cifar10-resnet8.toml --work runs/floats --write docs

Takes the float network of a recipe, folds its batch norm, stores it with `resq-deploy store` in
every way, without training, and runs the same bit error rates on every file. Files that store as
many bits see the same fault patterns. Campaigns that exist in the work folder go on where they
stopped. Writes the table between the marks in floats.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pages
import torch
from onnx import load_model, numpy_helper
from tabulate import tabulate

from resq_deploy import artifacts, bounds, data, floats, metrics, progress, recipe, runtime, static
from resq_deploy.data.base import Dataset
from resq_deploy.export.graph import BATCH_AXIS, INPUT, OUTPUT, quiet
from resq_deploy.inject import inject
from resq_deploy.nets import checkpoint
from resq_deploy.nets.quantized import fold
from resq_deploy.train import train

RATES = (1e-6, 1e-5, 1e-4, 1e-3)
# storage, and the bounds of activations
ROWS = (
    *((f"float32{how}", None) for how in ("", *(f":{tau}" for tau in floats.TAUS))),
    ("float32:scaled", None),
    *(("float32", how) for how in bounds.BOUNDS),
    ("float16", None),
    ("float16:tanh", None),
    ("float16:scaled", None),
    ("q4.3", None),
    ("q4.3:scaled", None),
    *((f"float16:{tau}", None) for tau in list(floats.TAUS)[1:]),
    ("float32:scaled:4", None),
    ("float32:scaled:64", None),
    ("float32:tanh", "ranger"),
)
IMAGES = {"learned": 20_000}
"""Training images that bounds come from; others 512."""


def float_file(made: recipe.Recipe, work: Path, shape: tuple[int, ...]) -> Path:
    """The float network of a recipe as an ONNX file, batch norm folded."""
    net, _ = checkpoint.load(train(made, "float", out=work / "float"))
    out = work / "float.onnx"
    with quiet():
        torch.onnx.export(
            fold(net), (torch.zeros(1, *shape),), str(out), dynamo=False, opset_version=19,
            input_names=[INPUT], output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: BATCH_AXIS}, OUTPUT: {0: BATCH_AXIS}},
        )  # fmt: skip
    return out


def n_bytes(path: Path, found: dict[str, Any]) -> int:
    """What the weights take, and the bounds of activations, which no fault strikes here."""
    bounds = [t for t in load_model(path).graph.initializer if t.name.endswith(".bound")]
    return int(found["protection"]["data_bytes"]) + sum(
        numpy_helper.to_array(t).nbytes for t in bounds
    )


def interval(value: float, low: float, high: float) -> str:
    """Percent."""
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def row(
    source: Path, storage: str, how: str | None, train: Dataset, few: Dataset, draws: int
) -> tuple[list[str], dict[str, Any]]:
    """Cells of one file, and its campaign."""
    stem = "-".join([*storage.split(":"), *([how] if how else [])])
    model, path = source.with_name(f"{stem}.onnx"), source.with_name(f"{stem}.store")
    made = floats.store(
        source, out=model, storage=storage, how=how, show=progress.bar,
        images=static.choose(train, IMAGES.get(how, 512)) if how else None,
        twin=source.parent / "float" / "checkpoint.safetensors" if how == "learned" else None,
    )  # fmt: skip
    found = inject(
        model, few, out=path, fault="ber", targets=(made["target"],), rates=RATES, draws=draws,
        resume=path.exists(), show=progress.bar,
    )  # fmt: skip
    golden = found["golden"]
    clean = metrics.wilson(golden["n_correct"], golden["n_total"], 0.95)
    cells = [
        f"`{storage}`" + (f", `--bound {how}`" if how else ""),
        f"{n_bytes(model, found):,}",
        interval(clean.value, clean.low, clean.high),
        *(interval(r["mean"], r["low"], r["high"]) for r in found["per_rate"]),
        f"{100 * found['per_rate'][RATES.index(1e-5)]['worst']:.1f}",
    ]
    return cells, found


def table(rows: list[list[str]], found: dict[str, Any], name: str, file: str, draws: int) -> str:
    """All rows, and how they were made."""
    head = ["stored as", "bytes", "clean, %", *(f"BER {r:g}" for r in RATES), "worst at 1e-05"]
    versions = ", ".join(f"{k} {v}" for k, v in runtime.versions().items() if k != "resq_deploy")
    n = found["n_images"]
    return "\n".join(
        [
            str(tabulate(rows, head, tablefmt="github", disable_numparse=True)),
            "",
            f"Accuracy in percent of the float network of `{name}` on {n} test images:",
            "clean with its 95 % Wilson interval, at each bit error rate the mean over",
            f"{draws} fault patterns with its 95 % bootstrap interval; the worst pattern at 1e-5.",
            "Faults strike the stored weights. Bounds come from 512 training images, learned ones",
            f"from {IMAGES['learned']:,}; they are counted in the bytes, and not struck.",
            f"{found['cpu']['name']}; {versions}, torch {artifacts.versions()['torch']}.",
            f"Command: `python benchmarks/floats.py models/{file} --images {n}",
            f"--draws {draws} --work runs/floats --write docs`.",
        ]
    )


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--images", default=500, show_default=True, help="Test images.")
@click.option("--draws", default=50, show_default=True, help="Fault patterns per rate.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Files and stores.")
@click.option("--write", type=click.Path(path_type=Path), help="Folder of floats.md.")
def main(base: Path, images: int, draws: int, work: Path, write: Path | None) -> None:
    """Accuracy of the float network of the recipe BASE under bit errors, by storage."""
    made = recipe.load(base)
    splits = data.of(made.data)
    few = splits.test.first(images)
    source = float_file(made, work, few.x.shape[1:])
    rows: list[list[str]] = []
    for storage, how in ROWS:
        cells, found = row(source, storage, how, splits.train or splits.test, few, draws)
        rows.append(cells)
        text = table(rows, found, made.name, base.name, draws)
        if write is not None:  # after every row: the next one takes minutes
            pages.put(write / "floats.md", "table", text)
    click.echo(text)


if __name__ == "__main__":
    main()
