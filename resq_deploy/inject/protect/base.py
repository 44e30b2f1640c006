"""The interface of a memory protection, which is also the one that protects nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.inject.space import Space

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Protection:
    """Check codes over the words of a memory, and what is read when they do not match.

    A word is `word` consecutive bytes of one tensor (the last one of a tensor is filled up with
    zeros that are not stored), with a check code of `check_bits` bits beside it. Contract, tested
    for every protection: a word that no fault struck is read as it was written.
    """

    name: ClassVar[str] = "none"
    word: ClassVar[int] = 1
    check_bits: ClassVar[int] = 0
    """In [0, 8]."""

    @property
    def immune(self) -> int:
        """Most significant bits of every element that stand in cells which do not flip."""
        return 0

    def encode(self, words: Bytes) -> Bytes:
        """Check codes (n,) of words (n, word)."""
        return np.zeros(len(words), np.uint8)

    def decode(self, words: Bytes, checks: Bytes) -> Bytes:
        """What is read (n, word) where words (n, word) and check codes (n,) are stored."""
        return words

    def stored(self, space: Space) -> Space:
        """The fault space of the file with the check tensors that this protection adds."""
        return space
