"""The interface of a fault model."""

from __future__ import annotations

from abc import ABC, abstractmethod

from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Flat, Space


class Fault(ABC):
    """Draws fault patterns; the same arguments always give the same pattern.

    Contract, tested for every model: the cells of a pattern are distinct bits of the memory, and
    depend on the arguments only, not on which patterns were drawn before.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What the command line calls it."""

    @abstractmethod
    def sample(self, space: Space, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """Cells (flat bit indices) that pattern number `draw` (from 0) strikes, root `seed`.

        `rate` is the bit error rate in [0, 1] for models that have one, else None.
        """

    def flips(self, cells: Flat, memory: Memory) -> Flat:
        """The struck cells whose stored value changes; all of them unless the model says so."""
        return cells
