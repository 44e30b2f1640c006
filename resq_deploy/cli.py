"""Command line: parse, call one function, print.

Only click and our own errors are imported up here; a command imports what it needs when it
runs, so that `--help` answers at once and a campaign box needs no training libraries.

A new command: decorate it with `@main.command()` and `@json_option`, import inside, call one
function, print with `emit`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from resq_deploy import progress
from resq_deploy.errors import InputError, MissingExtra, ResqError

INTERRUPTED = 130
EXTRAS = dict.fromkeys(
    ("torch", "brevitas", "safetensors", "qonnx", "onnxoptimizer", "sklearn", "tflite"), "train"
) | {"art": "attack"}
"""Optional modules and the extra that brings them."""


class Edge(click.Group):
    """The one place where errors become a line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ResqError, OSError and Ctrl-C end with one line, never a traceback."""
        warnings.filterwarnings("ignore", module="brevitas")  # about packages we do not use
        try:
            return super().invoke(ctx)
        except ResqError as error:
            _fail(ctx, str(error), error.exit_code)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "resq-deploy"
            _fail(ctx, f"{error.format_message()} ({where} --help)", error.exit_code)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in EXTRAS:
                raise
            _fail(ctx, str(MissingExtra(module, EXTRAS[module])), InputError.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{where}{error.strerror or error}", InputError.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; everything finished so far is kept", INTERRUPTED)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"resq-deploy: error: {' '.join(message.split())}", err=True)
    ctx.exit(code)


class _OutPath(click.Path):
    """A file to write: its folder must exist before long work begins, not after it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"folder {path.parent} of {path} does not exist; create it first", param, ctx)
        return path


PATH = click.Path(path_type=Path)
OUT_PATH = _OutPath(dir_okay=False, path_type=Path)

json_option = click.option(
    "--json", "json_file", type=OUT_PATH, metavar="FILE", help="Write the result as JSON."
)
data_options = [
    click.option("--data", required=True, help="digits, cifar10, ... or an .npz with x and y."),
    click.option("--images", type=int, metavar="N", help="The first N test images. [all]"),
    click.option("--root", type=PATH, help="Folder of the data set. [$RESQ_DATA]"),
]
confidence_option = click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of all intervals.",
)

interval_option = click.option(
    "--interval", default="wilson", show_default=True, help="Of rates: wilson or exact."
)
map_option = click.option(
    "--map", "map_file", type=PATH, metavar="FILE", help="memory_map.json: shows byte addresses."
)
raw_fit_option = click.option(
    "--raw-fit",
    type=float,
    metavar="FIT",
    help="Raw FIT per Mbit of the memory; shows the model's.",
)


def with_data(command: Any) -> Any:
    """Add `--data --images --root`; the command gets them as data, images, root."""
    for option in reversed(data_options):
        command = option(command)
    return command


def load_data(name: str, images: int | None, root: Path | None) -> Any:
    """The test images that `--data --images --root` ask for."""
    from resq_deploy import data

    return data.load_test(name, root).first(images)


