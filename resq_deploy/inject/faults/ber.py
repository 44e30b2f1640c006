"""Bit error rate: every bit flips independently with the same probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import Flat
from resq_deploy.seeds import stream


@dataclass(frozen=True, kw_only=True)
class BitErrorRate:
    """Independent flips with probability `rate` per stored bit."""

    @property
    def name(self) -> str:
        return "ber"

    def sample(self, n_bits: int, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """Indices in ascending order; memory grows with the flips, not with the bits.

        The gaps between successes of independent Bernoulli trials are geometric, so the sums
        of geometric gaps are exactly the bits that flip. The stream is named by the rate's own
        value: other rates in the same sweep do not change the pattern.
        """
        if rate is None or not 0 <= rate <= 1:
            raise InputError(f"a bit error rate in [0, 1] expected, got {rate}")
        if rate == 0:
            return np.empty(0, np.int64)
        rng = stream(seed, "trial", repr(float(rate)), draw)
        expected = n_bits * rate
        block = int(expected + 6 * math.sqrt(expected)) + 16  # one block nearly always suffices
        found: list[Flat] = []
        last = -1
        while last < n_bits:
            # a gap beyond the end is cut, so that the sums cannot overflow at tiny rates
            gaps = np.minimum(rng.geometric(rate, block), n_bits + 1)
            found.append(last + np.cumsum(gaps, dtype=np.int64))
            last = int(found[-1][-1])
        flat = np.concatenate(found)
        return flat[flat < n_bits]
