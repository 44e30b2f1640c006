"""Stuck-at faults: a cell reads as a fixed value, whatever is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.faults.ber import struck
from resq_deploy.inject.faults.single import SingleFlip
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Flat, Space


@dataclass(frozen=True, kw_only=True)
class StuckAt(SingleFlip):
    """One defective cell per trial (the cells of `single`), or every cell with a rate.

    A cell that stores the value it is stuck at changes nothing: a masked trial of no flips.
    """

    plans = SingleFlip.plans | {"--rates"}
    reads = True
    value: int
    """0 or 1."""

    @property
    def name(self) -> str:
        return f"stuck{self.value}"

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        if rate is None:
            return super().sample(space, seed=seed, draw=draw)
        return struck(space, seed=seed, draw=draw, rate=rate)

    def flips(self, cells: Flat, memory: Memory) -> Flat:
        return np.asarray(cells[memory.bits(cells) != self.value])
