"""Designs the encodings `cosq:RATE`: prints the constants of resq_deploy/encoding/cosq.py.

    python benchmarks/cosq.py

A channel-optimized scalar quantizer is a local optimum of two steps that take turns (Farvardin and
Vaishampayan 1987): every byte is read as the mean of the weights that it may have come from, and
every weight is stored as the byte that is read with the least mean square error. Which optimum is
found depends on the start: here those of other encodings, brought down slowly from a noisier
memory, and then bytes exchanged at random.
"""

from __future__ import annotations

import click
import numpy as np
from numpy.typing import NDArray

from resq_deploy import encoding
from resq_deploy.encoding import cosq

Real = NDArray[np.float64]
STARTS = ("plain", "parity:zero", "guard:zero", "hamming")
COOLING = (0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003)
X = np.linspace(-127, 127, 2033)
"""Weights in steps of a code: 8 a step."""
MASS = np.diff(cosq.below(np.concatenate([[-np.inf], (X[1:] + X[:-1]) / 2, [np.inf]])))


def start(name: str) -> NDArray[np.int64]:
    """The byte for each of X in another encoding."""
    kind = encoding.parse(name)
    return kind.encode(kind.nearest(X * kind.limit / 127)).view(np.uint8).astype(np.int64)


def descend(rate: float, stored: NDArray[np.int64]) -> tuple[float, NDArray[np.int64], Real]:
    """The mean square error of a local optimum, the byte of each of X, and what bytes read."""
    becomes, last = cosq.becomes(rate), np.inf
    while True:
        mass = np.bincount(stored, weights=MASS, minlength=256) @ becomes
        read = np.bincount(stored, weights=MASS * X, minlength=256) @ becomes
        read /= np.maximum(mass, np.finfo(np.float64).tiny)
        error = becomes @ read**2 - 2 * np.outer(X, becomes @ read)
        stored = error.argmin(axis=1)
        found = float(MASS @ (X**2 + error.min(axis=1)))
        if found > last * (1 - 1e-7):
            return found, stored, read
        last = found


def design(rate: float, tries: int) -> tuple[float, NDArray[np.int64], Real]:
    """The best of all starts, and of `tries` exchanges."""
    rng, found = np.random.default_rng(0), []
    for name in STARTS:
        stored = start(name)
        found.append(descend(rate, stored))
        for noisier in COOLING:
            if noisier > rate:
                _, stored, _ = descend(noisier, stored)
        found.append(descend(rate, stored))
    best = min(found, key=lambda one: one[0])
    for _ in range(tries):
        exchanged = np.arange(256)
        a, b = rng.integers(0, 256, (2, rng.integers(1, 6)))
        exchanged[a], exchanged[b] = exchanged[b], exchanged[a]
        best = min(best, descend(rate, exchanged[best[1]]), key=lambda one: one[0])
    return best


@click.command()
@click.option("--tries", default=150, show_default=True, help="Random exchanges for each rate.")
def main(tries: int) -> None:
    """Design the quantizer of every rate of `cosq.WORDS`."""
    for rate in cosq.WORDS:
        error, stored, read = design(float(rate), tries)
        used = np.unique(stored)
        levels = np.rint(read[used]).astype(int)
        words = dict(sorted(zip(levels.tolist(), used.tolist(), strict=True)))
        click.echo(f'    "{rate}": {{  # mean square error {error:.3f}')
        click.echo("        " + ", ".join(f"{level}: {word}" for level, word in words.items()))
        click.echo("    },")


if __name__ == "__main__":
    main()
