"""How far onnxruntime and PyTorch are apart on one network, by profile of its int8 form.

    python benchmarks/parity.py models/NAME.toml runs/NAME/float/checkpoint.safetensors
    python benchmarks/parity.py models/NAME.toml runs/NAME/baseline/checkpoint.safetensors

A float network is calibrated in each profile, an int8 one converted to it. It is then exported and
run by onnxruntime as the file is written (off) and with integer kernels (all).
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from tabulate import tabulate

from resq_deploy import data, evaluate, recipe, runtime
from resq_deploy.data import calibration
from resq_deploy.data.base import as_float
from resq_deploy.export import checks, output_step
from resq_deploy.export.qdq import qdq
from resq_deploy.nets import checkpoint
from resq_deploy.nets.quantized import calibrate, quantize


@click.command()
@click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("source", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--images", default=500, help="Test images, the first.")
@click.option("--profile", "profiles", multiple=True, default=("float-channel", "po2-channel"))
def main(path: Path, source: Path, images: int, profiles: tuple[str, ...]) -> None:
    """Print one row per profile and optimization level."""
    loaded = recipe.load(path)
    splits = data.of(loaded.data)
    test = splits.test.first(images)
    shown = torch.from_numpy(as_float(calibration.load(loaded.data, splits).x))
    rows = []
    for profile in profiles:
        net, facts = checkpoint.load(source)
        if facts["quantized"]:
            net, _ = checkpoint.load(source, profile=profile)
        else:
            net = quantize(net, profile=profile)
            calibrate(net, shown)
        ours = evaluate.logits(net, test.x)
        right = evaluate.count(ours, test.y).n_correct
        model = qdq(net, test.x.shape[1:], opset=loaded.export.opset, ir_version=10)
        for level in runtime.LEVELS:
            session = runtime.session(model.SerializeToString(), level=level)
            theirs = runtime.run(session, runtime.adapt(test.x, session))
            found = checks.parity(("torch", level), ours.numpy(), theirs, step=output_step(net))
            within = f"{found.within_one_step} of {images}"
            rows.append([profile, level, right, within, found.max_steps, found.holds])
    headers = ["profile", "optimizations", "correct", "within one step", "most steps", "holds"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
