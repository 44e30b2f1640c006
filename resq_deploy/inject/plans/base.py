"""The interface of a campaign plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.inject.faults import Fault
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Flat, Space
from resq_deploy.records import Trial


class Plan(ABC):
    """The trials of a campaign."""

    model: Fault

    @property
    def fault(self) -> str:
        """Name of the fault model."""
        return self.model.name

    @abstractmethod
    def trials(self) -> Sequence[int]:
        """Numbers of all trials, ascending."""

    def rate(self, trial: int) -> float | None:
        """Bit error rate of a trial; None where the plan has no rates."""
        return None

    @abstractmethod
    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        """Flat indices of the stored bits that a trial strikes."""

    def flips(self, cells: Flat, memory: Memory) -> Flat:
        """The struck cells whose stored value changes."""
        return self.model.flips(cells, memory)

    @property
    def n_stages(self) -> int:
        """Upper bound of the number of stages; more than 1 only where a campaign may end early."""
        return 1

    def stage(self, index: int, trials: Sequence[Trial]) -> Sequence[int]:
        """Numbers of the trials of stage `index`; none when the campaign may end.

        `trials` holds at least those of all stages before; nothing else is looked at, so that
        neither workers nor interruptions change what runs.
        """
        return self.trials()

    def weights(self, trials: Sequence[Trial]) -> NDArray[np.float64] | None:
        """Bits (n,) that each finished trial stands for; None where all stand for as many."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON values from which `restore` builds the plan again."""
