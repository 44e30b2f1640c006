"""Burst error: the flips of one event lie within a run of neighbouring bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.faults.base import COUNTED, Fault, run_start, runs
from resq_deploy.inject.space import Flat, Space
from resq_deploy.seeds import stream


@dataclass(frozen=True, kw_only=True)
class Burst(Fault):
    """A burst of length `n`: the first and last of `n` neighbouring bits of one tensor flip.

    That is a burst as coding theory defines it (Lin and Costello, "Error Control Coding": nonzero
    positions confined to n consecutive ones, the first and the last of which are nonzero). Each
    bit between them flips with probability 1/2, so that all bursts of this length are equally
    likely.
    """

    plans = COUNTED
    n: int

    @property
    def name(self) -> str:
        return f"burst:{self.n}"

    def population(self, space: Space) -> int:
        return int(runs(space, self.n)[-1]) << max(0, self.n - 2)

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        rng = stream(seed, "trial", draw)
        places = runs(space, self.n)
        start = run_start(space, places, int(rng.integers(places[-1])))
        flipped = rng.random(self.n) < 0.5
        flipped[[0, -1]] = True
        return start + np.flatnonzero(flipped)
