"""k distinct bits, every set of k equally likely."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import COUNTED, Fault
from resq_deploy.inject.space import Flat, Space
from resq_deploy.seeds import stream


@dataclass(frozen=True, kw_only=True)
class KFlips(Fault):
    """`k` bits at once, drawn without replacement within a trial."""

    plans = COUNTED
    k: int

    @property
    def name(self) -> str:
        return f"k:{self.k}"

    def population(self, space: Space) -> int:
        return math.comb(space.n_bits, self.k)

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """(k,) indices; InputError when the file has fewer bits."""
        if self.k > space.n_bits:
            raise InputError(f"{self.k} flips asked for; the fault space has {space.n_bits} bits")
        rng = stream(seed, "trial", draw)
        return np.sort(rng.choice(space.n_bits, self.k, replace=False, shuffle=False))
