"""Multi-bit upset: one particle inverts neighbouring cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.faults.base import Numbered, run_start, runs
from resq_deploy.inject.space import Flat, Space


@dataclass(frozen=True, kw_only=True)
class Adjacent(Numbered):
    """`n` neighbouring bits of one tensor flip together, every place equally likely.

    Neighbours in the order in which the file stores the tensor: bit 7 of a byte stands beside
    bit 0 of the next. How a memory interleaves its words is not modelled.
    """

    n: int

    @property
    def name(self) -> str:
        return f"adjacent:{self.n}"

    def population(self, space: Space) -> int:
        return int(runs(space, self.n)[-1])

    def pattern(self, space: Space, index: int) -> Flat:
        return run_start(space, runs(space, self.n), index) + np.arange(self.n)
