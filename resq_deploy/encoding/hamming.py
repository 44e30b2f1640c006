"""Extended Hamming code: 15 levels in 8 bits, any two of them at least 4 flips apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding import hsiao
from resq_deploy.encoding.base import ALL, Codes
from resq_deploy.encoding.table import Words, flips_between

STEP = 18
"""Between levels: the largest of which 7 fit in 127."""


def word(data: int) -> int:
    """The byte of 4 data bits, which stay in the low half; check bits are in the high one."""
    columns = hsiao.columns(4, 3)
    checks = 0
    for bit in range(4):
        if data >> bit & 1:
            checks ^= columns[bit]
    return checks << 4 | data


@dataclass(frozen=True, kw_only=True)
class Hamming(Words):
    """Weights of 4 bits in a byte: one flip is corrected, of more the likeliest is read.

    The word of a level k STEP is that of the 4 bits of k in an (8, 4) code with distance 4: the
    extended Hamming code, and Hsiao's for 4 data bits. A byte is read as the level whose word is
    the fewest flips away; where several are, as their mean (two flips leave 4 of them as near).
    """

    corrects: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "hamming"

    @property
    def levels(self) -> NDArray[np.int64]:
        return STEP * np.arange(-7, 8)

    @cached_property
    def words(self) -> Codes:
        return np.array([word(data % 16) for data in range(-7, 8)], np.uint8).view(np.int8)

    @cached_property
    def table(self) -> Codes:
        flips = flips_between(ALL, self.words)
        return np.rint(self.expected(flips == flips.min(axis=1, keepdims=True))).astype(np.int8)
