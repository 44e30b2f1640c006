"""Encodings of the stored codes against plain int8 and ordinary memory protection.

    resq-deploy train models/cifar10-resnet8.toml --stage baseline --out work/baseline
    python benchmarks/encodings.py work/baseline/checkpoint.safetensors --work work --write docs

Exports one checkpoint with every encoding, without any retraining, and runs the same bit error
rates on every file; an int8 ONNX file is stored in those that `resq-deploy encode` takes:

    python benchmarks/encodings.py mlperf_tiny_resnet8_int8.onnx --data mlperf.npz --work other \\
        --write docs

mlperf.npz: see benchmarks/exhaustive.py. Rows that store as many bits see the same fault patterns.
Campaigns that exist in the work folder go on where they stopped. Writes a table between marks in
encoding.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pages
from tabulate import tabulate

from resq_deploy import data, metrics, progress, runtime
from resq_deploy.data.base import Dataset
from resq_deploy.encode import encode
from resq_deploy.encoding import Encoding, parse
from resq_deploy.export import export
from resq_deploy.inject import inject
from resq_deploy.recipe import Export

RATES = (1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
# encoding, and the protection in front of the memory
ROWS = (
    ("plain", "none"),
    ("parity:zero", "none"),
    ("parity:expected", "none"),
    ("secded", "none"),
    ("plain", "secded"),
    ("guard:expected", "none"),
    ("parity:nearest", "none"),
    ("guard:nearest", "none"),
    ("hamming", "none"),
    ("cosq:0.001", "none"),
    ("cosq:0.01", "none"),
    ("cosq:0.02", "none"),
    ("cosq:0.05", "none"),
)


def interval(value: float, low: float, high: float) -> str:
    """Percent."""
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def row(encoding: str, protection: str, found: dict[str, Any]) -> list[str]:
    """Cells of one campaign: memory, clean accuracy, then the mean accuracy at every rate."""
    golden = found["golden"]
    clean = metrics.wilson(golden["n_correct"], golden["n_total"], 0.95)
    cost = found["protection"]
    total = cost["data_bytes"] + cost["check_bytes"]
    in_front = "" if protection == "none" else f", `--protect {protection}`"
    return [
        f"`{encoding}`{in_front}",
        f"{total:,}",
        interval(clean.value, clean.low, clean.high),
        *(interval(r["mean"], r["low"], r["high"]) for r in found["per_rate"]),
    ]


def made(source: Path, encoding: str, out: Path, proof: Dataset) -> Path:
    """The file of `source` in an encoding."""
    if source.suffix == ".onnx":
        file = out.with_suffix(".onnx")
        encode(source, out=file, encoding=encoding)
        return file
    config = Export(parity_images=100)
    return export(source, out=out, images=proof, config=config, encoding=encoding)


def table(rows: list[list[str]], found: dict[str, Any], name: str, given: str, draws: int) -> str:
    """All rows, and how they were made."""
    versions = ", ".join(f"{k} {v}" for k, v in runtime.versions().items() if k != "resq_deploy")
    head = ["stored as", "bytes", "clean, %", *(f"BER {rate:g}" for rate in RATES)]
    n = found["n_images"]
    return "\n".join(
        [
            tabulate(rows, head, tablefmt="github", disable_numparse=True),
            "",
            f"Accuracy in percent on {n} test images of {name}: clean with its 95 % Wilson",
            f"interval, at each bit error rate the mean over {draws} fault patterns with its",
            "95 % bootstrap interval. No retraining: codes are rounded to the levels of the",
            "encoding.",
            f"{found['cpu']['name']}; {versions}. Command: `python benchmarks/encodings.py",
            f"{given} --data {name} --images {n} --draws {draws}`.",
        ]
    )


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--data", "name", default="cifar10", show_default=True)
@click.option("--images", default=1000, show_default=True)
@click.option("--draws", default=50, show_default=True, help="Fault patterns per rate.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Files and stores.")
@click.option("--write", type=click.Path(path_type=Path), help="Folder of encoding.md.")
def main(source: Path, name: str, images: int, draws: int, work: Path, write: Path | None) -> None:
    """Accuracy of the checkpoint or the int8 ONNX file SOURCE under bit errors, by encoding."""
    test, given, mark = data.load_test(name), "CKPT", "table"
    if source.suffix == ".onnx":
        given, mark = source.name, "other"
    few, rows, text = test.first(images), [], ""
    for encoding, protection in ROWS:
        if source.suffix == ".onnx" and parse(encoding).limit != Encoding.limit:
            continue
        out = work / encoding.replace(":", "-")
        model = made(source, encoding, out, test)
        store = work / f"{out.name}.{protection}.store"
        found = inject(
            model, few, out=store, fault="ber", protection=protection, rates=RATES, draws=draws,
            resume=store.exists(), show=progress.bar,
        )  # fmt: skip
        rows.append(row(encoding, protection, found))
        text = table(rows, found, Path(name).name, given, draws)
        if write is not None:  # after every row: the next one takes long
            pages.put(write / "encoding.md", mark, text)
    click.echo(text)


if __name__ == "__main__":
    main()
