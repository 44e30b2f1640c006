"""What a training step of each method costs, relative to plain quantization-aware training.

    python benchmarks/training_cost.py --rounds 100 --write docs

ResNet-8 on batches of random 3x32x32 images (the time of a step does not depend on what they
show), one thread. The methods take turns, in another order every round, `--steps` steps each;
processor time counts, so that other programs on the machine disturb it little. The cost is the
ratio of mean times, with a bootstrap interval over rounds. Two rows quantize activations as
Brevitas does, not in one pass (resq_deploy/nets/fused.py): what that saves.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from brevitas.core.quant import IntQuant
from scipy import stats
from tabulate import tabulate

from resq_deploy import artifacts, recipe, runtime
from resq_deploy.nets import build
from resq_deploy.nets.fused import FusedIntQuant
from resq_deploy.nets.quantized import calibrate, quantize
from resq_deploy.train.attacks import ATTACKS
from resq_deploy.train.faults import FAULTS
from resq_deploy.train.loop import optimizer, precision, update
from resq_deploy.train.objectives import CrossEntropy

ATTACK = {"epochs": 1, "lr": 0.01, "epsilon": 1 / 255}
FAULT = {"epochs": 1, "lr": 0.01, "start_loss": 1e9}
PLAIN, KEEPS = "plain", "randbet, keep_attack"
UNFUSED = " (activations quantized by Brevitas)"


def objectives() -> dict[str, CrossEntropy]:
    """Every method by name, with its defaults and one PGD step; faults from the first step on."""
    attacks = {name: make(recipe.Attack(**ATTACK, method=name)) for name, make in ATTACKS.items()}
    faults = {
        name: make(recipe.Fault(**FAULT, method=name), CrossEntropy(), seed=0)
        for name, make in FAULTS.items()
    }
    stage_1 = ATTACKS["feature-consistency"](recipe.Attack(**ATTACK))
    both = FAULTS["randbet"](recipe.Fault(**FAULT), stage_1, seed=0)
    return {PLAIN: CrossEntropy(), **attacks, **faults, KEEPS: both}


class Bench:
    """A network under one method."""

    def __init__(
        self, objective: CrossEntropy, encoding: str = "plain", *, fused: bool = True
    ) -> None:
        self.objective = objective
        float_net = build("resnet8", n_classes=10, in_channels=3, seed=0)
        self.net = quantize(float_net, encoding=encoding)
        for module in self.net.modules() if not fused else ():
            if isinstance(module, FusedIntQuant):
                module.__class__ = IntQuant
        self.x = torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        calibrate(self.net, self.x)
        self.net.to(memory_format=torch.channels_last).train()
        self.config = recipe.Training(epochs=1, lr=0.01)
        self.sgd = optimizer(self.net, self.config)
        self.generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(128) % 10

    def seconds(self, steps: int) -> float:
        """Mean processor time of a step."""
        start = time.process_time()
        for _ in range(steps):
            update(self.net, self.sgd, self.objective, self.x, self.y, self.generator, self.config)
        return (time.process_time() - start) / steps


def measured(rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of every method, one value per round."""
    benches = {name: Bench(objective) for name, objective in objectives().items()}
    benches |= {name + UNFUSED: Bench(objectives()[name], fused=False) for name in (PLAIN, KEEPS)}
    for bench in benches.values():
        bench.seconds(2)  # the first steps allocate
    seconds: dict[str, list[float]] = {name: [] for name in benches}
    order = np.random.default_rng(0)
    with click.progressbar(range(rounds), label="rounds") as bar:
        for _ in bar:
            for name in order.permutation(list(benches)):
                seconds[name].append(benches[name].seconds(steps))
    return seconds


def ratio(of: list[float], plain: list[float]) -> str:
    """Ratio of mean times with a 95 % bootstrap interval, rounds resampled in pairs."""
    found = stats.bootstrap(
        (np.array(of), np.array(plain)),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True, vectorized=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return f"{np.mean(of) / np.mean(plain):.2f} [{found.low:.2f}, {found.high:.2f}]"


@click.command()
@click.option("--rounds", default=50, show_default=True, help="Rounds.")
@click.option("--steps", default=4, show_default=True, help="Steps per method and round.")
@click.option("--note", default="", help="What else is to be known of the machine.")
@click.option("--write", type=click.Path(path_type=Path), help="Folder of the page.")
def main(rounds: int, steps: int, note: str, write: Path | None) -> None:
    """Measure; print the table; write training-cost.md."""
    torch.set_num_threads(1)
    seconds = measured(rounds, steps)
    rows = [
        [name, f"{1000 * np.mean(found):.0f}", ratio(found, seconds[PLAIN])]
        for name, found in seconds.items()
    ]
    versions = artifacts.versions()
    lines = [
        "# Cost of training",
        "",
        "Written by `python benchmarks/training_cost.py`, which says how it measures; options: "
        f"`--rounds {rounds} --steps {steps}`.",
        "",
        "ResNet-8 for 3x32x32 images, batch 128, int8, one PGD step, one thread, "
        f"{precision('cpu')}; processor time; {rounds} rounds of {steps} steps, 95 % bootstrap "
        f"intervals over rounds. torch {versions['torch']}, Brevitas {versions['brevitas']}, "
        f"{runtime.cpu_features()['name']}. {note}".rstrip(),
        "",
        tabulate(
            rows, ["method", "ms per step", "relative to plain"],
            tablefmt="github", disable_numparse=True,
        ),
        "",
        "Methods of stage 2 stand here without `keep_attack`, but for rows that say so; they keep "
        f"`feature-consistency`. Where Brevitas quantizes activations itself, a step takes "
        f"{ratio(seconds[PLAIN + UNFUSED], seconds[PLAIN])} times as long, with `keep_attack` "
        f"{ratio(seconds[KEEPS + UNFUSED], seconds[KEEPS])} times.",
        "",
    ]  # fmt: skip
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        artifacts.write(write / "training-cost.md", lambda p: p.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
