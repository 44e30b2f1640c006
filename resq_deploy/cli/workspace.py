"""Around the runs: `report`, `data`, `recipe`."""

from __future__ import annotations

from pathlib import Path

import click

from resq_deploy.cli.edge import main
from resq_deploy.cli.options import (
    OUT_PATH,
    PATH,
    json_option,
)
from resq_deploy.cli.output import emit_json, table
from resq_deploy.errors import InputError


@main.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="DIR|FILE...")
@click.option("--out", type=OUT_PATH, required=True, metavar="FILE", help="HTML page to write.")
@json_option
def report(paths: tuple[Path, ...], out: Path, json_file: Path | None) -> None:
    """One self-contained HTML page of a run's folder, or of stores and JSON files of attacks."""
    from resq_deploy import report as stage

    click.echo(f"report: {stage.report(paths, out=out)}")
    emit_json({"report": str(out)}, json_file)


@main.command()
@click.argument("name")
@click.option("--check", "root", type=PATH, metavar="ROOT", help="Folder to look in. [$RESQ_DATA]")
@click.option("--size", type=click.IntRange(8, 1024), help="Resize to this many pixels per side.")
@json_option
def data(name: str, root: Path | None, size: int | None, json_file: Path | None) -> None:
    """Say what a folder holds of data set NAME: files, digests, images, the first problem."""
    from resq_deploy.data.check import check

    found = check(name, root, size)
    if found["files"]:
        verdicts = {True: "ok", False: "NOT the published file", None: "none published"}
        table([[f["file"], f["md5"], verdicts[f["ok"]]] for f in found["files"]],
              ["file", "MD5", "published"])  # fmt: skip
        click.echo()
    columns = ("n_images", "n_classes", "fewest_of_a_class", "most_of_a_class", "n_groups")
    rows = [
        [split, *("" if facts[c] is None else facts[c] for c in columns),
         "x".join(map(str, facts["shape"])), facts["dtype"]]
        for split, facts in found["splits"].items()
    ]  # fmt: skip
    if rows:
        table(rows, ["split", "images", "classes", "fewest", "most", "tracks", "shape", "dtype"])
    emit_json(found, json_file)
    if found["problem"] is not None:
        raise InputError(found["problem"])


@main.command()
@click.option("--template", is_flag=True, help="Print a recipe to start from.")
@click.option("--check", type=PATH, metavar="FILE", help="Say whether FILE is a valid recipe.")
@json_option
def recipe(template: bool, check: Path | None, json_file: Path | None) -> None:
    """Print a template, or check a recipe."""
    from resq_deploy import recipe as recipes

    if template == (check is not None):
        raise click.UsageError("give one of --template and --check FILE")
    if check is None:
        click.echo(recipes.TEMPLATE, nl=False)
        return
    loaded = recipes.load(check)
    recipes.load_manifest(Path(loaded.data.calibration))
    network = loaded.model.net or loaded.model.portable_source()
    click.echo(f"{check}: valid, {loaded.name} ({network} on {loaded.data.name})")
    emit_json(loaded.model_dump(mode="json"), json_file)
