"""Channel-optimized scalar quantizer: levels, bytes and readings made for one bit error rate.

Farvardin and Vaishampayan, "Optimal quantizer design for noisy channels: an approach to combined
source-channel coding", IEEE Transactions on Information Theory 33 (1987). A memory with bit errors
is a noisy channel, and a weight need not be protected bit by bit: what counts is how far what is
read is from the weight. Fewer levels than bytes, whose bytes lie so that likely flips lead to
levels nearby, or to bytes that are read as a mean, make the mean square error least. With more
errors fewer levels remain: the redundancy of a code appears by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import erf

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding.base import ALL, Codes
from resq_deploy.encoding.table import Words, flips_between

SPREAD = 127 / 2
"""Weights are taken for normal with this standard deviation, in code steps, cut off at 127: what
clipping at two root mean squares makes of them."""

WORDS: dict[str, dict[int, int]] = {
    "0.001": {
        -127: 233, -119: 65, -114: 225, -111: 237, -105: 197, -100: 97, -96: 101, -91: 239,
        -88: 199, -84: 229, -80: 165, -76: 231, -72: 228, -68: 230, -65: 245, -61: 247,
        -57: 214, -54: 244, -51: 211, -48: 246, -45: 243, -42: 240, -38: 208, -35: 242,
        -32: 210, -30: 176, -27: 178, -23: 114, -20: 250, -17: 146, -13: 162, -10: 218, -7: 34,
        -3: 170, 0: 130, 3: 106, 6: 202, 9: 138, 12: 2, 15: 74, 18: 142, 22: 136, 26: 6, 29: 78,
        33: 140, 36: 4, 40: 8, 43: 76, 46: 12, 49: 20, 52: 156, 55: 92, 58: 21, 61: 44, 63: 28,
        66: 13, 69: 93, 72: 24, 75: 157, 78: 25, 81: 60, 85: 29, 89: 62, 94: 61, 99: 31,
        105: 27, 111: 57, 118: 63, 127: 59,
    },
    "0.01": {
        -125: 193, -109: 197, -96: 229, -86: 165, -76: 164, -68: 228, -59: 244, -51: 246,
        -45: 240, -39: 243, -33: 242, -28: 249, -23: 248, -16: 250, -9: 234, -1: 170, 6: 106,
        13: 138, 20: 74, 27: 2, 36: 78, 44: 76, 53: 12, 62: 24, 70: 28, 79: 25, 87: 29, 96: 27,
        109: 31, 125: 63,
    },
    "0.02": {
        -124: 131, -103: 129, -87: 161, -75: 169, -67: 160, -58: 164, -46: 232, -36: 200,
        -27: 217, -20: 216, -11: 220, -2: 156, 7: 12, 13: 28, 21: 14, 29: 30, 38: 26, 49: 58,
        59: 50, 71: 114, 85: 118, 102: 119, 123: 127,
    },
    "0.05": {
        -118: 129, -92: 133, -73: 135, -57: 134, -43: 198, -27: 226, -11: 202, 3: 74, 20: 26,
        33: 58, 46: 56, 60: 60, 76: 124, 95: 125, 120: 127,
    },
}  # fmt: skip
"""By rate: the byte of every level, ascending; made by benchmarks/cosq.py."""


def below(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of the weights below each of `x`, in code steps."""
    return np.array([(1 + erf(value / SPREAD / 2**0.5)) / 2 for value in x])


def becomes(rate: float) -> NDArray[np.float64]:
    """(256, 256) probability that a byte (row) is read as another at this bit error rate."""
    flips = flips_between(ALL, ALL).astype(np.int64)
    return np.asarray(rate**flips * (1 - rate) ** (8 - flips))


@dataclass(frozen=True, kw_only=True)
class Cosq(Words):
    """A byte is read as the mean of the weights that it may have come from at the rate it is made
    for; those of WORDS, which fault-free memory holds, as their levels.

    Stored is the level next to a weight (the quantizer of the paper takes the byte with the least
    expected error, which is nearly always the same).
    """

    rate: str

    @property
    def name(self) -> str:
        return f"cosq:{self.rate}"

    @cached_property
    def levels(self) -> NDArray[np.int64]:
        return np.array(list(WORDS[self.rate]))

    @cached_property
    def words(self) -> Codes:
        return ALL[list(WORDS[self.rate].values())]

    @cached_property
    def table(self) -> Codes:
        ends = (self.levels[1:] + self.levels[:-1]) / 2
        common = np.diff(below(ends), prepend=0, append=1)
        weight = common[:, None] * becomes(float(self.rate))[self.words]
        read = np.rint(self.levels @ weight / weight.sum(axis=0))
        read[self.words] = self.levels
        return np.asarray(read.astype(np.int8))
