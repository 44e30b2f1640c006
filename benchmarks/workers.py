"""How much faster is a campaign by two worker processes than by one?

    python benchmarks/workers.py --root DIR
    python benchmarks/workers.py --root DIR --write docs/engine.md

Wall clock of `inject` on the CIFAR-10 ResNet-8, from the call to the result, so what starting the
workers costs is in it: on a machine with nothing else to do, or it says nothing. Campaigns of one
length take turns.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import tempfile
import time
from pathlib import Path

import click
from pages import put
from tabulate import tabulate

from resq_deploy import data, runtime
from resq_deploy.inject import inject

HEAD = ("faults", "workers", "seconds", "faults / s", "times one worker")


@click.command()
@click.option("--root", type=click.Path(path_type=Path), help="Folder of CIFAR-10. [$RESQ_DATA]")
@click.option("--images", default=500, show_default=True)
@click.option("--faults", multiple=True, type=int, default=(1000, 4000, 16000), show_default=True)
@click.option("--turns", default=3, show_default=True, help="Campaigns of each kind; their median.")
@click.option("--write", type=click.Path(path_type=Path), help="Page that the table goes into.")
def main(
    root: Path | None, images: int, faults: tuple[int, ...], turns: int, write: Path | None
) -> None:
    """Measure; see the top of this file."""
    from engines import subject  # with torch, which every worker would import again

    splits = data.load("cifar10", root)
    test, rows = splits.test.first(images), []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        model.write_bytes(subject("resnet8", splits.train or splits.test).model)
        for n in faults:
            took: dict[int, list[float]] = {1: [], 2: []}
            for turn in range(turns):
                for workers, seconds in took.items():
                    start, out = time.monotonic(), Path(folder) / f"{n}-{turn}-{workers}.store"
                    inject(model, test, out=out, trials=n, workers=workers)
                    seconds.append(time.monotonic() - start)
            one = statistics.median(took[1])
            for workers, seconds in took.items():
                middle = statistics.median(seconds)
                span = f"{middle:.1f} [{min(seconds):.1f}, {max(seconds):.1f}]"
                rows.append([n, workers, span, f"{n / middle:.0f}", f"{one / middle:.2f}"])
    table = tabulate(rows, HEAD, tablefmt="github", disable_numparse=True)
    options = "".join(f" --faults {n}" for n in faults) + f" --images {images} --turns {turns}"
    text = (
        f"ResNet-8, {images} images, wall clock; median, least and most of {turns} campaigns; "
        f"{runtime.cpu_features()['name']}, {os.cpu_count()} cores. "
        f"`python benchmarks/workers.py{options} --write docs/engine.md`\n\n{table}"
    )
    click.echo(text)
    if write is not None:
        put(write, "workers", text)


if __name__ == "__main__":
    main()
