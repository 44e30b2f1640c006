"""How weights are stored, without training: `store` for floats, `encode` for int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resq_deploy.cli.edge import main
from resq_deploy.cli.options import OUT_PATH, PATH, json_option
from resq_deploy.cli.output import emit_json


@main.command()
@click.argument("model", type=PATH)
@click.option(
    "--as", "storage", required=True, metavar="FORMAT[:READING]",
    help="float32, float16 or qM.N; plain, scaled, tanh, arctan, softsign, hardtanh, lecun-tanh.",
)  # fmt: skip
@click.option(
    "--bound", "how", type=click.Choice(["ranger", "zero", "searched", "neuron", "learned"]),
    help="Bound what ReLUs give.  [not]",
)  # fmt: skip
@click.option("--data", help="Images for --bound: training images of cifar10, ... or an .npz.")
@click.option(
    "--images", type=click.IntRange(1), default=512, show_default=True, metavar="N",
    help="That many of them, drawn without replacement.",
)  # fmt: skip
@click.option("--root", type=PATH, help="Folder of the data set. [$RESQ_DATA]")
@click.option("--twin", type=PATH, help="Float checkpoint of MODEL, for --bound learned.")
@click.option("--out", type=OUT_PATH, required=True, metavar="FILE", help="ONNX file to write.")
@json_option
def store(
    model: Path,
    data: str | None,
    images: int,
    root: Path | None,
    out: Path,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Store the weights of the float ONNX file MODEL so that flips do less harm; no training."""
    from resq_deploy import data as sets
    from resq_deploy import floats, progress, static

    chosen = None if data is None else static.choose(sets.load_split(data, root, "train"), images)
    found = floats.store(model, out=out, images=chosen, show=progress.bar, **options)
    click.echo("kernels: " + ", ".join(f"{n} {op}" for op, n in found["kernels"].items()))
    click.echo(f"{out}: {found['sha256']}; faults: inject --target {found['target']}")
    emit_json(found, json_file)


@main.command()
@click.argument("model", type=PATH)
@click.option("--as", "encoding", required=True, metavar="NAME", help="cosq:0.01, hamming, ...")
@click.option("--out", type=OUT_PATH, required=True, metavar="FILE", help="ONNX file to write.")
@json_option
def encode(model: Path, encoding: str, out: Path, json_file: Path | None) -> None:
    """Store the int8 weights of the quantized ONNX file MODEL in an encoding; no training."""
    from resq_deploy import encode as stage

    found = stage.encode(model, out=out, encoding=encoding)
    click.echo("kernels: " + ", ".join(f"{n} {op}" for op, n in found["kernels"].items()))
    click.echo(f"{found['n_bytes']:,} weights moved by {found['rms_change']:.2f} steps (rms)")
    click.echo(f"{out}: {found['sha256']}")
    emit_json(found, json_file)