def emit_json(value: Any, file: Path | None) -> None:
    """Write `value` to `--json FILE`, whole or not at all; nothing when no file was given."""
    if file is not None:
        write_text(json.dumps(value, indent=2) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def table(rows: Sequence[Sequence[Any]], headers: Iterable[str]) -> None:
    """Print a table."""
    from tabulate import tabulate

    click.echo(tabulate(rows, headers=list(headers), disable_numparse=True))


def warn(messages: Iterable[str]) -> None:
    """Print warnings to standard error, one line each."""
    for message in messages:
        click.echo(f"resq-deploy: warning: {message}", err=True)


def percent(interval: dict[str, Any], value: str = "mean") -> str:
    """`88.31 % [88.22, 88.39]` of an interval of rates in [0, 1]."""
    numbers = [100 * interval[key] for key in (value, "low", "high")]
    return "{:.2f} % [{:.2f}, {:.2f}]".format(*numbers)


def _names(ctx: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


@click.group(cls=Edge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="resq-deploy", prog_name="resq-deploy")
def main() -> None:
    """Deploy quantized networks that keep working when memory and inputs are corrupted."""


target_option = click.option(
    "--target",
    "targets",
    callback=_names,
    default="weight",
    show_default=True,
    metavar="T,T,...",
    help="What can be hit: weight, bias, scale, zero-point, activation.",
)


@main.command()
@click.argument("model", type=PATH)
@target_option
@json_option
def inspect(model: Path, targets: tuple[str, ...], json_file: Path | None) -> None:
    """Show the fault space of MODEL: its tensors, bytes and bits, and the kernels that run."""
    from resq_deploy import runtime
    from resq_deploy.inject import space

    found = space.inspect(runtime.read_model(model), str(model), targets)
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


def _rates(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} given; numbers such as 1e-4,1e-3 expected") from None


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


def _bytes(ctx: click.Context, option: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    number = text.rstrip("BKMGikmgb ")
    try:
        return int(float(number) * UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError):
        raise click.BadParameter(f"{text!r} given; a size such as 1GiB or 500MB expected") from None


def _shard(ctx: click.Context, option: click.Parameter, text: str) -> tuple[int, int]:
    index, _, n_shards = text.partition("/")
    try:
        return int(index), int(n_shards)
    except ValueError:
        raise click.BadParameter(f"{text!r} given; I/N such as 0/4 expected") from None


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
@click.option("--rates", callback=_rates, metavar="R,R,...", help="Bit error rates in [0, 1].")
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
@click.option(
    "--memory", callback=_bytes, metavar="SIZE", help="For golden data: 1GiB, 500MB. [a third]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Root of all random draws.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes.")
@click.option("--scheduler", metavar="ADDRESS", help="Let a Dask cluster do the work.")
@click.option(
    "--shard", callback=_shard, default="0/1", metavar="I/N", help="Trials with number % N == I."
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
    click.echo(
        f"fault accuracy    {percent(accuracy)} (bootstrap over {accuracy['n']} patterns, {level}),"
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


@main.command()
@click.argument("model", type=PATH)
@click.option("--against", type=PATH, metavar="OTHER", help="Another ONNX file to compare with.")
@with_data
@json_option
def verify(
    model: Path,
    against: Path | None,
    data: str,
    images: int | None,
    root: Path | None,
    json_file: Path | None,
) -> None:
    """Accuracy of MODEL in onnxruntime at the optimization levels off and all."""
    from resq_deploy import inject as stage
    from resq_deploy import runtime

    other = None if against is None else runtime.read_model(against)
    found = stage.verify(runtime.read_model(model), load_data(data, images, root), against=other)
    for name in ("accuracy", "against_accuracy"):
        for level, count in found.get(name, {}).items():
            label = "model" if name == "accuracy" else "other"
            click.echo(f"{label}, optimization {level}: {count['n_correct']}/{count['n_total']}")
    agreements = {"off against all": found["off_against_all"]}
    agreements |= {f"against other, {k}": v for k, v in found.get("against", {}).items()}
    for label, row in agreements.items():
        click.echo(
            f"{label}: largest difference {row['max_abs_diff']:g}, same top-1 on "
            f"{row['n_top1_equal']}/{row['n_total']}"
        )
    emit_json(found, json_file)


device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where training runs.",
)
fresh_option = click.option("--fresh", is_flag=True, help="Forget what an earlier call finished.")
out_folder = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the result.",
)


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


recipe_option = click.option(
    "--recipe", type=PATH, help="Take the options from this recipe. [the one in the checkpoint]"
)


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
    weights: str | None,
    tflite: bool,
    out: Path,
    depfile: Path | None,
    json_file: Path | None,
) -> None:
    """Write CHECKPOINT as int8 QDQ ONNX, QONNX and TFLite, with every guarantee checked."""
    from resq_deploy import artifacts, data
    from resq_deploy import export as stage
    from resq_deploy.export import bundle

    loaded = _recipe_of(checkpoint, recipe, root)
    given = ({"tflite": "required"} if tflite else {}) | ({"weights": weights} if weights else {})
    config = loaded.export.model_copy(update=given)
    images = data.of(loaded.data).test
    model = stage.export(checkpoint, out=out, images=images, config=config, encoding=encoding)
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
        sources = [checkpoint, artifacts.sidecar(checkpoint), *([recipe] if recipe else [])]
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


def _epsilons(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...]:
    def number(part: str) -> float:
        top, _, bottom = part.partition("/")
        return float(top) / float(bottom) if bottom else float(top)

    try:
        return tuple(number(part) for part in text.split(",")) if text else ()
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} given; radii such as 2/255,0.03 expected") from None


@main.command()
@click.argument("model", type=PATH)
@click.option("--twin", type=PATH, required=True, metavar="CKPT", help="Checkpoint of MODEL.")
@with_data
@click.option(
    "--eps", callback=_epsilons, default="1/255,2/255,4/255,8/255", show_default=True,
    metavar="E,E,...", help="L-infinity radii, pixels in [0, 1].",
)  # fmt: skip
@click.option(
    "--attacks", callback=_names, default="pgd", show_default=True, metavar="A,A,...",
    help="fgsm, pgd, apgd, apgd-dlr, autoattack, square.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of PGD.")
@click.option("--restarts", type=click.IntRange(1), default=1, show_default=True, help="Starts.")
@click.option(
    "--queries", type=click.IntRange(1), default=1000, show_default=True, help="Of Square."
)
@click.option("--sanity/--no-sanity", "check", default=True, help="Look for masked gradients.")
@click.option("--rates", callback=_rates, metavar="R,R,...", help="Also under these bit errors.")
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


def _limits_file(ctx: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Limits from a TOML file, as defaults of their options: what stands on the line wins."""
    if path is not None:
        from resq_deploy import gate as stage

        ctx.default_map = stage.read_file(path)


@main.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="STORE|JSON...")
@click.option("--min-clean", callback=_rates, metavar="A", help="Least accuracy without faults.")
@click.option("--min-accuracy", callback=_rates, metavar="A,A", help="Least accuracy with faults.")
@click.option("--at-ber", callback=_rates, metavar="R,R", help="Error rates of --min-accuracy.")
@click.option("--max-sdc", callback=_rates, metavar="P", help="Most SDC of single flips.")
@click.option("--min-adversarial", callback=_rates, metavar="A,A", help="Least when attacked.")
@click.option("--at-eps", callback=_epsilons, metavar="E,E", help="Radii of --min-adversarial.")
@click.option("--max-parity-steps", callback=_rates, metavar="N", help="Most between executions.")
@click.option("--max-weight-bytes", callback=_bytes, metavar="SIZE", help="Such as 100KiB.")
@confidence_option
@click.option(
    "--limits", type=PATH, is_eager=True, expose_value=False, callback=_limits_file,
    metavar="FILE", help="Take limits from a TOML file.",
)  # fmt: skip
@click.option("--model", type=PATH, help="ONNX file that all this must have been measured on.")
@click.option("--junit", "junit_file", type=OUT_PATH, metavar="FILE", help="Write JUnit XML.")
@click.option("--markdown", "markdown_file", type=OUT_PATH, metavar="FILE", help="Write a page.")
@json_option
def gate(
    paths: tuple[Path, ...],
    confidence: float,
    model: Path | None,
    junit_file: Path | None,
    markdown_file: Path | None,
    json_file: Path | None,
    max_weight_bytes: int | None,
    **limits: tuple[float, ...],
) -> None:
    """End with exit code 1 when a measurement in STOREs and JSON files misses its limit."""
    from resq_deploy import gate as stage
    from resq_deploy.errors import GateFailed

    evidence = stage.read(paths, confidence=confidence, model=model)
    limits["max_weight_bytes"] = () if max_weight_bytes is None else (max_weight_bytes,)
    checks = stage.check(evidence, limits)
    table(
        [[c.name, c.measured, c.needed, c.found.n, "pass" if c.passed else "FAIL", c.source]
         for c in checks],
        ["limit", "measured", "needed", "n", "", "from"],
    )  # fmt: skip
    for file, text in ((junit_file, stage.junit(checks)),
                       (markdown_file, stage.markdown(checks, evidence))):  # fmt: skip
        if file is not None:
            write_text(text, file)
    emit_json(stage.plain(checks, evidence), json_file)
    missed = stage.failures(checks)
    if missed:
        raise GateFailed(f"{len(missed)} of {len(checks)} limits missed: {'; '.join(missed)}")


@main.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="DIR|STORE...")
@click.option("--out", type=OUT_PATH, required=True, metavar="FILE", help="HTML page to write.")
@json_option
def report(paths: tuple[Path, ...], out: Path, json_file: Path | None) -> None:
    """One self-contained HTML page of a run's folder, or of campaign stores."""
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
