"""Adversarial bits: progressive bit search (BFA, Rakin et al., arXiv 1903.12269).

The attacker knows the network and a batch of images, and flips stored bits one after the other.
Each time the twin's gradients rank the bits of every layer, the first ones of each layer are
tried on the exported file, and the flip that raises the loss of the batch most is kept. Every
prefix of the sequence also runs on images that the attacker does not have.

Where a single flip is corrected, the attacker flips several bits at once: of a byte (the encoding
`hamming`) those that raise the loss most for each flip, of a word of eight bytes (`secded`) the two
or three that would raise it most if nothing were corrected. Every flip counts.
"""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_deploy import artifacts, bits, evaluate, metrics, progress, runtime, seeds
from resq_deploy.attack.twin import WANTED, load_twin, strange_weight
from resq_deploy.data.base import Dataset
from resq_deploy.encoding import Encoding
from resq_deploy.encoding.base import Codes, inverted
from resq_deploy.errors import InputError
from resq_deploy.inject import discovery, inject, plans
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.memory import Change, Memory
from resq_deploy.inject.network import Network
from resq_deploy.inject.reload import Reload
from resq_deploy.metrics import top1
from resq_deploy.nets.quantized import codes, encoding_of, value, weight_layers
from resq_deploy.perturb.weights import bit_errors
from resq_deploy.records import Site

Masks = dict[str, Tensor]

TRIED = 3
"""Bits of each layer whose loss is measured; the original tries the first."""
MARGIN = 0.01
"""An accuracy so little above chance counts as chance."""
RANDOM_PATTERNS = 20


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bit that might be flipped next; several where single flips are corrected."""

    layer: str
    places: tuple[tuple[int, int], ...]
    """Byte of the weight (C order) and bit of it, for each flip."""
    gain: float
    """By how much the loss of the batch rises for each flip, to first order."""

    @property
    def sites(self) -> list[Site]:
        name = f"{self.layer}.weight"
        return [Site(tensor=name, offset=offset, bit=bit) for offset, bit in self.places]

    def flipped(self, masks: Masks, shape: torch.Size) -> Masks:
        """`masks` with these bits flipped too."""
        mask = masks.get(self.layer, torch.zeros(shape, dtype=torch.int8)).clone()
        for offset, bit in self.places:
            mask.view(torch.uint8).view(-1)[offset] ^= 1 << bit
        return {**masks, self.layer: mask}


@contextmanager
def _weight_values(net: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collects, by layer, the dequantized weights (with gradients) and scales of a forward pass."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, layer in weight_layers(net).items():

        def hook(proxy: nn.Module, args: Any, out: Any, name: str = name) -> Any:
            leaf = out.value.detach().requires_grad_(True)
            found[name] = (leaf, out.scale.detach())
            return out.set(value=leaf)

        handles.append(cast(nn.Module, layer.weight_quant).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def damage(scores: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, n_classes), of each image at most 2 ln(n_classes).

    The original does not bound it; then a few lost images, whose loss grows and grows, outweigh
    all those that are still right.
    """
    each = F.cross_entropy(scores.float(), y, reduction="none")
    return each.clamp(max=2 * math.log(scores.shape[1])).mean()


Stored = NDArray[np.uint8]
Move = tuple[float, tuple[tuple[int, int], ...]]
"""The gain of a candidate, and its places."""


def _read_after(encoding: Encoding, stored: Codes) -> Iterator[tuple[int, Codes]]:
    """Which bits of a byte may flip together, as a mask, and what every byte is read as then."""
    if not encoding.corrects:
        for bit in range(8):
            yield 1 << bit, encoding.struck_alone(stored, bit)
    else:
        for mask in range(1, 256):
            yield mask, encoding.decode((stored.view(np.uint8) ^ np.uint8(mask)).view(np.int8))


def _in_bytes(
    encoding: Encoding, stored: Codes, flipped: Stored, slope: NDArray[Any], n: int
) -> Iterator[Move]:
    """The `n` best flips, and those as good as the last, where bytes are read one by one.

    `flipped` has the bits that have flipped already, `slope` the rise of the loss for a code step.
    """
    read = encoding.decode(stored).astype(np.int16)
    for mask, after in _read_after(encoding, stored):
        gains = slope * (after.astype(np.int16) - read) / mask.bit_count()
        gains = np.where(flipped & mask, -np.inf, gains).astype(np.float64).reshape(-1)
        least = max(0.0, np.partition(gains, -n)[-n]) if n < gains.size else 0.0
        together = [bit for bit in range(8) if mask >> bit & 1]
        for offset in np.flatnonzero((gains >= least) & (gains > 0)).tolist():
            yield float(gains[offset]), tuple((offset, bit) for bit in together)


