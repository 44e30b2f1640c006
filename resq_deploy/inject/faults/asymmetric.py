"""Asymmetric bit errors: only stored zeros become ones, or only ones become zeros."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.faults.base import Fault
from resq_deploy.inject.faults.ber import struck
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Flat, Space


@dataclass(frozen=True, kw_only=True)
class Asymmetric(Fault):
    """Every bit that holds `source` flips independently with probability `rate`."""

    plans = frozenset({"--rates"})
    reads = True
    source: int
    """0 or 1."""

    @property
    def name(self) -> str:
        return f"{self.source}to{1 - self.source}"

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        return struck(space, seed=seed, draw=draw, rate=rate)

    def flips(self, cells: Flat, memory: Memory) -> Flat:
        return np.asarray(cells[memory.bits(cells) == self.source])
