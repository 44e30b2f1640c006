"""What a decoder in the file costs: time per image, and time to load.

    python benchmarks/decoders.py work/export/model.qdq.onnx --write docs

The file is one that `resq-deploy export` wrote with plain codes. Every encoding stores codes next
to its own; they take turns with the plain file: one thread, its processor time for images, that of
the process for loading. Ratios are paired within a round. Writes the table between the marks
in encoding.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
import pages
from onnx import numpy_helper
from tabulate import tabulate

from resq_deploy import encoding, metrics, runtime
from resq_deploy.encoding import decoders

NAMES = ("parity:zero", "guard:mean", "secded", "saf:tanh")
IMAGES = 50


def encoded(raw: bytes, name: str) -> bytes:
    """The file with the codes of its weights on the levels of an encoding, stored so."""
    model, kind = onnx.load_model_from_string(raw), encoding.parse(name)
    weights = {}
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight"):
            codes = numpy_helper.to_array(tensor).astype(np.float64)
            weights[tensor.name] = kind.nearest(codes * kind.limit / 127)
    decoders.attach(model, kind, weights)
    return bytes(model.SerializeToString())


def seconds(clock: Callable[[], float], action: Callable[[], object]) -> float:
    start = clock()
    action()
    return clock() - start


def ratio(times: np.ndarray, plain: np.ndarray) -> str:
    """Mean of paired ratios, with its bootstrap interval."""
    found = metrics.bootstrap_mean(times / plain)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--rounds", default=100, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Folder of encoding.md.")
def main(model: Path, rounds: int, write: Path | None) -> None:
    """Cost of every kind of decoder behind the weights of MODEL."""
    raw = model.read_bytes()
    files = {"plain": raw} | {name: encoded(raw, name) for name in NAMES}
    sessions = {name: runtime.session(file) for name, file in files.items()}
    shape = sessions["plain"].get_inputs()[0].shape[1:]
    x = np.random.default_rng(0).random((IMAGES, *shape), np.float32)
    run, load = ({name: np.empty(rounds) for name in files} for _ in range(2))
    for i in range(-3, rounds):  # three to warm up
        order = np.random.default_rng(i + 3).permutation(list(files))
        for name in order.tolist():
            once = seconds(time.thread_time, lambda n=name: runtime.run(sessions[n], x))
            again = seconds(time.process_time, lambda n=name: runtime.session(files[n]))
            if i >= 0:
                run[name][i], load[name][i] = once / IMAGES, again
    rows = [
        [
            f"`{name}`",
            f"{1e6 * np.median(run[name]):.0f}",
            ratio(run[name], run["plain"]),
            f"{1e3 * np.median(load[name]):.1f}",
            ratio(load[name], load["plain"]),
            f"{len(file):,}",
        ]
        for name, file in files.items()
    ]
    head = ["stored as", "µs per image", "ratio", "ms to load", "ratio", "bytes of the file"]
    cpu, versions = runtime.cpu_features()["name"], runtime.versions()["onnxruntime"]
    text = "\n".join(
        [
            tabulate(rows, head, tablefmt="github", disable_numparse=True),
            "",
            f"Medians of {rounds} rounds in which the files take turns, {IMAGES} images a run, one",
            "thread, processor time; ratios to `plain` are means over rounds with a 95 % bootstrap",
            f"interval. {cpu}; onnxruntime {versions}. Command: `python benchmarks/decoders.py`.",
        ]
    )
    click.echo(text)
    if write is not None:
        pages.put(write / "encoding.md", "cost", text)


if __name__ == "__main__":
    main()
