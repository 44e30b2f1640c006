"""Attacks on inputs and on stored bits: `attack`, `bfa`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resq_deploy.cli.edge import main
from resq_deploy.cli.options import (
    OUT_PATH,
    PATH,
    confidence_option,
    json_option,
    load_data,
    names,
    radii,
    rates,
    with_data,
)
from resq_deploy.cli.output import emit_json, percent, table, warn, write_text


@main.command()
@click.argument("model", type=PATH)
@click.option("--twin", type=PATH, required=True, metavar="CKPT", help="Checkpoint of MODEL.")
@with_data
@click.option(
    "--eps", callback=radii, default="1/255,2/255,4/255,8/255", show_default=True,
    metavar="E,E,...", help="L-infinity radii, pixels in [0, 1].",
)  # fmt: skip
@click.option(
    "--attacks", callback=names, default="pgd", show_default=True, metavar="A,A,...",
    help="fgsm, pgd, apgd, apgd-dlr, autoattack, square.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of PGD.")
@click.option("--restarts", type=click.IntRange(1), default=1, show_default=True, help="Starts.")
@click.option(
    "--queries", type=click.IntRange(1), default=1000, show_default=True, help="Of Square."
)
@click.option("--sanity/--no-sanity", "check", default=True, help="Look for masked gradients.")
@click.option("--rates", callback=rates, metavar="R,R,...", help="Also under these bit errors.")
@click.option("--draws", type=int, default=20, show_default=True, help="Patterns per rate.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes, with --rates.")
@confidence_option
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
def attack(
    model: Path,
    twin: Path,
    data: str,
    images: int | None,
    root: Path | None,
    eps: tuple[float, ...],
    json_file: Path | None,
    **options: Any,
) -> None:
    """Attack the inputs of MODEL, white-box on its twin or black-box, and run them on MODEL."""
    from resq_deploy import attack as stage

    found = stage.attack(model, twin, load_data(data, images, root), epsilons=eps, **options)
    _print_attack(found)
    warn(found["warnings"])
    emit_json(found, json_file)


def _print_attack(found: dict[str, Any]) -> None:
    def fraction(count: dict[str, int] | None) -> str:
        return "" if count is None else f"{count['n_correct']}/{count['n_total']}"

    clean = found["clean"]
    rows = [["none", "0", fraction(clean["twin"]), fraction(clean["deployed"]), ""]]
    groups = [(a["label"], a["epsilons"]) for a in found["attacks"].values()]
    for label, measured in [*groups, ("worst of each image", found["worst"])]:
        rows += [
            [label, _radius(row["epsilon"]), fraction(row.get("twin")), fraction(row["deployed"]),
             percent(row["accuracy"], "value")]
            for row in measured
        ]  # fmt: skip
    table(rows, ["attack", "epsilon", "twin", "exported file", "adversarial accuracy"])
    if found.get("sanity"):
        click.echo("\nsigns of masked gradients:")
        table(
            [
                [row["check"], _radius(row["epsilon"]),
                 *(f"{row[k]['attack']}: {row[k]['n_correct']}" if k in row else ""
                   for k in ("weaker", "stronger")),
                 row["n_total"], f"{row['p_value']:.2g}" if "p_value" in row else "",
                 row["verdict"]]
                for row in found["sanity"]
            ],
            ["check", "epsilon", "weaker, correct", "stronger, correct", "n", "p", "verdict"],
        )  # fmt: skip
    if found.get("matrix"):
        click.echo()
        table(
            [[_radius(row["epsilon"]), f"{row['rate']:g}", row["n_images"], row["n_patterns"],
              percent(row), f"{100 * row['worst']:.2f}"]
             for row in found["matrix"]],
            ["epsilon", "bit error rate", "images", "patterns", "accuracy", "worst"],
        )  # fmt: skip


def _radius(epsilon: float) -> str:
    return f"{epsilon * 255:g}/255"


@main.command()
@click.argument("model", type=PATH)
@click.option("--twin", type=PATH, required=True, metavar="CKPT", help="Checkpoint of MODEL.")
@with_data
@click.option("--flips", type=int, default=50, show_default=True, help="At most, per search.")
@click.option("--seeds", "n_seeds", type=int, default=5, show_default=True, help="Searches.")
@click.option("--batch", type=int, default=128, show_default=True, help="Images to attack with.")
@confidence_option
@click.option("--seed", type=int, default=0, show_default=True, help="Root of all random draws.")
@click.option("--sites-csv", type=OUT_PATH, metavar="FILE", help="Write the flips, for --sites.")
@json_option
def bfa(
    model: Path,
    twin: Path,
    data: str,
    images: int | None,
    root: Path | None,
    sites_csv: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Flip the stored bits of MODEL that do most harm: progressive bit search on its twin."""
    from resq_deploy.attack import bfa as stage

    loaded = load_data(data, None, root)
    found = stage.bfa(model, twin, loaded, images=images, **options)
    n = found["n_images"]
    table(
        [
            [number, len(made["flips"]),
             "not reached" if made["flips_to_chance"] is None else made["flips_to_chance"],
             f"{(made['flips'] or [found['clean']])[-1]['n_correct']}/{n}",
             f"{made['twin_n_correct']}/{n}"]
            for number, made in enumerate(found["searches"])
        ],
        ["search", "flips", "flips to chance", "exported file", "twin"],
    )  # fmt: skip
    click.echo(f"\nwithout flips: {found['clean']['n_correct']}/{n}")
    click.echo(f"chance: at most {100 * found['limit']:.2f} %")
    reached = found["flips_to_chance"]
    counts = f"in {reached['n_reached']} of {reached['n_searches']} searches"
    if "mean" in reached:
        span = f"{reached['mean']:.1f} [{reached['low']:.1f}, {reached['high']:.1f}]"
        click.echo(f"flips to chance: {span} (bootstrap over searches), reached {counts}")
    else:
        click.echo(f"flips to chance: reached {counts}, else more than {reached['more_than']}")
    if found["random"] is not None:
        accuracy = found["random"]["fault_accuracy"]
        click.echo(
            f"{found['random']['n_flips']} random flips: {percent(accuracy)} "
            f"({accuracy['n']} patterns)"
        )
    if sites_csv is not None:
        write_text(stage.sites_csv(found), sites_csv)
    emit_json(found, json_file)
