"""Bit error rate: every bit flips independently with the same probability."""

from __future__ import annotations

from dataclasses import dataclass

from resq_deploy.bits import random_positions
from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import Fault
from resq_deploy.inject.space import Flat, Space
from resq_deploy.seeds import stream


def struck(space: Space, *, seed: int, draw: int, rate: float | None) -> Flat:
    """Cells, each struck with probability `rate`, ascending; memory grows with their number.

    The stream is named by the rate's own value: other rates in the same sweep do not change the
    pattern. All models with a rate strike the same cells.
    """
    if rate is None:
        raise InputError("a fault model with a rate needs one in [0, 1]; give --rates")
    return random_positions(space.n_bits, rate, stream(seed, "trial", repr(float(rate)), draw))


@dataclass(frozen=True, kw_only=True)
class BitErrorRate(Fault):
    """Independent flips with probability `rate` per stored bit."""

    plans = frozenset({"--rates"})

    @property
    def name(self) -> str:
        return "ber"

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        return struck(space, seed=seed, draw=draw, rate=rate)
