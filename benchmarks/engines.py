"""How fast is the fast engine: against reload, against its bound, against PyTorch; and why.

    python benchmarks/engines.py --root DIR                  # everything, every network
    python benchmarks/engines.py --root DIR --net resnet8 --images 200 --trials 20
    python benchmarks/engines.py --root DIR --write docs/engine.md

Prints tables; with --write they go into a page. Both engines see the same faults and images, in one
process with one thread, taking turns: single flips drawn layer by layer, as many others untimed
before them (the fast engine learns which of its ways is the faster), and averages in which a layer
weighs as much as its share of the bits. Intervals: bootstrap within layers. Times are processor
time of that thread (where the machine does other things too, waiting for it does not count, a
shared cache does). Networks with models/cifar10-NET.float.safetensors have those weights
("trained"), the others fresh ones with batch statistics of CIFAR-10 ("fresh"); all are quantized by
calibration alone. PyTorchFI is compared with where it is installed (`pip install --no-deps
pytorchfi==0.6.0`).

    resq-deploy train models/cifar10-resnet18-brief.toml --stage float --out DIR
    python benchmarks/engines.py --weights resnet18=DIR/checkpoint.safetensors ...

measures a network with other weights, beside the fresh ones ("given").
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from pages import put
from tabulate import tabulate

from resq_deploy import data, metrics, runtime
from resq_deploy.data import Dataset
from resq_deploy.export.qdq import qdq
from resq_deploy.inject import discovery, faults, kernels
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.memory import Change, Memory
from resq_deploy.inject.network import Network
from resq_deploy.inject.reload import Reload
from resq_deploy.nets import build, checkpoint
from resq_deploy.nets.quantized import calibrate, quantize

ROOT = Path(__file__).parent.parent
NETS = (
    "resnet8", "resnet20", "resnet18", "vgg16", "mobilenetv2", "efficientnet_b0", "swin_tiny",
)  # fmt: skip
WANTED = {"resnet18": 20, "resnet20": 8, "resnet8": 8, "vgg16": 10, "efficientnet_b0": 4,
          "swin_tiny": 4}  # fmt: skip
GOLDEN_BYTES = 6 * 2**30
"""Most that kept values and sums of a network may take."""
KINDS = {
    "faulty_weights": "faulty layer", "faulty_channel": "faulty layer",
    "changed_inputs": "layers behind, changed sums",
    "elementwise_lists": "additions", "elementwise_rows": "additions",
    "differing": "comparison", "materialize": "gathering", "changed_channels": "pooling",
    "list_channels": "pooling",
}  # fmt: skip


@dataclass
class Subject:
    """A network in every form that is measured."""

    name: str
    weights: str
    """Where they come from: "trained", "given" or "fresh"."""
    net: torch.nn.Module
    int8: torch.nn.Module
    model: bytes

    @property
    def label(self) -> str:
        return self.name + ", given" * (self.weights == "given")


def subject(name: str, images: Dataset, given: Path | None = None) -> Subject:
    """Build, quantize by calibration, export; `given` are other weights than the network's own."""
    weights = given or ROOT / "models" / f"cifar10-{name}.float.safetensors"
    origin = "given" if given else "trained" if weights.is_file() else "fresh"
    net = build(name, n_classes=10, in_channels=3)
    x = torch.from_numpy(images.x[:512] / np.float32(255))
    if origin != "fresh":
        checkpoint.load_state(net, checkpoint.read_tensors(weights), str(weights))
    else:
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the average of all batches: fresh weights move far
        with torch.no_grad():
            for start in range(0, len(x), 64):
                net.train()(x[start : start + 64])
    int8 = quantize(net.eval())
    calibrate(int8, x[:256])
    model = qdq(int8.eval(), (3, 32, 32), opset=19, ir_version=10)
    return Subject(name, origin, net, int8, model.SerializeToString())


class Counted(Fast):
    """The fast engine, counting the multiplications that its faults reach."""

    reached = 0

    def _unit(self, index: int, inputs: Any, faulty: Change) -> Any:
        layer = self._network.layers.get(index)
        if layer is not None and inputs:
            self.reached += layer.macs * sum(len(c.images) for c in inputs.values())
        return super()._unit(index, inputs, faulty)


