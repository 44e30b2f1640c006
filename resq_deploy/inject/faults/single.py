"""One bit per trial, uniform over all bits, without replacement over the campaign."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.faults.base import Numbered
from resq_deploy.inject.space import Flat, Space


@dataclass(frozen=True, kw_only=True)
class SingleFlip(Numbered):
    """The classic single bit flip."""

    plans = Numbered.plans | {"--sites"}

    @property
    def name(self) -> str:
        return "single"

    @property
    def stream(self) -> str:
        return "single"

    def population(self, space: Space) -> int:
        return space.n_bits

    def pattern(self, space: Space, index: int) -> Flat:
        return np.array([index], np.int64)
