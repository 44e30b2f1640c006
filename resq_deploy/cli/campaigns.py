"""Fault campaigns: `inspect`, `inject`, `results`, `merge`, `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resq_deploy import progress
from resq_deploy.cli.edge import main
from resq_deploy.cli.options import (
    OUT_PATH,
    PATH,
    confidence_option,
    interval_option,
    json_option,
    load_data,
    map_option,
    rates,
    raw_fit_option,
    shard,
    size,
    target_option,
    with_data,
)
from resq_deploy.cli.output import emit_json, percent, table, warn


@main.command()
@click.argument("model", type=PATH)
@target_option
@json_option
def inspect(model: Path, targets: tuple[str, ...], json_file: Path | None) -> None:
    """Show the fault space of MODEL: its tensors, bytes and bits, and the kernels that run."""
    from resq_deploy import runtime
    from resq_deploy.inject import discovery

    found = discovery.inspect(runtime.read_model(model), str(model), targets)
    columns = ("name", "target", "dtype", "shape", "op_type", "node", "n_bits", "absorbed")
    rows = [[tensor[column] for column in columns] for tensor in found["tensors"]]
    table(rows, columns)
    click.echo(
        f"\n{found['n_tensors']} tensors, {found['n_bytes']} bytes, {found['n_bits']} bits; "
        f"{len(found['excluded'])} int32 biases are not in the fault space"
    )
    click.echo("kernels: " + ", ".join(f"{n} {op}" for op, n in found["kernels"].items()))
    warn(found["warnings"])
    emit_json(found, json_file)


@main.command()
@click.argument("model", type=PATH)
@with_data
@click.option("--fault", help="Fault model, see the manual. [single, or ber with --rates]")
@target_option
@click.option(
    "--protect",
    "protection",
    default="none",
    show_default=True,
    metavar="KIND",
    help="Memory protection: none, parity, secded, secded:zero or top:K.",
)
@click.option("--trials", type=int, help="Number of random patterns.")
@click.option("--margin", type=float, help="Sample size from this margin of error, in (0, 1).")
@confidence_option
@click.option("--per-layer", is_flag=True, help="With --margin: a sample of every layer.")
@click.option("--per-layer-bit", is_flag=True, help="With --margin: of every bit of every layer.")
@click.option("--until-width", type=float, metavar="W", help="Until the interval is so narrow.")
@click.option("--exhaustive", is_flag=True, help="Every bit once.")
@click.option("--sites", type=PATH, help="CSV with Injection,Layer,TensorIndex,Bit.")
@click.option("--image", type=PATH, metavar="DUMP", help="With --map: exactly these bytes.")
@map_option
@click.option("--rates", callback=rates, metavar="R,R,...", help="Bit error rates in [0, 1].")
@click.option("--draws", type=int, help="Patterns per rate. [50, or up to 1000]")
@interval_option
@raw_fit_option
@click.option(
    "--engine",
    type=click.Choice(["fast", "reload"]),
    default="fast",
    show_default=True,
    help="reload builds a session for every fault; fast gives the same results.",
)
@click.option("--memory", callback=size, metavar="SIZE", help="At most: 1GiB, 500MB. [a third]")
@click.option("--seed", type=int, default=0, show_default=True, help="Root of all random draws.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes.")
@click.option("--scheduler", metavar="ADDRESS", help="Let a Dask cluster do the work.")
@click.option(
    "--shard", callback=shard, default="0/1", metavar="I/N", help="Trials with number % N == I."
)
@click.option("--resume", is_flag=True, help="Continue the campaign in --out.")
@click.option("--out", type=OUT_PATH, required=True, metavar="STORE", help="Campaign store.")
@json_option
def inject(
    model: Path,
    data: str,
    images: int | None,
    root: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Flip bits in the stored weights, or in the activations, of MODEL and count what happens."""
    from resq_deploy import inject as stage

    found = stage.inject(model, load_data(data, images, root), show=progress.bar, **options)
    _print_campaign(found)
    emit_json(found, json_file)


def _print_image(found: dict[str, Any]) -> None:
    rows = found["image"]
    columns = ("tensor", "n_bytes", "n_bytes_differ", "n_bits_differ")
    table([[row[column] for column in columns] for row in rows], columns)
    changed, images = found["outcomes_images"], found["n_images"]
    click.echo(f"\nbits that differ  {sum(row['n_bits_differ'] for row in rows)}")
    if found["plan"]["n_fill_bits"]:
        click.echo(f"in the fill       {found['plan']['n_fill_bits']} bits, read by nobody")
    click.echo(f"golden accuracy   {found['golden']['n_correct']}/{images}")
    if changed["due"]:
        click.echo("with the dump     onnxruntime refuses the file")
    else:
        correct = round(found["fault_accuracy"]["mean"] * images)
        click.echo(f"with the dump     {correct}/{images}")
        click.echo(f"images            {changed['benign'] + changed['sdc']} with another output, "
                   f"{changed['sdc']} with another top-1")  # fmt: skip
    warn(found["warnings"])


