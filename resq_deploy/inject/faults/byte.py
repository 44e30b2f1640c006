"""A whole byte is replaced by another value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.inject.faults.base import Numbered
from resq_deploy.inject.space import Flat, Space


@dataclass(frozen=True, kw_only=True)
class RandomByte(Numbered):
    """One stored byte takes any of its other values, every byte and value equally likely.

    Exclusive-or with a number from 1 to 255 is such a replacement, whatever is stored. The last
    byte of a tensor may have fewer stored bits, and then fewer values.
    """

    @property
    def name(self) -> str:
        return "byte"

    def _patterns(self, space: Space) -> Flat:
        """Cumulated numbers (tensors + 1,) of patterns."""
        counts = [255 * (t.n_bits // 8) + 2 ** (t.n_bits % 8) - 1 for t in space.tensors]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def population(self, space: Space) -> int:
        return int(self._patterns(space)[-1])

    def pattern(self, space: Space, index: int) -> Flat:
        patterns = self._patterns(space)
        tensor = int(np.searchsorted(patterns, index, side="right")) - 1
        byte, value = divmod(index - int(patterns[tensor]), 255)
        inverted = np.flatnonzero(np.unpackbits(np.array([value + 1], np.uint8), bitorder="little"))
        return int(space.starts[tensor]) + 8 * byte + inverted
