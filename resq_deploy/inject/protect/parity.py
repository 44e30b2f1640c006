"""One parity bit a byte; a byte that fails the check is read as zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.protect.base import Bytes, Protection


@dataclass(frozen=True, kw_only=True)
class Parity(Protection):
    """Even parity over a byte and its check bit: every odd number of flips is seen.

    What is seen cannot be corrected: the whole byte is read as 0, two codes of packed 4-bit
    weights together. It is the stored byte that becomes 0; where an unsigned weight has a zero
    point, code 0 is its lowest value, not the number 0. An even number of flips passes. Costs one
    bit in eight (12.5 %).
    """

    word = 1
    check_bits = 1

    @property
    def name(self) -> str:
        return "parity"

    def encode(self, words: Bytes) -> Bytes:
        return np.asarray(np.bitwise_count(words[:, 0]) & 1, np.uint8)

    def decode(self, words: Bytes, checks: Bytes) -> Bytes:
        good = self.encode(words) == checks
        return np.where(good[:, None], words, np.uint8(0))
