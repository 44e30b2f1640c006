"""Encodings that read each byte by itself, from a table.

A byte is bad when no fault-free memory holds it. How it is read is the policy: `zero`; the level
`nearest` to it; the `mean` of the good bytes of its output channel, rounded half to even; or what
is `expected`, the mean of the levels that one flip turns into this byte, weighted by how common
they are: normal, with a standard deviation of limit / 3.

Zero shrinks the weights: flips are noise of mean zero that a wide network averages out, a layer
that lost a part of its weights is not. What is expected errs the least in the mean square, where
codes are distributed so and one bit flipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding.base import ALL, Codes, Encoding, inverted

POLICIES = ("zero", "nearest", "mean", "expected")


def flips_between(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.uint8]:
    """(len(a), len(b)) how many bits the bytes of two lists of codes differ in."""
    return np.asarray(np.bitwise_count(a.astype(np.uint8)[:, None] ^ b.astype(np.uint8)))


@dataclass(frozen=True, kw_only=True)
class ByByte(Encoding):
    """Each byte is read by itself."""

    @cached_property
    def table(self) -> Codes:
        """(256,) what each byte is read as."""
        raise NotImplementedError

    def decode(self, stored: Codes) -> Codes:
        return self.table[stored]

    def expected(self, sources: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(256,) mean of the levels that each byte may have come from, `sources` (256, levels),
        weighted by how common they are; 0 where there is none."""
        weight = np.where(sources, np.exp(-0.5 * (self.levels / (self.limit / 3)) ** 2), 0.0)
        total = np.maximum(weight.sum(axis=1), np.finfo(np.float64).tiny)
        return np.asarray(weight @ self.levels / total)


@dataclass(frozen=True, kw_only=True)
class Words(ByByte):
    """Every level has a byte of its own, its word, chosen for what flips make of it."""

    @cached_property
    def words(self) -> Codes:
        """Of the levels, ascending."""
        raise NotImplementedError

    def encode(self, codes: Codes) -> Codes:
        return self.words[np.searchsorted(self.levels, codes)]

    def unprotected(self, size: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Checked(ByByte):
    """Codes stored as they are; some bytes are never stored, and known to be bad when read."""

    kind: ClassVar[str]
    policy: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.policy}"

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        """(256,) by byte: may it be stored?"""
        raise NotImplementedError

    @property
    def levels(self) -> NDArray[np.int64]:
        codes = np.sort(ALL[self.good]).astype(np.int64)
        return codes[np.abs(codes) <= self.limit]

    @cached_property
    def table(self) -> Codes:
        """(256,) what each byte is read as; for the policy `mean` bad ones are 0 here."""
        bad = ALL.astype(np.float64)
        if self.policy == "nearest":
            bad = self.nearest(bad).astype(np.float64)
        elif self.policy == "expected":
            bad = self.expected(flips_between(ALL, self.levels) == 1)
        else:
            bad = np.zeros(256)
        return np.where(self.good, ALL, np.rint(bad)).astype(np.int8)

    def decode(self, stored: Codes) -> Codes:
        if self.policy != "mean":
            return super().decode(stored)
        total, count = self._sums(stored)
        return self._or_mean(stored, total, count)

    def struck_alone(self, stored: Codes, bit: int) -> Codes:
        flipped = inverted(stored, bit)
        if self.policy != "mean":
            return self.table[flipped]
        total, count = self._sums(stored)
        return self._or_mean(flipped, total - self.table[stored], count - self.good[stored])

    def _sums(self, stored: Codes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Sum and number of the good codes of every channel, as (channels, 1, ...)."""
        within = tuple(range(1, stored.ndim))
        # Sums of codes are exact in float32 up to 131,072 codes a channel; a device divides so too.
        total = self.table[stored].sum(axis=within, keepdims=True, dtype=np.float32)
        count = self.good[stored].sum(axis=within, keepdims=True, dtype=np.float32)
        return total, count

    def _or_mean(
        self, stored: Codes, total: NDArray[np.float32], count: NDArray[np.float32]
    ) -> Codes:
        """The good ones of the stored bytes as they are, the others as total / count."""
        mean = np.rint(total / np.maximum(count, np.float32(1)))
        return np.where(self.good[stored], self.table[stored], mean).astype(np.int8)

    def unprotected(self, size: int) -> int:
        return 0
