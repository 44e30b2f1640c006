"""Statistical plans with strata: every layer, or every bit of every layer, is a population."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics
from resq_deploy.inject.faults import Fault, order
from resq_deploy.inject.plans.base import Plan
from resq_deploy.inject.space import Flat, Space
from resq_deploy.records import Trial


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Bits of one tensor, all or those of one significance."""

    tensor: int
    """Index in the fault space."""
    bit: int | None
    size: int
    """Bits."""
    n: int
    """Trials."""


@dataclass(frozen=True, kw_only=True)
class Strata(Plan):
    """A sample of single cells in every stratum, sized for the margin of error of that stratum.

    Trials are numbered stratum by stratum, in the order of the fault space.
    """

    model: Fault
    """One that strikes single cells."""
    strata: tuple[Stratum, ...]
    by: str
    """`layer` or `layer-bit`."""
    margin: float
    confidence: float

    @classmethod
    def of(cls, model: Fault, space: Space, *, by: str, margin: float, confidence: float) -> Strata:
        """Finite-population sample sizes (metrics.sample_size) in the strata of `space`."""
        strata = [
            Stratum(
                tensor=index,
                bit=bit,
                size=size,
                n=metrics.sample_size(size, margin, confidence),
            )
            for index, tensor in enumerate(space.tensors)
            for bit in ([None] if by == "layer" else range(tensor.width))
            if (size := tensor.n_bits if bit is None else tensor.size) > 0
        ]
        return cls(model=model, strata=tuple(strata), by=by, margin=margin, confidence=confidence)

    @cached_property
    def starts(self) -> Flat:
        """First trial number of every stratum, and the number of trials at the end."""
        return np.concatenate([[0], np.cumsum([s.n for s in self.strata], dtype=np.int64)])

    def trials(self) -> Sequence[int]:
        return range(int(self.starts[-1]))

    def owner(self, trials: Sequence[Trial]) -> Flat:
        """Index (n,) of the stratum of every trial."""
        numbers = [trial.trial for trial in trials]
        return np.asarray(np.searchsorted(self.starts, numbers, side="right") - 1, np.int64)

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        index = int(np.searchsorted(self.starts, trial, side="right")) - 1
        stratum = self.strata[index]
        draw = trial - int(self.starts[index])
        bit = -1 if stratum.bit is None else stratum.bit
        place = int(order(stratum.size, seed, "stratum", stratum.tensor, bit + 1)[draw])
        if stratum.bit is not None:
            place = place * space.tensors[stratum.tensor].width + stratum.bit
        return np.array([int(space.starts[stratum.tensor]) + place], np.int64)

    def weights(self, trials: Sequence[Trial]) -> NDArray[np.float64]:
        """N_h / n_h of the stratum h of every trial, n_h counting the finished ones."""
        owner = self.owner(trials)
        sizes = np.array([stratum.size for stratum in self.strata], np.float64)
        return np.asarray(sizes[owner] / np.bincount(owner, minlength=len(sizes))[owner])

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "strata",
            "by": self.by,
            "margin": self.margin,
            "confidence": self.confidence,
        }
