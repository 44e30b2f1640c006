"""Saturated activation functions on weights (Fuengfusin and Tamukoh, arXiv 2411.19027).

The file stores v and the network computes with tau(v), so that no stored value, however many of
its bits flip, is read as more than the bound of tau.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding.base import ALL, Codes
from resq_deploy.encoding.table import ByByte

Real = NDArray[np.float64]

TAUS: dict[str, Callable[[Real], Real]] = {
    "tanh": np.tanh,
    "arctan": np.arctan,
    "softsign": lambda v: v / (1 + np.abs(v)),
    "hardtanh": lambda v: np.clip(v, -1, 1),
    "lecun-tanh": lambda v: 1.7159 * np.tanh(2 * v / 3),
}
"""The last is LeCun's modified tanh (Efficient BackProp, 1998); the formula of the paper's own
modified tanh was not available to us."""

STEP = 1 / 32
"""v of one stored code: the 8-bit format Q2.5, in which the paper stores v."""


@dataclass(frozen=True, kw_only=True)
class Saf(ByByte):
    """Stored code s is read as round(127 tau(s / 32) / tau(127 / 32)).

    A level is an output of that table. Several stored codes may read the same, where tau is flat;
    the one in their middle is stored, from where most flips lead to the same again.
    """

    tau: str

    @property
    def name(self) -> str:
        return f"saf:{self.tau}"

    @cached_property
    def table(self) -> Codes:
        tau = TAUS[self.tau]
        v: Real = np.clip(ALL, -127, 127).astype(np.float64) * STEP
        return np.rint(127 * tau(v) / tau(np.array(127 * STEP, np.float64))).astype(np.int8)

    @property
    def levels(self) -> NDArray[np.int64]:
        return np.unique(self.table).astype(np.int64)

    def encode(self, codes: Codes) -> Codes:
        middle = np.zeros(256, np.int8)
        for level in np.unique(self.table):
            same = np.sort(ALL[self.table == level])
            middle[level] = same[len(same) // 2]
        return middle[codes]
