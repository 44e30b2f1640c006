"""What an exhaustive campaign says: its map, and whether sampled campaigns would have covered it.

    resq-deploy train models/cifar10-resnet8.toml --stage baseline --out work/baseline
    resq-deploy export work/baseline/checkpoint.safetensors --out work/export
    resq-deploy inject work/export/model.qdq.onnx --data cifar10 --images 500 --exhaustive \\
        --workers 2 --out all.store
    resq-deploy inject mlperf_tiny_resnet8_int8.onnx --data mlperf.npz --margin 0.01 \\
        --workers 2 --out mlperf.store
    python benchmarks/exhaustive.py all.store --other mlperf.store --write docs

mlperf.npz: the first 1,000 CIFAR-10 test images as that file takes them, `x` = pixel - 128 as
int8, N x 32 x 32 x 3, and `y`; without --other its section is left out.

Writes exhaustive.md, exhaustive.json (counts per layer and bit) and exhaustive.svg. Every bit's
outcome is known, so a statistical campaign of any seed can be looked up instead of run: the sites
are drawn by the fault model itself, the intervals are those of `inject`, and a campaign counts as
covering when its interval holds the exhaustive rate.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
from tabulate import tabulate

from resq_deploy import metrics, store
from resq_deploy.inject import faults, results
from resq_deploy.inject.space import Space
from resq_deploy.report import figures

CAMPAIGNS = 1000
MARGINS = (0.05, 0.02, 0.01)


def known(path: Path) -> tuple[store.Header, Any, float]:
    """Header, outcomes (bits,) as True where an answer of any image changed, and seconds."""
    header, trials, seconds = store.read([path])
    if header.plan["kind"] != "exhaustive" or len(trials) != Space.from_json(header.space).n_bits:
        raise SystemExit(f"{path} is not a finished exhaustive campaign ({len(trials)} trials)")
    return header, np.array([t.n_sdc > 0 for t in trials]), seconds


def coverage(outcomes: Any, space: Space, confidence: float) -> list[list[Any]]:
    """For each margin: how many of CAMPAIGNS intervals hold the exhaustive rate."""
    truth, single = outcomes.mean(), faults.parse("single")
    rows = []
    for margin in MARGINS:
        n = metrics.sample_size(space.n_bits, margin, confidence)
        hits, widths = 0, []
        for seed in range(CAMPAIGNS):
            cells = [int(single.sample(space, seed=seed, draw=i)[0]) for i in range(n)]
            ci = metrics.wilson(int(outcomes[cells].sum()), n, confidence)
            hits += ci.low <= truth <= ci.high
            widths.append((ci.high - ci.low) / 2)
        ci = metrics.wilson(hits, CAMPAIGNS, 0.95)
        rows.append(
            [
                margin, n, f"{100 * np.mean(widths):.2f}", f"{hits} / {CAMPAIGNS}",
                f"{100 * ci.value:.1f} % [{100 * ci.low:.1f}, {100 * ci.high:.1f}]",
            ]
        )  # fmt: skip
    return rows


def layers(outcomes: Any, space: Space) -> tuple[Any, Any]:
    """Bits with SDC, and all bits, by (tensor, bit)."""
    hit = np.zeros((len(space.tensors), 8), np.int64)
    total = np.zeros_like(hit)
    for i, tensor in enumerate(space.tensors):
        part = outcomes[space.starts[i] : space.starts[i + 1]].reshape(-1, tensor.width)
        hit[i], total[i] = part.sum(0), len(part)
    return hit, total


def sampled(path: Path, confidence: float) -> list[str]:
    """What a statistical campaign on a file that is not ours says."""
    found = results([path], confidence=confidence)
    rate, accuracy, golden = found["sdc_rate"], found["fault_accuracy"], found["golden"]
    rows = [
        [row["tensor"], row["n_trials"], *row["outcomes"].values(),
         f"{100 * row['sdc_rate']['value']:.1f} % [{100 * row['sdc_rate']['low']:.1f}, "
         f"{100 * row['sdc_rate']['high']:.1f}]"]
        for row in found["per_layer"]
    ]  # fmt: skip
    return [
        "## A file that is not ours",
        "",
        f"A statistical campaign on MLPerf Tiny's int8 ResNet-8 (SHA-256 "
        f"{found['model_sha256'][:12]}), {found['n_images']} CIFAR-10 test images, seed "
        f"{found['seed']}: {found['n_trials']} of {found['n_bits']} single-bit faults, "
        f"{found['n_trials'] / found['seconds']:.0f} faults a second. Golden accuracy "
        f"{golden['n_correct']} of {golden['n_total']}; SDC rate {100 * rate['value']:.2f} % "
        f"[{100 * rate['low']:.2f}, {100 * rate['high']:.2f}] (Wilson, {100 * confidence:g} %); "
        f"mean accuracy under a fault {100 * accuracy['mean']:.2f} % "
        f"[{100 * accuracy['low']:.2f}, {100 * accuracy['high']:.2f}], worst "
        f"{100 * accuracy['worst']:.1f} %.",
        "",
        tabulate(rows, ["weight", "faults", *found["outcomes"], "SDC"], tablefmt="github",
                 disable_numparse=True),
        "",
    ]  # fmt: skip


@click.command()
@click.argument("campaign", type=click.Path(path_type=Path))
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--other", type=click.Path(path_type=Path), help="Store of a sampled campaign.")
@click.option("--processor-minutes", type=float, help="As `time` said, where more was running.")
@click.option("--write", type=click.Path(path_type=Path), help="Folder of the page.")
def main(
    campaign: Path, confidence: float, other: Path | None, processor_minutes: float | None,
    write: Path | None,
) -> None:  # fmt: skip
    """Map and coverage of a finished exhaustive CAMPAIGN."""
    header, outcomes, seconds = known(campaign)
    space = Space.from_json(header.space)
    hit, total = layers(outcomes, space)
    names = [tensor.name for tensor in space.tensors]
    rate = outcomes.mean()
    head = ["weight", "bits", "SDC", *(f"bit {b}" for b in range(8))]
    table = [
        [name, int(total[i].sum()), f"{100 * hit[i].sum() / total[i].sum():.2f} %",
         *(f"{100 * hit[i, b] / total[i, b]:.2f} %" for b in range(8))]
        for i, name in enumerate(names)
    ]  # fmt: skip
    shared = ""
    if processor_minutes is not None:
        shared = (
            f" (other work ran beside it: the campaign took {processor_minutes:.0f} minutes of "
            f"processor time, {processor_minutes / 2:.0f} for each of its two processes)"
        )
    versions = ", ".join(f"{k} {v}" for k, v in header.versions.items())
    lines = [
        "# Every bit of a ResNet-8",
        "",
        "Written by `python benchmarks/exhaustive.py` (the commands stand there).",
        "",
        f"An exhaustive single-bit campaign over all {space.n_bits} stored weight bits of the "
        f"exported int8 baseline of models/cifar10-resnet8.toml, {header.n_images} CIFAR-10 test "
        f"images each, {header.engine} engine: {seconds / 60:.0f} minutes on "
        f"{os.cpu_count()} cores of {header.cpu['name']}, {space.n_bits / seconds:.0f} faults a "
        f"second{shared}; {versions}. Without faults {header.golden.n_correct} of "
        f"{header.golden.n_total} images are right. A flip counts as SDC when it changes the "
        f"top-1 of at least one image: {100 * rate:.3f} % of all flips do (all bits were tried: "
        "the rate has no sampling error for these images).",
        "",
        "![SDC by layer and bit](exhaustive.svg)",
        "",
        tabulate(table, head, tablefmt="github", disable_numparse=True),
        "",
        "## Do sampled campaigns cover this?",
        "",
        f"{CAMPAIGNS} campaigns of `inject --margin E` with the seeds 0 to {CAMPAIGNS - 1}, looked "
        f"up in the table above; {100 * confidence:g} % Wilson intervals, which should hold the "
        f"exhaustive rate in at least about {100 * confidence:g} % of the campaigns.",
        "",
        tabulate(
            coverage(outcomes, space, confidence),
            ["margin", "faults", "mean half width, points", "covered", "coverage [95 %]"],
            tablefmt="github",
            disable_numparse=True,
        ),
        "",
    ]
    if other is not None:
        lines += sampled(other, confidence)
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        (write / "exhaustive.md").write_text(text, encoding="utf-8")
        counts = {
            "model_sha256": header.model_sha256, "data_sha256": header.data_sha256,
            "n_images": header.n_images, "tensors": names, "n_sdc": hit.tolist(),
            "n_bits": total.tolist(), "seconds": seconds,
        }  # fmt: skip
        (write / "exhaustive.json").write_text(json.dumps(counts, indent=1) + "\n")
        panel = figures.Panel(title="SDC", sdc=hit, total=total)
        svg = figures.sdc_maps([panel], names, "exhaustive")
        # inside a page it needs no names of its own, as a file it does
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = svg.replace("<svg ", f"<svg {spaces} ", 1)
        (write / "exhaustive.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
