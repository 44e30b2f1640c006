"""k distinct bits, every set of k equally likely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import Flat
from resq_deploy.seeds import stream


@dataclass(frozen=True, kw_only=True)
class KFlips:
    """`k` bits at once, drawn without replacement within a trial."""

    k: int

    @property
    def name(self) -> str:
        return f"k:{self.k}"

    def sample(self, n_bits: int, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """(k,) indices; InputError when the file has fewer bits."""
        if self.k > n_bits:
            raise InputError(f"{self.k} flips asked for; the fault space has {n_bits} bits")
        rng = stream(seed, "trial", draw)
        return np.sort(rng.choice(n_bits, self.k, replace=False, shuffle=False))
