"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class OutPath(click.Path):
    """A file to write: its folder must exist before long work begins, not after it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"folder {path.parent} of {path} does not exist; create it first", param, ctx)
        return path


PATH = click.Path(path_type=Path)

OUT_PATH = OutPath(dir_okay=False, path_type=Path)

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


def names(ctx: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


target_option = click.option(
    "--target",
    "targets",
    callback=names,
    default="weight",
    show_default=True,
    metavar="T,T,...",
    help="What can be hit: weight, bias, scale, zero-point, float, activation.",
)


def rates(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} given; numbers such as 1e-4,1e-3 expected") from None


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


def size(ctx: click.Context, option: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    number = text.rstrip("BKMGikmgb ")
    try:
        return int(float(number) * UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        raise click.BadParameter(f"{text!r} given; a size such as 1GiB or 500MB expected") from None


def shard(ctx: click.Context, option: click.Parameter, text: str) -> tuple[int, int]:
    index, _, n_shards = text.partition("/")
    try:
        return int(index), int(n_shards)
    except ValueError:
        raise click.BadParameter(f"{text!r} given; I/N such as 0/4 expected") from None


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

recipe_option = click.option(
    "--recipe", type=PATH, help="Take the options from this recipe. [the one in the checkpoint]"
)


def radii(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...]:
    def number(part: str) -> float:
        top, _, bottom = part.partition("/")
        return float(top) / float(bottom) if bottom else float(top)

    try:
        return tuple(number(part) for part in text.split(",")) if text else ()
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} given; radii such as 2/255,0.03 expected") from None
