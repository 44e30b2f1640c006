"""The two exporters of torch: time, and whether their QONNX graphs hold the same weight codes.

    python benchmarks/exporters.py resnet8 resnet20 mobilenetv2 efficientnet_b0 swin_tiny

`capture` (TorchScript, deprecated) is what exports are made of; dynamo would replace it. Fresh
networks of width 0.25 for 32x32 images, one thread, processor time of one export each after a
first one of ResNet-8, which loads what each needs. A network that dynamo refuses has the innermost
error in its row.
"""

from __future__ import annotations

import os

# Before anything computes: one thread, asleep when idle.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx
import torch
from brevitas.export import export_qonnx
from tabulate import tabulate
from torch import nn

from resq_deploy.export.graph import capture, constants, integers, quiet
from resq_deploy.nets import NETS, build
from resq_deploy.nets.quantized import calibrate, codes, encoding_of, quantize, weight_layers

OPSET, SHAPE = 19, (3, 32, 32)


def network(name: str) -> nn.Module:
    """Calibrated with its batch norms knowing the images, so that no activation fades away."""
    x = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    net = build(name, n_classes=10, in_channels=3, width=0.25, seed=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain averages
    with torch.no_grad():
        net.train()(x)
    net = quantize(net.eval())
    calibrate(net, x)
    return net.eval()


def dynamo(net: nn.Module) -> onnx.ModelProto:
    """The graph of the other exporter, batch dimension dynamic."""
    # Two images: a size of 1 would become a constant.
    example, axes = torch.zeros(2, *SHAPE), ({0: torch.export.Dim.DYNAMIC},)
    with TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "model.onnx"
        export_qonnx(
            net, args=(example,), export_path=str(file), dynamo=True, opset_version=OPSET,
            keep_initializers_as_inputs=False, dynamic_shapes=axes, verbose=False,
        )  # fmt: skip
        return onnx.load(file)


def equal_codes(graph: onnx.GraphProto, net: nn.Module) -> int:
    """How many layers have a Quant node whose codes are theirs."""
    stored = constants(graph)
    quants = [n for n in graph.node if n.op_type == "Quant" and n.input[0] in stored]
    found = [integers(node, stored, encoding_of(net)).codes for node in quants]
    expected = [codes(layer).numpy() for layer in weight_layers(net).values()]
    return sum(any(np.array_equal(f, e) for f in found) for e in expected)


def row(name: str) -> list[object]:
    net = network(name)
    start = time.process_time()
    capture(net, SHAPE, opset=OPSET)
    ours = time.process_time() - start
    start = time.process_time()
    try:
        graph = dynamo(net).graph
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        return [name, ours, None, None, f"{type(error).__name__}: {error}"]
    theirs = time.process_time() - start
    same = f"{equal_codes(graph, net)} of {len(weight_layers(net))}"
    return [name, ours, theirs, theirs / ours, same]


@click.command(help=__doc__)
@click.argument("names", nargs=-1, required=True, type=click.Choice(sorted(NETS)))
def main(names: tuple[str, ...]) -> None:
    row("resnet8")
    header = ["network", "capture, s", "dynamo, s", "ratio", "layers with equal codes"]
    rows = []
    for name in names:
        rows.append(row(name))
        click.echo(rows[-1], err=True)
    print(tabulate(rows, header, tablefmt="pipe", floatfmt=".1f"))


if __name__ == "__main__":
    main()
