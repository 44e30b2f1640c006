"""Encodings of the stored codes against plain int8 and ordinary memory protection.

    resq-deploy train models/cifar10-resnet8.toml --stage baseline --out work/baseline
    python benchmarks/encodings.py work/baseline/checkpoint.safetensors --work work --write docs

Exports one checkpoint with every encoding, without any retraining, and runs the same bit error
rates on every file. Rows that store as many bits see the same fault patterns. Campaigns that exist
in the work folder go on where they stopped. Writes the table between the marks in encoding.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pages
from tabulate import tabulate

from resq_deploy import data, metrics, progress, runtime
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


def table(rows: list[list[str]], found: dict[str, Any], name: str, draws: int) -> str:
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
            f"CKPT --data {name} --images {n} --draws {draws}`.",
        ]
    )


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", "name", default="cifar10", show_default=True)
@click.option("--images", default=1000, show_default=True)
@click.option("--draws", default=50, show_default=True, help="Fault patterns per rate.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Files and stores.")
@click.option("--write", type=click.Path(path_type=Path), help="Folder of encoding.md.")
def main(
    checkpoint: Path, name: str, images: int, draws: int, work: Path, write: Path | None
) -> None:
    """Accuracy of CHECKPOINT under bit errors, by encoding."""
    test = data.load(name).test
    few, rows, text = test.first(images), [], ""
    for encoding, protection in ROWS:
        out = work / encoding.replace(":", "-")
        model = export(
            checkpoint, out=out, images=test, config=Export(parity_images=100), encoding=encoding
        )
        store = work / f"{out.name}.{protection}.store"
        found = inject(
            model, few, out=store, fault="ber", protection=protection, rates=RATES, draws=draws,
            resume=store.exists(), show=progress.bar,
        )  # fmt: skip
        rows.append(row(encoding, protection, found))
        text = table(rows, found, name, draws)
        if write is not None:  # after every row: the next one takes long
            pages.put(write / "encoding.md", "table", text)
    click.echo(text)


if __name__ == "__main__":
    main()
