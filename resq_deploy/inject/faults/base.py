"""The interface of a fault model, and what those with numbered patterns share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import numpy as np

from resq_deploy.errors import InputError
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Flat, Space
from resq_deploy.seeds import stream

PERMUTED = 2**22
"""Up to this many patterns the order is one permutation (32 MiB); above, draws with rejection."""

BLOCK = 4096
"""Draws at a time: fixed, so that the sequence does not depend on how many are wanted."""


COUNTED = frozenset({"--trials", "--margin", "--until-width"})
"""Plans of a number of random patterns."""


class Fault(ABC):
    """Draws fault patterns; the same arguments always give the same pattern.

    Contract, tested for every model: the cells of a pattern are distinct bits of the memory, and
    depend on the arguments only, not on which patterns were drawn before.
    """

    plans: ClassVar[frozenset[str]]
    """The plans it goes with: `--trials`, `--margin`, `--until-width`, `--exhaustive`, `--sites`,
    `--rates`."""
    reads: ClassVar[bool] = False
    """Does `flips` depend on what the cells store?"""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the command line calls it."""

    @abstractmethod
    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """Cells (flat bit indices) that pattern number `draw` (from 0) strikes, root `seed`.

        `rate` is the bit error rate in [0, 1] under `--rates`, else None.
        """

    def population(self, space: Space) -> int:
        """The number of different patterns, of which `--margin` plans a sample."""
        raise NotImplementedError(f"{self.name} has no --margin in its plans")

    def flips(self, cells: Flat, memory: Memory) -> Flat:
        """The struck cells whose stored value changes; all of them unless the model says so."""
        return cells


class _Distinct:
    """The distinct values of a stream of uniform draws, in the order of their first appearance.

    That is a uniform sample without replacement, and its beginning does not depend on its length.
    """

    def __init__(self, population: int, rng: np.random.Generator) -> None:
        self._population, self._rng = population, rng
        self._order: list[int] = []
        self._seen: set[int] = set()

    def __getitem__(self, draw: int) -> int:
        while len(self._order) <= draw:
            for value in self._rng.integers(0, self._population, BLOCK).tolist():
                if value not in self._seen:
                    self._seen.add(value)
                    self._order.append(value)
        return self._order[draw]


@lru_cache(maxsize=4)
def order(population: int, seed: int, *name: str | int) -> _Distinct | Flat:
    """The numbers below `population` in random order, from the stream `name` of the root `seed`."""
    rng = stream(seed, *name)
    return rng.permutation(population) if population <= PERMUTED else _Distinct(population, rng)


class Numbered(Fault):
    """A model whose patterns are numbered: drawn without replacement over the campaign."""

    plans = COUNTED | {"--exhaustive"}

    @abstractmethod
    def population(self, space: Space) -> int:
        """The number of different patterns."""

    @abstractmethod
    def pattern(self, space: Space, index: int) -> Flat:
        """Cells of pattern number `index` in [0, population)."""

    @property
    def stream(self) -> str:
        """Name of the random stream of the order; models that share it strike the same cells."""
        return self.name

    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """No two draws below the population give the same pattern under one seed."""
        population = self.population(space)
        if not 0 <= draw < population:
            raise InputError(
                f"pattern number {draw} of {self.name} asked for; the memory has {population}"
            )
        return self.pattern(space, int(order(population, seed, self.stream)[draw]))


def runs(space: Space, length: int) -> Flat:
    """Cumulated numbers (tensors + 1,) of places for `length` neighbouring bits of one tensor.

    InputError when no tensor has so many.
    """
    places = np.array([max(0, tensor.n_bits - length + 1) for tensor in space.tensors], np.int64)
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(places)])
    if not total[-1]:
        raise InputError(f"{length} neighbouring bits asked for; no tensor has so many")
    return total


def run_start(space: Space, places: Flat, index: int) -> int:
    """Flat index of the first bit of place number `index` of `runs`."""
    tensor = int(np.searchsorted(places, index, side="right")) - 1
    return int(space.starts[tensor]) + index - int(places[tensor])
