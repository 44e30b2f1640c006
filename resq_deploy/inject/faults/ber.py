"""Bit error rate: every bit flips independently with the same probability."""

from __future__ import annotations

from dataclasses import dataclass

from resq_deploy.bits import random_positions
from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import Fault
from resq_deploy.inject.space import Flat, Space
from resq_deploy.seeds import stream


@dataclass(frozen=True, kw_only=True)
class BitErrorRate(Fault):
    """Independent flips with probability `rate` per stored bit."""

    @property
    def name(self) -> str:
        return "ber"

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """Indices in ascending order; memory grows with the flips, not with the bits.

        The stream is named by the rate's own value: other rates in the same sweep do not
        change the pattern.
        """
        if rate is None:
            raise InputError("the fault model ber needs a bit error rate in [0, 1]")
        return random_positions(space.n_bits, rate, stream(seed, "trial", repr(float(rate)), draw))
