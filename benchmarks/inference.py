"""Time per image of the exported file, against what else the same network can be made into.

    python benchmarks/inference.py --write docs/inference.md

Compared are (a) a network of Brevitas layers as one writes it (batch norm left in, additions of
plain values, default quantizers, weights per channel) in Brevitas' own QCDQ export, (b) the float
network quantized by `onnxruntime.quantization` (`resq-deploy quantize`: QDQ, per channel, batch
norm folded), and the float network itself. Fresh weights and images of noise: neither moves the
time. One image a run, one thread, its processor time, so that what else the machine does counts
as little as it can. The files take turns, in an order drawn anew in each round, each time in a new
session: where a session's memory happens to lie moves its time by percents. Ratios are paired
within a round; intervals are BCa bootstrap over rounds, 95 %.
"""

from __future__ import annotations

import os

# Before anything computes: one thread, asleep when idle.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import copy
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import brevitas.nn as qnn
import click
import numpy as np
import onnxruntime as ort
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.quant import Int8WeightPerChannelFloat
from tabulate import tabulate
from torch import nn

from resq_deploy import metrics, runtime, static
from resq_deploy.data import Dataset
from resq_deploy.export.graph import quiet
from resq_deploy.export.qdq import qdq
from resq_deploy.nets import build
from resq_deploy.nets.quantized import calibrate, quantize

NETS = (
    "resnet8", "resnet20", "resnet18", "vgg16", "mobilenetv2", "efficientnet_b0", "swin_tiny",
)  # fmt: skip
SHAPE = (3, 32, 32)
OURS, PLAIN, STATIC, FLOAT = "exported", "(a) Brevitas QCDQ", "(b) quantize_static", "float"


def plain(net: nn.Module) -> nn.Module:
    """The network of Brevitas layers that their documentation shows."""
    net = copy.deepcopy(net)
    for name, old in list(net.named_modules()):
        if isinstance(old, nn.Conv2d):
            options = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups")}
            new = qnn.QuantConv2d(
                old.in_channels, old.out_channels, old.kernel_size, bias=old.bias is not None,
                weight_quant=Int8WeightPerChannelFloat, **options,
            )  # fmt: skip
        elif isinstance(old, nn.Linear):
            new = qnn.QuantLinear(
                old.in_features, old.out_features, bias=True, weight_quant=Int8WeightPerChannelFloat
            )
        elif isinstance(old, nn.ReLU):
            new = qnn.QuantReLU()
        elif name == "input":
            new = qnn.QuantIdentity()
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, new)
    return net


def exported(save: Callable[[Path], object]) -> bytes:
    """The bytes that an exporter writes."""
    with TemporaryDirectory() as folder, quiet():
        save(Path(folder) / "model.onnx")
        return (Path(folder) / "model.onnx").read_bytes()


def files(name: str, images: Dataset) -> dict[str, bytes]:
    """The same network in every form."""
    net = build(name, n_classes=10, in_channels=3, seed=1).eval()
    x = torch.from_numpy(images.x.astype(np.float32) / 255)
    int8, naive = quantize(net), plain(net)
    calibrate(int8, x)
    calibrate(naive, x)
    one, common = torch.zeros(1, *SHAPE), {"opset_version": 19, "dynamo": False}
    found = {
        OURS: qdq(int8, SHAPE, opset=19, ir_version=10).SerializeToString(),
        PLAIN: exported(
            lambda f: export_onnx_qcdq(naive.eval(), args=one, export_path=str(f), **common)
        ),
        FLOAT: exported(
            lambda f: torch.onnx.export(
                net, (one,), str(f), input_names=["x"], dynamic_axes={"x": {0: "N"}}, **common
            )
        ),
    }
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "static.onnx"
        source.write_bytes(found[FLOAT])
        static.quantize(source, images, out=target)
        found[STATIC] = target.read_bytes()
    return found


def session(model: bytes) -> ort.InferenceSession:
    """As a user builds it: onnxruntime's own options, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(models: dict[str, bytes], rounds: int, runs: int) -> dict[str, np.ndarray]:
    """Seconds per image of each file, by round."""
    rng = np.random.default_rng(0)
    image = rng.random((1, *SHAPE), np.float32)
    times = {name: np.zeros(rounds) for name in models}
    for i in range(rounds):
        for name in rng.permutation(list(models)):
            built = session(models[name])
            feed = {built.get_inputs()[0].name: image}
            for _ in range(2):
                built.run(None, feed)  # memory is faulted in
            start = time.thread_time()
            for _ in range(runs):
                built.run(None, feed)
            times[name][i] = (time.thread_time() - start) / runs
    return times


def rows(name: str, rounds: int, runs: int) -> list[list[str]]:
    """One row for each form of a network."""
    x = np.random.default_rng(1).integers(0, 256, (64, *SHAPE), np.uint8)
    models = files(name, Dataset(name="noise", x=x, y=np.arange(64) % 10))
    times = measure(models, rounds, runs)
    found = []
    for form, raw in models.items():
        ms = metrics.bootstrap_mean(1000 * times[form])
        ratio = metrics.bootstrap_mean(times[form] / times[OURS])
        kernels = runtime.kernels(raw)
        floating = sum(n for op, n in kernels.items() if op in static.FLOAT_KERNELS)
        found.append(
            [name, form, f"{ms.value:.3f} [{ms.low:.3f}, {ms.high:.3f}]",
             f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if form != OURS else "1",
             f"{kernels.get('QLinearConv', 0)} + {kernels.get('QGemm', 0)}", str(floating)]
        )  # fmt: skip
    return found


@click.command()
@click.option("--rounds", default=60, show_default=True, help="Times that each file has its turn.")
@click.option("--runs", default=10, show_default=True, help="Images in a turn.")
@click.option("--net", "nets", multiple=True, default=NETS, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Page to write.")
def main(rounds: int, runs: int, nets: tuple[str, ...], write: Path | None) -> None:
    """Time per image of every form of each network."""
    body = [row for name in nets for row in rows(name, rounds, runs)]
    head = ["network", "file", "ms / image", "times the exported file", "integer conv. + linear",
            "float ones"]  # fmt: skip
    cpu = runtime.cpu_features()
    versions = runtime.versions() | {"torch": torch.__version__.partition("+")[0]}
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    text = "\n".join(
        [
            "# Inference time",
            "",
            "Written by `python benchmarks/inference.py --write docs/inference.md`, which says "
            "what is compared and how.",
            "",
            tabulate(body, head, tablefmt="github", disable_numparse=True),
            "",
            f"{rounds} rounds of {runs} images, batch size 1, one thread of {cpu['name']} "
            f"({', '.join(cpu['vnni']) or 'no VNNI'}); "
            f"{', '.join(f'{k} {v}' for k, v in versions.items())}. Other work ran beside it: load "
            f"average {load:.1f} per core.",
            "",
        ]
    )
    click.echo(text)
    if write is not None:
        write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