def _in_words(
    encoding: Encoding, stored: Codes, flipped: Stored, slope: NDArray[Any], n: int
) -> Iterator[Move]:
    """Of every word two and three flips, and the `n` best of bytes behind whole words.

    Those that would do most if nothing were corrected; their gain is that of what is really read.
    """
    whole = stored.size // encoding.word * encoding.word
    rest = stored.reshape(-1)[whole:], flipped.reshape(-1)[whole:], slope.reshape(-1)[whole:]
    for gain, behind in _in_bytes(Encoding(), *rest, n):
        yield gain, tuple((whole + offset, bit) for offset, bit in behind)
    flat = stored.reshape(-1)[:whole]
    mine, slope = flipped.reshape(-1)[:whole, None], slope.reshape(-1)[:whole, None]
    loose = encoding.uncorrected(flat).astype(np.int16)
    each = [encoding.uncorrected(inverted(flat, bit)) - loose for bit in range(8)]
    harm = np.where(mine >> np.arange(8) & 1, -np.inf, slope * np.stack(each, axis=1))
    order = np.argsort(harm.reshape(-1, 8 * encoding.word), axis=1)
    order += 8 * encoding.word * np.arange(len(order))[:, None]
    before = encoding.decode(flat).astype(np.int16)
    for together in (order[:, -2:], order[:, -3:]):
        struck = flat.copy()
        masks = np.left_shift(1, together % 8).astype(np.uint8)
        np.bitwise_xor.at(struck.view(np.uint8), together // 8, masks)
        rise = slope[:, 0] * (encoding.decode(struck) - before)
        gains = rise.reshape(-1, encoding.word).sum(axis=1, dtype=np.float64) / together.shape[1]
        for gain, flips in zip(gains, together, strict=True):
            if gain > 0:
                yield float(gain), tuple((flip // 8, flip % 8) for flip in flips.tolist())


def candidates(net: nn.Module, masks: Masks, x: Tensor, y: Tensor, n: int) -> list[Candidate]:
    """The `n` flips of each layer that raise `damage` most, to first order and for each bit.

    x (N, C, H, W) in [0, 1], y (N,). A flip changes a weight by (decode(s') - decode(s)) scale,
    where s are the stored codes with `masks` applied: two's complement, or what an encoding makes
    of it. Bits that are flipped already, or whose flip would lower the loss, are left out.
    """
    with evaluate.frozen(net), bit_errors(net, masks), _weight_values(net) as weights:
        harm = damage(value(net(x)), y)
        gradients = torch.autograd.grad(harm, [leaf for leaf, _ in weights.values()])
    encoding, layers, found = encoding_of(net), weight_layers(net), []
    for (name, (_, scale)), gradient in zip(weights.items(), gradients, strict=True):
        plain = encoding.encode(codes(layers[name]).numpy()).view(np.uint8)
        flipped = masks[name].numpy().view(np.uint8) if name in masks else np.zeros_like(plain)
        facts = (plain ^ flipped).view(np.int8), flipped, (gradient * scale).numpy()
        moves = _in_words if encoding.word > 1 else _in_bytes
        best = heapq.nlargest(n, moves(encoding, *facts, n), key=lambda move: move[0])
        found += [Candidate(layer=name, places=places, gain=gain) for gain, places in best]
    return found


class _File:
    """The exported file with bits flipped, on some images."""

    def __init__(self, raw: bytes, net: nn.Module, images: Dataset) -> None:
        found = discovery.discover(runtime.parse_model(raw))
        self._memory = Memory.of(found)
        self._engine = Reload(found.model, found.space, images.x)
        self._y = images.y
        self.n_classes = self._engine.run({}).shape[1]
        self._check(net)

    def _check(self, net: nn.Module) -> None:
        """InputError unless the file stores the codes of the twin, a byte for each."""
        packed = [t.name for t in self._memory.space.tensors if t.dtype in bits.PACKED]
        if packed:
            raise InputError(
                f"the file stores two 4-bit codes of {packed[0]} in a byte; the search flips bits "
                "of bytes that hold one: export with --weights int8"
            )
        strange = strange_weight(self._memory, net)
        if strange is not None:
            raise InputError(
                f"the file does not store the codes of {strange} in the twin; {WANTED}"
            )

    def correct(self, sites: Sequence[Site]) -> NDArray[np.bool_]:
        """(N,) is the top-1 the label, with the bits at `sites` flipped?"""
        scores = self._engine.run(_read(self._memory, sites))
        return np.asarray(top1(scores) == self._y)


class _Attacked:
    """The exported file on the images of the attacker, who flips one bit after the other.

    What a bit would do is found by the fast engine, from where those flipped so far have led.
    """

    def __init__(self, raw: bytes, batch: Dataset) -> None:
        self._batch = batch
        self._enter(Network(discovery.discover(runtime.parse_model(raw)), batch.x))

    def _enter(self, network: Network) -> None:
        x = self._batch.x
        self._network, self._memory = network, Memory.of(network.found)
        self._engine = Fast(network, network.keep(x), x)

    def flip(self, sites: Sequence[Site]) -> None:
        """The bits at `sites` flip for good."""
        self._enter(self._network.holding(_read(self._memory, sites)))

    def damage(self, sites: Sequence[Site] = ()) -> float:
        """`damage` with the bits at `sites` flipped too."""
        scores = self._engine.run(_read(self._memory, sites))
        return float(damage(torch.from_numpy(scores), torch.from_numpy(self._batch.y)))


def _read(memory: Memory, sites: Sequence[Site]) -> Change:
    """What is read with the bits at `sites` flipped."""
    return memory.read(np.sort(np.array([memory.space.flat(site) for site in sites], np.int64)))


@dataclass(frozen=True, kw_only=True)
class Step:
    """A flip that was kept."""

    chosen: Candidate
    loss: float
    """Of the attack batch, after the flip."""
    masks: Masks
    """All flips so far."""


def search(net: nn.Module, raw: bytes, batch: Dataset) -> Iterator[Step]:
    """Flips in the order in which they are kept; ends when no bit is expected to do harm.

    `raw` is the exported file, `batch` what the attacker has.
    """
    shapes = {name: cast(Tensor, layer.weight).shape for name, layer in weight_layers(net).items()}
    x, y = evaluate.tensor(batch.x), torch.from_numpy(batch.y)
    masks: Masks = {}
    file = _Attacked(raw, batch)
    before = file.damage()
    while True:
        tried = candidates(net, masks, x, y, TRIED)
        if not tried:
            return
        losses = np.array([file.damage(candidate.sites) for candidate in tried])
        best = int(np.nanargmax((losses - before) / [len(c.places) for c in tried]))
        chosen, before = tried[best], float(losses[best])
        masks = chosen.flipped(masks, shapes[chosen.layer])
        file.flip(chosen.sites)
        yield Step(chosen=chosen, loss=before, masks=masks)


def chance(n_classes: int, y: NDArray[np.int64]) -> float:
    """What guessing gets right: 1 / n_classes, or the share of the most frequent label if more."""
    return max(1 / n_classes, float(np.bincount(y).max() / len(y)))


def _sequence(
    file: _File, steps: Iterator[Step], net: nn.Module, images: Dataset, flips: int, limit: float
) -> dict[str, Any]:
    """One search: its flips, and the accuracy of the file after each, down to `limit`."""
    sites: list[Site] = []
    rows: list[dict[str, Any]] = []
    masks: Masks = {}
    correct = file.correct([])
    with progress.bar(flips, "flips") as bar:
        for step in steps:
            chosen = step.chosen
            if len(rows) + len(chosen.places) > flips:
                break
            masks = step.masks
            sites += chosen.sites
            correct = file.correct(sites)
            after = {"gain": chosen.gain, "loss": step.loss, "n_correct": int(correct.sum())}
            rows += [vars(site) | after for site in chosen.sites]
            bar.update(len(chosen.places))
            if correct.mean() <= limit or len(rows) == flips:
                break
    twin = evaluate.logits(net, images.x, masks=masks).argmax(1).numpy() == images.y
    return {
        "flips": rows,
        "flips_to_chance": len(rows) if rows and correct.mean() <= limit else None,
        "twin_n_correct": int(twin.sum()),
        "n_twin_differs": int((twin != correct).sum()),
    }


def bfa(
    model: Path,
    twin: Path,
    data: Dataset,
    *,
    images: int | None = None,
    flips: int = 50,
    n_seeds: int = 5,
    batch: int = 128,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Progressive bit search on `twin`, replayed on `model`; the summary in plain JSON values.

    The file is measured on the first `images` of `data` (default: all but `n_seeds` batches, at
    least half); each of `n_seeds` searches draws its attack batch from the rest and ends at chance
    level (`chance` + MARGIN on the measured images) or after `flips`. `random` has the same file
    under as many random flips as the longest search made. Raises InputError when the twin is not
    the checkpoint of the file or the data are too few.
    """
    if flips < 1 or n_seeds < 1 or batch < 1:
        raise InputError(
            f"flips, seeds and batch must be at least 1, got {flips}, {n_seeds} and {batch}"
        )
    n = max(len(data) // 2, len(data) - n_seeds * batch) if images is None else images
    if not 0 < n <= len(data) - batch:
        raise InputError(
            f"{images or 'no'} images to measure and {batch} to attack with asked for; {data.name} "
            f"has {len(data)}, and none may be in both"
        )
    if n_seeds > 1 and n + batch == len(data):
        raise InputError(
            f"{n} images to measure leave {batch} of {len(data)}, which each of {n_seeds} searches "
            "would attack with; measure fewer, or search once"
        )
    raw = runtime.read_model(model)
    net, facts = load_twin(model, twin)
    if not facts["quantized"]:
        raise InputError(f"{twin} is a float checkpoint; the search needs the int8 one")
    measured = data.first(n)
    file = _File(raw, net, measured)
    data.check_labels(file.n_classes)
    level = chance(file.n_classes, measured.y)
    clean = int(file.correct([]).sum())
    searches = []
    for number in range(n_seeds):
        drawn = seeds.stream(seed, "bfa", number).choice(len(data) - n, batch, replace=False)
        attacker = data.take(n + np.sort(drawn))
        steps = search(net, raw, attacker)
        searches.append(_sequence(file, steps, net, measured, flips, level + MARGIN))
    longest = max(len(found["flips"]) for found in searches)
    return {
        "model_sha256": artifacts.sha256(model),
        "twin_sha256": artifacts.sha256(twin),
        "data_sha256": data.sha256,
        "n_images": n,
        "batch": batch,
        "max_flips": flips,
        "seed": seed,
        "confidence": confidence,
        "clean": {"n_correct": clean, "n_total": n},
        "chance": level,
        "limit": level + MARGIN,
        "searches": searches,
        "flips_to_chance": _to_chance([s["flips_to_chance"] for s in searches], flips, confidence),
        "random": _random(model, measured, longest, seed, confidence),
        "versions": artifacts.versions(),
        "cpu": runtime.cpu_features(),
    }


def _to_chance(found: list[int | None], flips: int, confidence: float) -> dict[str, Any]:
    """Over searches; a mean with interval only where all of them reached chance."""
    reached = [n for n in found if n is not None]
    result: dict[str, Any] = {"n_reached": len(reached), "n_searches": len(found)}
    if len(reached) == len(found):
        mean = metrics.bootstrap_mean(np.array(reached), confidence)
        return result | {"mean": mean.value, "low": mean.low, "high": mean.high}
    return result | {"more_than": flips}


def _random(
    model: Path, images: Dataset, flips: int, seed: int, confidence: float
) -> dict[str, Any] | None:
    """The exported file under `flips` random flips, RANDOM_PATTERNS times."""
    if flips == 0:
        return None
    with TemporaryDirectory() as folder:
        found = inject(
            model, images, out=Path(folder) / "random.store", fault=f"k:{flips}",
            trials=RANDOM_PATTERNS, seed=seed, confidence=confidence, show=progress.silent,
        )  # fmt: skip
    return {"n_flips": flips, "fault_accuracy": found["fault_accuracy"]}


def sites_csv(found: dict[str, Any]) -> str:
    """The flips of every search as `inject --sites` reads them: one pattern a search."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plans.CSV_COLUMNS)
    for number, made in enumerate(found["searches"]):
        writer.writerows(
            [number, row["tensor"], row["offset"], row["bit"]] for row in made["flips"]
        )
    return text.getvalue()