def _print_campaign(found: dict[str, Any]) -> None:
    if found["image"] is not None:
        _print_image(found)
        return
    golden, accuracy, outcomes = found["golden"], found["fault_accuracy"], found["outcomes"]
    level = f"{100 * accuracy['confidence']:g} %"
    click.echo(f"golden accuracy   {golden['n_correct']}/{golden['n_total']}")
    click.echo(f"trials            {found['n_trials']} of {found['n_planned']}, {found['fault']}")
    click.echo("outcomes          " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    kind = _interval_name(found)
    click.echo(f"SDC rate          {percent(found['sdc_rate'], 'value')} ({kind}, {level})")
    if found["sdc5_rate"]["value"]:
        click.echo(f"SDC-5 rate        {percent(found['sdc5_rate'], 'value')}")
    if found["fit"]:
        fit = found["fit"]
        click.echo(
            f"FIT               {fit['value']:.4g} [{fit['low']:.4g}, {fit['high']:.4g}] for "
            f"{fit['mbit']:.4g} Mbit at {fit['raw_fit_per_mbit']:g} FIT/Mbit"
        )
    if found["until"] and not found["until"]["reached"]:
        warn([f"an interval is still wider than {found['until']['width']:g}: give more --draws"])
    if found["protection"]["name"] != "none":
        cost = found["protection"]
        click.echo(
            f"protection        {cost['name']}: {cost['check_bytes']} check bytes for "
            f"{cost['data_bytes']} ({100 * cost['overhead']:.1f} %), "
            f"{cost['hardened_bytes']} hardened"
        )
    strata = found["plan"]["kind"] == "strata"
    how = "stratified, normal" if strata else f"bootstrap over {accuracy['n']} patterns"
    click.echo(
        f"fault accuracy    {percent(accuracy)} ({how}, {level}),"
        f" worst {100 * accuracy['worst']:.2f} %"
    )
    if found["per_rate"]:
        click.echo()
        table(
            [
                [
                    f"{row['rate']:g}",
                    row["n"],
                    f"{row['mean_flips']:.1f}",
                    percent(row),
                    f"{100 * row['q05']:.2f}",
                    f"{100 * row['worst']:.2f}",
                ]
                for row in found["per_rate"]
            ],
            ["rate", "n", "flips", "fault accuracy", "5 % quantile", "worst"],
        )
    for name, key in (("per_layer", "tensor"), ("per_bit", "bit")):
        if found[name]:
            click.echo()
            table(
                [
                    [row[key], row["n_trials"], *row["outcomes"].values(), _sdc_cell(row)]
                    for row in found[name]
                ],
                [key, "n", *found["outcomes"], "SDC rate"],
            )
    warn(found["warnings"])


def _interval_name(found: dict[str, Any]) -> str:
    if found["until"] and not found["per_rate"]:
        return f"Clopper-Pearson, corrected for {len(found['until']['looks'])} looks"
    if found["plan"]["kind"] == "strata":
        return "stratified, Wilson"
    return {"wilson": "Wilson", "exact": "Clopper-Pearson"}[found["interval"]]


def _sdc_cell(row: dict[str, Any]) -> str:
    return percent(row["sdc_rate"], "value")


@main.command()
@click.argument("stores", type=PATH, nargs=-1, required=True, metavar="STORE...")
@confidence_option
@interval_option
@raw_fit_option
@map_option
@click.option("--csv", "csv_file", type=OUT_PATH, metavar="FILE", help="Write one row per trial.")
@click.option("--parquet", type=OUT_PATH, metavar="FILE", help="Write one row per trial.")
@click.option("--sites", is_flag=True, help="In the rows, draw the sites of several flips again.")
@click.option("--sites-csv", type=OUT_PATH, metavar="FILE", help="Write the faults, for --sites.")
@json_option
def results(
    stores: tuple[Path, ...],
    confidence: float,
    interval: Any,
    raw_fit: float | None,
    map_file: Path | None,
    csv_file: Path | None,
    parquet: Path | None,
    sites: bool,
    sites_csv: Path | None,
    json_file: Path | None,
) -> None:
    """Show a campaign; several STOREs are shards of one campaign."""
    from resq_deploy import inject as stage

    found = stage.results(
        stores, confidence=confidence, interval=interval, raw_fit=raw_fit, map_file=map_file
    )
    _print_campaign(found)
    emit_json(found, json_file)
    if csv_file is not None:
        stage.write_csv(stores, csv_file, sites=sites, map_file=map_file)
    if parquet is not None:
        stage.write_parquet(stores, parquet, sites=sites)
    if sites_csv is not None:
        stage.write_sites(stores, sites_csv)


@main.command()
@click.argument("stores", type=PATH, nargs=-1, required=True, metavar="STORE...")
@click.option("--out", type=OUT_PATH, required=True, metavar="STORE", help="New store to write.")
@json_option
def merge(stores: tuple[Path, ...], out: Path, json_file: Path | None) -> None:
    """Join the STOREs of one campaign's shards."""
    from resq_deploy import store

    n = store.merge(stores, out)
    click.echo(f"{n} trials of {len(stores)} stores in {out}")
    emit_json({"n_trials": n, "n_stores": len(stores), "out": str(out)}, json_file)


@main.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@confidence_option
@json_option
def compare(a: Path, b: Path, confidence: float, json_file: Path | None) -> None:
    """Fault accuracy of store B minus that of store A, paired on the same faults."""
    from resq_deploy import inject as stage

    found = stage.compare(a, b, confidence=confidence)
    rows = [["all", found["difference"]], *((f"{r['rate']:g}", r) for r in found["per_rate"])]
    table(
        [
            [
                k,
                r["n"],
                f"{r['mean']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]",
                f"{r['p_value']:.2g}",
            ]
            for k, r in rows
        ],
        ["rate", "n", "B - A, percentage points", "p"],
    )
    sdc = found["sdc"]
    click.echo(
        f"\nSDC in A only: {sdc['only_a']} trials, in B only: {sdc['only_b']} "
        f"(exact McNemar test, p = {sdc['p_value']:.2g})"
    )
    click.echo(f"without faults: {found['golden_difference']:+.2f} percentage points")
    warn(found["warnings"])
    emit_json(found, json_file)
