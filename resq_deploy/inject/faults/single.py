"""One bit per trial, uniform over all bits, without replacement over the campaign."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import Fault
from resq_deploy.inject.space import Flat, Space
from resq_deploy.seeds import stream

PERMUTED = 2**22
"""Up to this many bits the order is one permutation (32 MiB); above, draws with rejection."""

BLOCK = 4096
"""Draws at a time: fixed, so that the sequence does not depend on how many are wanted."""


class _Distinct:
    """The distinct values of a stream of uniform draws, in the order of their first appearance.

    That is a uniform sample without replacement, and its beginning does not depend on its length.
    """

    def __init__(self, n_bits: int, rng: np.random.Generator) -> None:
        self._n_bits, self._rng = n_bits, rng
        self._order: list[int] = []
        self._seen: set[int] = set()

    def __getitem__(self, draw: int) -> int:
        while len(self._order) <= draw:
            for value in self._rng.integers(0, self._n_bits, BLOCK).tolist():
                if value not in self._seen:
                    self._seen.add(value)
                    self._order.append(value)
        return self._order[draw]


@lru_cache(maxsize=4)
def _order(n_bits: int, seed: int) -> _Distinct | Flat:
    rng = stream(seed, "single")
    return rng.permutation(n_bits) if n_bits <= PERMUTED else _Distinct(n_bits, rng)


@dataclass(frozen=True, kw_only=True)
class SingleFlip(Fault):
    """The classic single bit flip."""

    @property
    def name(self) -> str:
        return "single"

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """(1,) index; no two draws below the number of bits give the same bit under one seed."""
        n_bits = space.n_bits
        if not 0 <= draw < n_bits:
            raise InputError(f"single flip number {draw} asked for; the file has {n_bits} bits")
        return np.array([_order(n_bits, seed)[draw]], np.int64)