@dataclass
class Bench:
    """One file, its images, and both engines ready."""

    subject: Subject
    images: Dataset
    n_trials: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        found = discovery.discover(runtime.parse_model(self.subject.model))
        self.found, self.memory = found, Memory.of(found)
        start = time.thread_time()
        self.network = Network(found, self.images.x)
        # where golden data of all images do not fit, `inject` goes chunk by chunk; here the first
        # chunk is measured, with either engine
        fitting = GOLDEN_BYTES // self.network.bytes_per_image() // 50 * 50
        self.images = self.images.first(min(len(self.images), fitting))
        self.prepare = time.thread_time() - start
        start = time.thread_time()
        self.kept = self.network.keep(self.images.x)
        self.keep = time.thread_time() - start
        self.fast = Fast(self.network, self.kept, self.images.x)
        self.reload = Reload(found.model, found.space, self.images.x)
        rng, sp = np.random.default_rng(0), self.memory.space
        self.layer: Any = []
        cells, others = [], []
        for layer, tensor in enumerate(sp.tensors):
            share = tensor.n_bits / sp.n_bits
            n = max(2, round(self.n_trials * (share + 1 / len(sp.tensors)) / 2))
            drawn = sp.starts[layer] + rng.choice(tensor.n_bits, 2 * n, replace=False)
            cells += list(drawn[:n])
            others += list(drawn[n:])
            self.layer += [layer] * n
        order = rng.permutation(len(cells))
        self.layer = np.array(self.layer)[order]
        self.weights = np.array([t.n_bits for t in sp.tensors])[self.layer] / sp.n_bits
        self.weights /= np.bincount(self.layer)[self.layer]
        flats = [np.array([cells[i]]) for i in order]
        self.changes = [self.memory.read(flat) for flat in flats]
        self.others = [self.memory.read(np.array([others[i]])) for i in order]
        self.flips = [sp.sites(flat)[0] for flat in flats]

    def timed(self, what: str, run: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = run()
        self.seconds[what].append(time.thread_time() - start)
        return result

    def plain(self) -> None:
        session = runtime.session(self.subject.model)
        x = runtime.adapt(self.images.x, session)
        runtime.run(session, x)
        for _ in range(3):
            self.timed("plain", lambda: runtime.run(session, x))

    def compare(self, reloads: int) -> None:
        """Every fault by fast, `reloads` of them, evenly spread, by reload: they must agree."""
        for change in self.others:
            self.fast.changed(change)
        every = max(1, len(self.changes) // reloads)
        self.masked = 0.0
        for i, change in enumerate(self.changes):
            images, output = self.timed("fast", lambda change=change: self.fast.changed(change))
            whole = self.kept.output.copy()
            whole[images] = output
            self.masked += self.weights[i] * (whole.tobytes() == self.kept.output.tobytes())
            if i % every == 0:
                expected = self.timed("reload", lambda change=change: self.reload.run(change))
                if expected.tobytes() != whole.tobytes():
                    raise SystemExit(f"{self.subject.name}: fault {self.flips[i]} differs")
                self.seconds["fast, same faults"].append(self.seconds["fast"][-1])

    @property
    def clean(self) -> float:
        """Accuracy without faults on the images, in percent."""
        return 100 * float((metrics.top1(self.kept.output) == self.images.y).mean())

    @property
    def each(self) -> float:
        """Seconds of the fast engine for a fault, on average over all bits."""
        return float(self.weights @ np.array(self.seconds["fast"]))

    def reached(self) -> float:
        """Multiplications behind a fault on images that it changes, on average over all bits."""
        counted = Counted(self.network, self.kept, self.images.x)
        ends, self.network.ends = self.network.ends, {}
        found = []
        for change in self.changes:
            counted.reached = 0
            counted.changed(change)
            found.append(counted.reached)
        self.network.ends = ends
        return float(self.weights @ np.array(found))

    def resampled(self, rng: np.random.Generator) -> float:
        """`each` of faults drawn again from those of every layer."""
        seconds, total = np.array(self.seconds["fast"]), 0.0
        for layer in np.unique(self.layer):
            mine = np.flatnonzero(self.layer == layer)
            total += self.weights[mine].sum() * rng.choice(seconds[mine], mine.size).mean()
        return total

    def row(self) -> list[Any]:
        n, layers = len(self.images), self.network.layers.values()
        macs = sum(layer.macs for layer in layers)
        plain = float(np.median(self.seconds["plain"]))
        rate = macs * n / plain
        bound = self.reached() / rate
        reload_ = np.array(self.seconds["reload"])
        ratio = reload_.mean() / self.each
        resamples = np.random.default_rng(0)
        low, high = np.quantile(
            [
                resamples.choice(reload_, reload_.size).mean() / self.resampled(resamples)
                for _ in range(2000)
            ],
            [0.025, 0.975],
        )
        name = self.subject.name
        return [
            name, self.subject.weights, f"{self.clean:.1f}", f"{macs / 1e6:.1f}", n,
            f"{len(self.changes)} / {reload_.size}", f"{100 * self.masked:.0f} %",
            f"{1e3 * plain:.0f}", f"{1e3 * reload_.mean():.1f}", f"{1e3 * self.each:.2f}",
            f"{ratio:.1f} [{low:.1f}, {high:.1f}]", WANTED.get(name, ""),
            f"{1e3 * bound:.2f}", f"{self.each / bound:.2f}" if bound else "",
        ]  # fmt: skip


NOTES = """\
*Bound* is the time that the arithmetic behind a fault would take if it were done densely: the
multiplications of every layer whose input changed, on the images where it changed, at the rate
that onnxruntime reaches on the whole network in the same run. The struck layer is not in it. Below
1, *fast / bound* says that fewer multiplications were needed: sums are updated where few codes
changed. *Masked* is the share of faults that change no output of any image.

What limits the ratio is what early layers cost. They hold few of the bits, but a flip there changes
nearly every image and, after two or three layers, most codes of it: from there on nothing can be
saved, and the rest of the network runs in one, which is most of the time that is left ("the rest in
one" below). In wide networks most of the weights sit late. Trained weights mask far more than
fresh ones, as the two rows of ResNet-18 show (2 epochs; a fault then changes fewer images, and
fewer codes of them): the rows of fresh networks are what the engine does at worst.

What helped, in the order in which it was tried: lists of changed codes instead of whole rows,
vector code for additions, int8 weights in the kernels, pooling channel by channel, skipping
positions that nothing reaches. Running the rest in one where going on unit by unit took longer in
earlier trials: 13 and 12 % less time on ResNet-8 and ResNet-20 (200 faults over all bits, 1,000
images), 40 and 55 % less on MobileNetV2 and EfficientNet-B0 (80 and 60 faults spread evenly over
the layers, 200 and 100 images), nothing on ResNet-18. Copies of the struck layer that lie channel
by channel: 23 % less on ResNet-8, 5 % on ResNet-20. What did not help: pairs of products by VNNI
(the loop waits for memory), other limits between updating a layer and running it densely (half or
twice the chosen ones: the same time within 5 %).

A trial with many flips builds a session, and of that time three quarters went into planning which
buffers are used again, which grows with the square of the operators (815 in Swin-Tiny). Sessions
are built without that plan now; memory and time of a run stay what they were, because the arena
uses its buffers again anyway. Both engines gain by it.
"""

HEAD = (
    "network", "weights", "clean, %", "10^6 MAC / image", "images", "faults fast / reload",
    "masked", "plain run, ms", "reload, ms / fault", "fast, ms / fault", "ratio [95 %]",
    "wanted", "bound, ms", "fast / bound",
)  # fmt: skip


@contextlib.contextmanager
def profiled(network: Network) -> Iterator[Counter[str]]:
    """Seconds by what they are spent on, while the context lasts."""
    spent: Counter[str] = Counter()

    def timer(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.thread_time()
            result = inner(*args)
            spent[name] += time.thread_time() - start
            return result

        return run

    before = {name: getattr(kernels, name) for name in KINDS}
    run = network.runner.run
    one, rest = "layers behind, one by one (onnxruntime)", "the rest in one (onnxruntime)"
    timed = {name: timer(name, run) for name in (one, rest)}
    ends = {id(end) for end in network.ends.values()}

    def run_unit(session: Any, unit: Any, inputs: Any) -> Any:
        return timed[rest if id(unit) in ends else one](session, unit, inputs)

    try:
        for name, inner in before.items():
            setattr(kernels, name, timer(KINDS[name], inner))
        network.runner.run = run_unit  # type: ignore
        yield spent
    finally:
        for name, inner in before.items():
            setattr(kernels, name, inner)
        network.runner.run = run  # type: ignore


def profile(bench: Bench) -> list[list[Any]]:
    """Where the time of a fault goes."""
    average: Counter[str] = Counter()
    with profiled(bench.network) as spent:
        for change, weight in zip(bench.changes, bench.weights, strict=True):
            spent.clear()
            start = time.thread_time()
            bench.fast.changed(change)
            spent["Python and the rest"] = time.thread_time() - start - sum(spent.values())
            for what, seconds in spent.items():
                average[what] += weight * seconds  # type: ignore[assignment]
    total = sum(average.values())
    rows = [
        [bench.subject.label, what, f"{1e3 * seconds:.2f}", f"{100 * seconds / total:.0f} %"]
        for what, seconds in average.most_common()
    ]
    once = [("once: preparing and checking", bench.prepare), ("once: golden run", bench.keep)]
    return rows + [[bench.subject.label, what, f"{1e3 * s:.0f}", ""] for what, s in once]


def depth(bench: Bench) -> list[list[Any]]:
    """Cost by the layer that is struck."""
    by_layer: dict[str, list[float]] = defaultdict(list)
    for site, seconds in zip(bench.flips, bench.seconds["fast"], strict=True):
        by_layer[site.tensor].append(seconds)
    return [
        [bench.subject.label, t.name, t.size, len(s), f"{1e3 * np.mean(s):.2f}"]
        for t in bench.found.space.tensors
        if (s := by_layer.get(t.name))
    ]


def growth(whole: Bench, trials: int) -> list[list[Any]]:
    """Cost by the number of images and of faults; `whole` has measured all images."""
    rows, sub = [], whole.subject
    for part in (4, 2, 1):
        bench, n = whole, len(whole.images) // part
        if part > 1:
            bench = Bench(sub, whole.images.first(n), trials)
            bench.compare(1)
        each, once = bench.each, bench.prepare + bench.keep
        for faults_ in (100, 1000, 10000):
            seconds = once + faults_ * each
            rows.append([sub.name, n, f"{1e3 * each:.2f}", f"{once:.1f}", faults_,
                         f"{faults_ / seconds:.1f}"])  # fmt: skip
    return rows


def many(bench: Bench, images: Dataset, turns: int = 5) -> list[list[Any]]:
    """Bit error rates: the whole network runs; what counts is the overhead over a plain run.

    All `images`: such trials need no golden data.
    """
    rows = []
    ber = faults.parse("ber")
    session = runtime.session(bench.subject.model)
    x = runtime.adapt(images.x, session)
    whole = Fast(bench.network, bench.network.keep_nothing(runtime.run(session, x)), images.x)
    for rate in (1e-4, 1e-2):
        pairs = []
        for draw in range(turns):
            cells = ber.sample(bench.memory.space, seed=0, draw=draw, rate=rate)
            change = bench.memory.read(ber.flips(cells, bench.memory))
            times = [time.thread_time()]
            whole.changed(change)
            times.append(time.thread_time())
            runtime.run(session, x)
            times.append(time.thread_time())
            pairs.append(np.diff(times))
        faulty, plain = np.median(pairs, axis=0)
        overhead = np.array([pair[0] / pair[1] - 1 for pair in pairs])
        resamples = np.random.default_rng(0)
        medians = [np.median(resamples.choice(overhead, turns)) for _ in range(2000)]
        low, high = np.quantile(medians, [0.025, 0.975])
        rows.append([bench.subject.label, len(images), f"{rate:g}", len(cells),
                     f"{1e3 * plain:.0f}", f"{1e3 * faulty:.0f}",
                     f"{100 * np.median(overhead):+.1f} % "
                     f"[{100 * low:+.1f}, {100 * high:+.1f}]"])  # fmt: skip
    return rows


def against_torch(bench: Bench, trials: int) -> list[list[Any]]:
    """The same faults in the Brevitas network and, on the float network, by PyTorchFI."""
    from resq_deploy.perturb.weights import bit_errors

    x = torch.from_numpy(bench.images.x / np.float32(255))
    sub, pairs = bench.subject, []
    convs = [n for n, m in sub.net.named_modules() if isinstance(m, torch.nn.Conv2d)]
    for site, change in zip(bench.flips, bench.changes, strict=True):
        name = site.tensor.removesuffix(".weight")
        if name in convs and site.tensor in change and len(pairs) < trials:
            pairs.append((name, site, change))
    if not pairs:  # no convolution was struck: PyTorchFI knows only those
        return []
    weights = dict(sub.net.named_parameters())
    seconds: dict[str, list[float]] = defaultdict(list)
    torch.set_num_threads(1)
    try:
        from pytorchfi.core import fault_injection

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pfi = fault_injection(sub.net.eval(), len(x), input_shape=[3, 32, 32])
    except ImportError:
        pfi = None

    def forward(net: Any) -> None:
        with torch.no_grad():
            for start in range(0, len(x), 100):
                net(x[start : start + 100])

    for name, site, change in pairs:
        start = time.thread_time()
        bench.fast.changed(change)
        seconds["fast"].append(time.thread_time() - start)
        shape = tuple(weights[f"{name}.weight"].shape)
        mask = np.zeros(int(np.prod(shape)), np.uint8)
        mask[site.offset] = 1 << site.bit
        start = time.thread_time()
        masks = {name: torch.from_numpy(mask.view(np.int8)).reshape(shape)}
        with bit_errors(sub.int8, masks):
            forward(sub.int8.eval())
        seconds["Brevitas"].append(time.thread_time() - start)
        if pfi is not None:
            k, c, h, w = (int(i) for i in np.unravel_index(site.offset, shape))
            start = time.thread_time()
            faulty = pfi.declare_weight_fi(
                layer_num=[convs.index(name)], k=[k], dim1=[c], dim2=[h], dim3=[w],
                value=[float(weights[f"{name}.weight"][k, c, h, w]) * 2],
            )  # fmt: skip
            forward(faulty)
            seconds["PyTorchFI, float"].append(time.thread_time() - start)
    mine = np.mean(seconds["fast"])
    return [
        [sub.name, what, len(s), f"{1e3 * np.mean(s):.1f}", f"{np.mean(s) / mine:.0f}"]
        for what, s in seconds.items()
    ]


def peak_memory(sub: Subject, root: Path | None, budget: str) -> list[list[Any]]:
    """Peak of a campaign on 10,000 images in a process of its own, and of one on 50."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        model.write_bytes(sub.model)
        for n in (50, 10_000):
            code = (
                "import sys; from resq_deploy.cli import main; main(sys.argv[1:], "
                "standalone_mode=False); lines = open('/proc/self/status').read().splitlines(); "
                "print(next(line for line in lines if line.startswith('VmHWM')).split()[1])"
            )
            options = ["inject", str(model), "--data", "cifar10", "--images", str(n)]
            options += ["--root", str(root)] if root else []
            options += ["--trials", "20", "--memory", budget, "--out", f"{folder}/{n}.store"]
            done = subprocess.run(
                [sys.executable, "-c", code, *options], capture_output=True, text=True, check=True
            )
            rows.append([sub.name, n, budget, int(done.stdout.split()[-1]) // 1024])
    return rows


def page(tables: dict[str, tuple[tuple[str, ...], list[list[Any]]]], options: str) -> str:
    """All tables as Markdown; `options` are those that they were made with."""
    cpu, versions = runtime.cpu_features(), runtime.versions()
    where = ", ".join(f"{k} {v}" for k, v in versions.items())
    lines = [
        f"Written by `python benchmarks/engines.py {options} --write docs/engine.md`. "
        f"One thread of {cpu['name']} ({', '.join(cpu['vnni']) or 'no VNNI'}; {os.cpu_count()} "
        f"cores); {where}.",
        "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "",
        NOTES,
    ]
    for title, (head, rows) in tables.items():
        lines += ["", f"## {title}", "", tabulate(rows, head, tablefmt="github",
                                                   disable_numparse=True)]  # fmt: skip
    return "\n".join(lines)


@click.command()
@click.option("--root", type=click.Path(path_type=Path), help="Folder of CIFAR-10. [$RESQ_DATA]")
@click.option("--net", "nets", multiple=True, type=click.Choice(NETS), help="Only these. [all]")
@click.option("--weights", multiple=True, metavar="NET=FILE", help="Also with this checkpoint.")
@click.option("--images", default=1000, show_default=True)
@click.option("--trials", default=200, show_default=True, help="Faults by the fast engine.")
@click.option("--reloads", default=10, show_default=True, help="Of them also by reload.")
@click.option("--torch-trials", default=5, show_default=True, help="Of them also by PyTorch.")
@click.option("--budget", default="1GiB", show_default=True, help="--memory of the memory test.")
@click.option("--write", type=click.Path(path_type=Path), help="Also write this page.")
def main(
    root: Path | None, nets: tuple[str, ...], weights: tuple[str, ...], images: int, trials: int,
    reloads: int, torch_trials: int, budget: str, write: Path | None,
) -> None:  # fmt: skip
    """Measure; see the top of this file."""
    splits = data.load("cifar10", root)
    test = splits.test.first(images)
    tables: dict[str, tuple[tuple[str, ...], list[list[Any]]]] = {
        "Single flips: fast against reload": (HEAD, []),
        "Where the time of a fault goes": (("network", "part", "ms / fault", "share"), []),
        "By depth": (("network", "struck weight", "weights", "faults", "ms / fault"), []),
        "By images and faults": (
            ("network", "images", "ms / fault", "once, s", "faults", "faults / s"), [],
        ),
        "Many flips at once": (
            (
                "network", "images", "bit error rate", "flips", "plain run, ms", "faulty run, ms",
                "overhead [95 %]",
            ),
            [],
        ),
        "Against fault simulation in PyTorch": (
            ("network", "with", "faults", "ms / fault", "times fast"), [],
        ),
        "Peak memory": (("network", "images", "--memory", "peak, MiB"), []),
    }  # fmt: skip
    add = {title: rows.extend for title, (_, rows) in tables.items()}
    options = (
        f"--images {images} --trials {trials} --reloads {reloads} --torch-trials {torch_trials}"
    )
    options += "".join(f" --weights {entry.split('=')[0]}=FILE" for entry in weights)
    given = [(name, Path(path)) for name, path in (entry.split("=", 1) for entry in weights)]
    for name, path in [*((name, None) for name in nets or NETS), *given]:
        sub = subject(name, splits.train or splits.test, path)
        bench = Bench(sub, test, trials)
        bench.plain()
        bench.compare(reloads)
        add["Single flips: fast against reload"]([bench.row()])
        add["Where the time of a fault goes"](profile(bench))
        add["By depth"](depth(bench))
        add["Many flips at once"](many(bench, test))
        if torch_trials and path is None:
            add["Against fault simulation in PyTorch"](against_torch(bench, torch_trials))
        if name in ("resnet8", "resnet18") and path is None:
            add["By images and faults"](growth(bench, max(20, trials // 4)))
        if name == "resnet8":
            add["Peak memory"](peak_memory(sub, root, budget))
        del bench
        text = page({k: v for k, v in tables.items() if v[1]}, options)
        if write is not None:
            put(write, "engines", text)
    click.echo(text)
    click.echo(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} KiB")


if __name__ == "__main__":
    main()
