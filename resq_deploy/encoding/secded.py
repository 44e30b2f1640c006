"""In-place SECDED: single flips in 8 bytes are corrected, without any extra memory.

The idea of in-place zero-space protection (Guan, Ning, Lin, Shen, Zhou, Lim, NeurIPS 2019): where
seven of eight codes lie in [-64, 63], their bit 6 equals their sign and can hold a check bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding import hsiao
from resq_deploy.encoding.base import ALL, Codes, Encoding, inverted

WORD = 8
"""Bytes of a word."""
CHECK = 6
"""The bit of each of the first seven bytes that holds a check bit."""
RED = 127
"""Syndromes have seven bits."""


def _columns() -> NDArray[np.uint8]:
    """(64,) column of every place of a word: with seven rows there are just 64 of odd weight."""
    data = [column for weight in (3, 5, 7) for column in hsiao.columns(7, weight)]
    places = np.zeros(64, np.uint8)
    at_check = np.arange(7) * 8 + CHECK
    places[at_check] = 1 << np.arange(7)
    places[np.setdiff1d(np.arange(64), at_check)] = data
    return places


COLUMNS = _columns()
CHECKS = hsiao.checks(COLUMNS)

_MASKS = np.zeros((128, WORD), np.uint8)
_MASKS[COLUMNS, np.arange(64) // 8] = 1 << np.arange(64) % 8
CORRECTION = _MASKS
"""(128, 8) what to invert in a word by syndrome; nothing for 0 and where two flips were seen."""

DOUBLE = np.bitwise_count(np.arange(128)) % 2 == 0
DOUBLE[0] = False
"""(128,) by syndrome: two flips, which cannot be corrected."""

_FROM_SIGN = np.where(ALL < 0, ALL | 64, ALL & ~np.int8(64)).astype(np.int8)
READ: NDArray[np.int8] = np.stack([*[_FROM_SIGN] * 7, ALL])
"""(8, 256) code that each byte of a corrected word stands for: bit 6 of the first seven is their
sign again."""


@dataclass(frozen=True, kw_only=True)
class InPlaceSecded(Encoding):
    """A (64, 57) Hsiao code over words of 8 consecutive codes (C order).

    One flip in a word is corrected; two are detected and the word is left as it was read, or with
    `zero` read as eight codes 0. All columns of odd weight are in use: three flips are always taken
    for one and miscorrected. The codes of the last, incomplete word of a tensor are stored as they
    are. Levels are those of 7 bits: the eighth code of a word could be larger, but shares the scale
    of its channel.
    """

    limit: ClassVar[int] = 63
    corrects: ClassVar[bool] = True
    word: ClassVar[int] = WORD

    zero: bool = False
    """Read words that cannot be corrected as zeros."""

    @property
    def name(self) -> str:
        return "secded:zero" if self.zero else "secded"

    def encode(self, codes: Codes) -> Codes:
        stored = codes.copy()
        words = _words(stored)
        words[:, :7] &= np.uint8(255 ^ 1 << CHECK)
        check = hsiao.syndromes(CHECKS, words)
        words[:, :7] |= (check[:, None] >> np.arange(7, dtype=np.uint8) & 1) << CHECK
        return stored

    def decode(self, stored: Codes) -> Codes:
        read = np.array(stored, order="C")
        words = _words(read)
        syndrome = hsiao.syndromes(CHECKS, words)
        corrected = words ^ CORRECTION[syndrome]
        words[:] = READ[np.arange(WORD), corrected].view(np.uint8)
        if self.zero:
            words[DOUBLE[syndrome]] = 0
        return read

    def uncorrected(self, stored: Codes) -> Codes:
        read = np.array(stored, order="C")
        words = _words(read)
        words[:] = READ[np.arange(WORD), words].view(np.uint8)
        return read

    def struck_alone(self, stored: Codes, bit: int) -> Codes:
        read = self.decode(inverted(stored, bit)).reshape(-1)  # right behind the whole words
        for place in range(min(WORD, stored.size // WORD * WORD)):
            inside = slice(place, stored.size // WORD * WORD, WORD)
            one = np.array(stored, order="C").reshape(-1)
            one[inside] = inverted(one[inside], bit)
            read[inside] = self.decode(one)[inside]
        return read.reshape(stored.shape)

    def unprotected(self, size: int) -> int:
        return size % WORD


def _words(codes: Codes) -> NDArray[np.uint8]:
    """The whole words of contiguous codes, as a view (n, 8)."""
    return codes.reshape(-1)[: codes.size // WORD * WORD].view(np.uint8).reshape(-1, WORD)
