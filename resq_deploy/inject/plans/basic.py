"""Plans that are fixed from the start: random patterns, all of them, rates times draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resq_deploy.inject.faults import Fault, Numbered
from resq_deploy.inject.plans.base import Plan
from resq_deploy.inject.space import Flat, Space


@dataclass(frozen=True, kw_only=True)
class Random(Plan):
    """`n` patterns of a fault model without rates."""

    model: Fault
    n: int
    margin: float | None = None
    """Where `n` was planned from a margin of error, that margin and ..."""
    confidence: float | None = None
    """... its confidence, both in (0, 1)."""

    def trials(self) -> Sequence[int]:
        return range(self.n)

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        return self.model.sample(space, seed=seed, draw=trial)

    def describe(self) -> dict[str, Any]:
        planned = {"margin": self.margin, "confidence": self.confidence}
        return {"kind": "random", "trials": self.n, **(planned if self.margin else {})}


@dataclass(frozen=True, kw_only=True)
class Exhaustive(Plan):
    """Every pattern of a numbered fault model once: trial number = pattern number.

    For `single`, that is the flat bit index.
    """

    model: Numbered
    n: int
    """Its population in the fault space."""

    @classmethod
    def of(cls, model: Fault, space: Space) -> Exhaustive:
        """All patterns of `model`, which must be numbered."""
        assert isinstance(model, Numbered)
        return cls(model=model, n=model.population(space))

    def trials(self) -> Sequence[int]:
        return range(self.n)

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        return self.model.pattern(space, trial)

    def describe(self) -> dict[str, Any]:
        return {"kind": "exhaustive"}


@dataclass(frozen=True, kw_only=True)
class Sweep(Plan):
    """`draws` patterns at each bit error rate: trial number = index of the rate * draws + draw."""

    model: Fault
    rates: tuple[float, ...]
    draws: int

    def trials(self) -> Sequence[int]:
        return range(len(self.rates) * self.draws)

    def rate(self, trial: int) -> float | None:
        return self.rates[trial // self.draws]

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        draw = trial % self.draws
        return self.model.sample(space, seed=seed, draw=draw, rate=self.rate(trial))

    def describe(self) -> dict[str, Any]:
        return {"kind": "sweep", "rates": list(self.rates), "draws": self.draws}
