"""From a recipe, or a float file, to an exported model: `run` and its stages, `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resq_deploy.cli.edge import main
from resq_deploy.cli.options import (
    OUT_PATH,
    PATH,
    device_option,
    fresh_option,
    json_option,
    out_folder,
    recipe_option,
)
from resq_deploy.cli.output import emit_json, table, warn, write_text


@main.command()
@click.argument("recipe", type=PATH)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of the run. [runs/NAME]",
)
@device_option
@click.option("--workers", type=click.IntRange(1), help="Processes of the campaigns. [all cores]")
@fresh_option
@json_option
def run(
    recipe: Path,
    out: Path | None,
    device: str,
    workers: int | None,
    fresh: bool,
    json_file: Path | None,
) -> None:
    """Everything in RECIPE: train, adjust, export, prove, report. Unchanged stages are kept."""
    from resq_deploy import artifacts, pipeline
    from resq_deploy import recipe as recipes
    from resq_deploy.report import stage_table

    loaded = recipes.load(recipe)
    out = out or Path("runs") / loaded.name
    page = pipeline.run(loaded, out=out, device=device, workers=workers, fresh=fresh)
    click.echo(stage_table(out))
    click.echo(f"\nreport: {page}")
    emit_json(artifacts.read_json(out / "table.json"), json_file)


@main.command()
@click.argument("recipe", type=PATH)
@click.option(
    "--stage", type=click.Choice(["float", "baseline", "attack", "fault"]), required=True,
    help="float: pre-training; baseline: int8; attack: stage 1; fault: stage 2.",
)  # fmt: skip
@click.option("--from", "start", type=PATH, metavar="CKPT", help="Checkpoint to start from.")
@out_folder
@device_option
@fresh_option
@json_option
def train(
    recipe: Path,
    stage: str,
    start: Path | None,
    out: Path,
    device: str,
    fresh: bool,
    json_file: Path | None,
) -> None:
    """Run one training stage of RECIPE into DIR/checkpoint.safetensors."""
    from resq_deploy import recipe as recipes
    from resq_deploy import train as stages

    loaded = recipes.load(recipe)
    if stage == "baseline" and start is None:
        start = stages.train(loaded, "float", out=out / "float", device=device, fresh=fresh)
    _print_checkpoint(
        stages.train(loaded, stage, out=out, start=start, device=device, fresh=fresh), json_file
    )


def _print_checkpoint(path: Path, json_file: Path | None) -> None:
    from resq_deploy import artifacts

    facts = artifacts.read_json(artifacts.sidecar(path))
    click.echo(f"{facts['stage']}: {path}")
    if facts.get("history"):
        click.echo(f"loss {facts['history'][0]['loss']:.4f} -> {facts['history'][-1]['loss']:.4f}")
    emit_json(facts, json_file)


def _recipe_of(checkpoint: Path, recipe: Path | None, root: Path | None) -> Any:
    """The recipe given, or the one that the checkpoint's sidecar holds."""
    from resq_deploy import recipe as recipes

    if recipe is None:
        from resq_deploy.nets import checkpoint as checkpoints

        _, facts = checkpoints.load(checkpoint)
        raw = dict(facts["recipe"])
        raw["data"] = raw["data"] | {"calibration": ""}
        loaded = recipes.parse(raw, str(checkpoint))
    else:
        loaded = recipes.load(recipe)
    if root is not None:
        loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"root": root})})
    return loaded


@main.command()
@click.argument("checkpoint", type=PATH)
@click.option("--recipe", type=PATH, required=True, help="Recipe with the fields of [adjust].")
@click.option("--root", type=PATH, help="Folder of the data set. [$RESQ_DATA]")
@out_folder
@fresh_option
@json_option
def adjust(
    checkpoint: Path,
    recipe: Path,
    root: Path | None,
    out: Path,
    fresh: bool,
    json_file: Path | None,
) -> None:
    """Stage 3 on CHECKPOINT: clip and rescale its quantized weights, no training."""
    from resq_deploy import adjust as stage
    from resq_deploy import data
    from resq_deploy.data import calibration

    loaded = _recipe_of(checkpoint, recipe, root)
    images = calibration.load(loaded.data, data.of(loaded.data))
    made = stage.adjust(
        checkpoint, out=out, images=images, config=loaded.adjust, seed=loaded.seed, fresh=fresh
    )
    _print_checkpoint(made, json_file)
    from resq_deploy import artifacts

    facts = artifacts.read_json(artifacts.sidecar(made))
    table(
        [[d["layer"], d["ratio"], f"{d['objective_before']:.4f}", f"{d['objective_after']:.4f}"]
         for d in facts["decisions"]],
        ["layer", "clip ratio", "objective before", "after"],
    )  # fmt: skip
    if not facts["held_out"]["kept"]:
        click.echo("no gain on fault patterns that the search did not see: weights left alone")


