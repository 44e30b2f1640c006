"""The interface of an encoding, which is also the one that stores codes as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]

ALL: Codes = np.arange(256).astype(np.uint8).view(np.int8)
"""Every byte as the code that it stands for: 0 ... 127, -128 ... -1. Tables by byte stand in this
order, so that a code itself, negative ones counted from the end, finds its entry."""


def inverted(stored: Codes, bit: int) -> Codes:
    """`bit` of every byte flipped (tests hold it to `bits.flip`)."""
    return (stored.view(np.uint8) ^ np.uint8(1 << bit)).view(np.int8)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Which int8 codes a weight may have, how they are stored in as many bytes, how these are read.

    Arrays have the shape of the weight, output channels first, and are flat or of any rank for
    encodings that do not look at channels. Contract, tested for every encoding: what no fault
    struck is read as it was encoded; a legal code is its own nearest.
    """

    limit: ClassVar[int] = 127
    """The scale of a channel maps max|w| to this code."""
    corrects: ClassVar[bool] = False
    """Is a flip that strikes alone undone?"""
    word: ClassVar[int] = 1
    """Consecutive bytes of a tensor (C order) that are read together; an incomplete last word is
    stored and read byte by byte."""

    @property
    def name(self) -> str:
        """What recipes and the command line call it."""
        return "plain"

    @property
    def levels(self) -> NDArray[np.int64]:
        """The codes that quantizing may choose, ascending, in [-limit, limit]."""
        return np.arange(-self.limit, self.limit + 1)

    @property
    def uniform(self) -> bool:
        """Is every code in [-limit, limit] a level?"""
        return len(self.levels) == 2 * self.limit + 1

    def nearest(self, x: NDArray[Any]) -> Codes:
        """The level next to real values in units of a code step; ties go down.

        (Networks with uniform levels use Brevitas' own rounding, whose ties go to even.)
        """
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[np.searchsorted(between, x, side="left")].astype(np.int8)

    def encode(self, codes: Codes) -> Codes:
        """What is stored for levels."""
        return codes

    def decode(self, stored: Codes) -> Codes:
        """What is read where `stored` is stored; defined for every byte."""
        return stored

    def uncorrected(self, stored: Codes) -> Codes:
        """What is read of bytes in which nothing is corrected and nothing found wrong."""
        return self.decode(stored)

    def struck_alone(self, stored: Codes, bit: int) -> Codes:
        """What each of the bytes is read as when `bit` of it flips and nothing else does."""
        return self.decode(inverted(stored, bit))

    def unprotected(self, size: int) -> int:
        """How many of `size` stored bytes no redundancy covers."""
        return size
