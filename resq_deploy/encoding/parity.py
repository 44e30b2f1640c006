"""Parity in the codes: only those with an even number of ones are used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding.base import ALL
from resq_deploy.encoding.table import Checked


@dataclass(frozen=True, kw_only=True)
class EvenParity(Checked):
    """Of the codes 2 n and 2 n + 1 one has an even number of ones: every odd number of flips is
    seen.

    Costs half a step of rounding on average: levels are 1, 2 or 3 codes apart.
    """

    kind = "parity"

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        return np.asarray(np.bitwise_count(ALL.view(np.uint8)) % 2 == 0)