@main.command()
@click.argument("checkpoint", type=PATH)
@recipe_option
@click.option("--root", type=PATH, help="Folder of the data set of the parity proof. [$RESQ_DATA]")
@click.option(
    "--encoding", metavar="NAME",
    help="Store the weights so, their codes rounded to its levels. [as the checkpoint was trained]",
)  # fmt: skip
@click.option(
    "--profile", metavar="NAME",
    help="Convert to the scales of float-channel, po2-tensor, ... [as the checkpoint was trained]",
)  # fmt: skip
@click.option("--weights", type=click.Choice(["int8", "int4"]), help="[as the recipe says]")
@click.option("--tflite", is_flag=True, help="Fail where model.tflite cannot hold the network.")
@out_folder
@click.option("--depfile", type=OUT_PATH, metavar="FILE", help="Write a rule for make and ninja.")
@json_option
def export(
    checkpoint: Path,
    recipe: Path | None,
    root: Path | None,
    encoding: str | None,
    profile: str | None,
    weights: str | None,
    tflite: bool,
    out: Path,
    depfile: Path | None,
    json_file: Path | None,
) -> None:
    """Write CHECKPOINT as int8 QDQ ONNX, QONNX and TFLite, with every guarantee checked."""
    from resq_deploy import artifacts, data
    from resq_deploy import export as stage
    from resq_deploy import recipe as recipes
    from resq_deploy.export import bundle

    loaded = _recipe_of(checkpoint, recipe, root)
    given = ({"tflite": "required"} if tflite else {}) | ({"weights": weights} if weights else {})
    config = loaded.export.model_copy(update=given)
    images = data.of(loaded.data).test
    model = stage.export(
        checkpoint, out=out, images=images, config=config, encoding=encoding, profile=profile
    )
    manifest = artifacts.read_json(model.parent / stage.MANIFEST)
    table([[name, digest] for name, digest in manifest["files"].items()], ["file", "SHA-256"])
    click.echo("kernels: " + ", ".join(f"{n} {op}" for op, n in manifest["kernels"].items()))
    table(
        [[p["a"], p["b"], p["n_images"], p["within_one_step"], p["max_steps"], p["argmax_equal"]]
         for p in manifest["parity"]],
        ["parity of", "and", "images", "within one step", "most steps", "same arg max"],
    )  # fmt: skip
    if not manifest["tflite"]["written"]:
        warn([f"not written: {manifest['tflite']['reason']}"])
    if depfile is not None:
        sources = [checkpoint, artifacts.sidecar(checkpoint)]
        sources += recipes.files(recipe) if recipe else []
        write_text(bundle.depfile(out / stage.MANIFEST, sources), depfile)
    emit_json(manifest, json_file)


@main.command()
@click.argument("model", type=PATH)
@click.option("--data", required=True, help="Training images of cifar10, ... or an .npz.")
@click.option(
    "--images", type=click.IntRange(1), default=512, show_default=True, metavar="N",
    help="That many of them, drawn without replacement.",
)  # fmt: skip
@click.option("--root", type=PATH, help="Folder of the data set. [$RESQ_DATA]")
@click.option("--out", type=OUT_PATH, required=True, metavar="FILE", help="QDQ file to write.")
@json_option
def quantize(
    model: Path, data: str, images: int, root: Path | None, out: Path, json_file: Path | None
) -> None:
    """Quantize the float ONNX file MODEL to int8 (QDQ, per channel); no PyTorch, no training."""
    from resq_deploy import data as sets
    from resq_deploy import static

    chosen = static.choose(sets.load_split(data, root, "train"), images)
    found = static.quantize(model, chosen, out=out)
    click.echo("kernels: " + ", ".join(f"{n} {op}" for op, n in found["kernels"].items()))
    right, n = found["n_correct"], found["n_images"]
    click.echo(
        f"calibration images: {right['float']}/{n} correct in float, {right['int8']}/{n} in int8, "
        f"same top-1 on {found['n_top1_equal']}/{n}"
    )
    if found["float_kernels"]:
        named = ", ".join(f"{n} {op}" for op, n in found["float_kernels"].items())
        warn([f"onnxruntime keeps layers in float: {named}"])
    click.echo(f"{out}: {found['sha256']}")
    emit_json(found, json_file)
