"""SECDED: a code of 72 bits for 64, corrects one flip in a word and detects two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding import hsiao
from resq_deploy.inject.protect.base import Bytes, Protection


def _columns() -> NDArray[np.uint8]:
    """(64,) the column of the parity-check matrix of every data bit, bit i for row i.

    The 56 columns of weight 3 and the 8 rotations of one column of weight 5: each row has 26 ones.
    The 8 check bits have the columns of weight 1.
    """
    five = [(0b11111 << i | 0b11111 >> (8 - i)) & 255 for i in range(8)]
    return np.array(hsiao.columns(8, 3) + five, np.uint8)


COLUMNS = _columns()
_CHECKS = hsiao.checks(COLUMNS)

NOTHING, UNCORRECTABLE = 64, 65
_ACTION = np.full(256, UNCORRECTABLE)
"""Data bit that each syndrome says to invert; NOTHING for none and for check bits."""
_ACTION[[0, *(1 << i for i in range(8))]] = NOTHING
_ACTION[COLUMNS] = np.arange(64)


@dataclass(frozen=True, kw_only=True)
class Secded(Protection):
    """Hsiao's (72, 64) code over words of 8 bytes, check bits in a memory beside.

    One flip in the 72 bits is corrected, two are detected; three may be taken for one and
    corrected in a fourth place, as the real code does. A word that is found bad and cannot be
    corrected is left as it was read, or with `zero` read as eight bytes 0. Costs one byte in
    eight (12.5 %).
    """

    word = 8
    check_bits = 8

    zero: bool = False
    """Read words that cannot be corrected as zeros."""

    @property
    def name(self) -> str:
        return "secded:zero" if self.zero else "secded"

    def encode(self, words: Bytes) -> Bytes:
        return hsiao.syndromes(_CHECKS, words)

    def decode(self, words: Bytes, checks: Bytes) -> Bytes:
        action = _ACTION[self.encode(words) ^ checks]
        read = words.copy()
        wrong = np.flatnonzero(action < NOTHING)
        bit = action[wrong]
        read[wrong, bit // 8] ^= np.left_shift(1, bit % 8).astype(np.uint8)
        if self.zero:
            read[action == UNCORRECTABLE] = 0
        return read
