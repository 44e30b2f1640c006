"""Campaign plans: which trials there are, and which bits each of them flips.

A plan describes itself in plain JSON values; the store keeps that description, and `restore`
turns it into the plan again, so that sites can be drawn again from the seed.
"""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import metrics
from resq_deploy.errors import InputError
from resq_deploy.inject import faults
from resq_deploy.inject.faults import Fault, Numbered
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.space import Flat, Space
from resq_deploy.records import Site, Trial

CSV_COLUMNS = ("Injection", "Layer", "TensorIndex", "Bit")
DEFAULT_DRAWS = 50
LARGE_POPULATION = 10**15
"""The number of sets of k bits is cut here: sample sizes no longer depend on it."""


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

    def looks(self) -> Sequence[int]:
        """Numbers of trials, ascending, after which `enough` is asked; the last is all of them."""
        return [len(self.trials())]

    def enough(self, trials: Sequence[Trial]) -> bool:
        """May the campaign end with these trials, the first ones of the plan up to a look?"""
        return False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON values from which `restore` builds the plan again."""


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


@dataclass(frozen=True, kw_only=True)
class Listed(Plan):
    """Patterns given by the user, by trial number."""

    sites: dict[int, tuple[Site, ...]]
    model: Fault
    """What happens at the sites: they flip (SingleFlip), or they are stuck."""

    @property
    def fault(self) -> str:
        return "sites" if self.model.name == "single" else self.model.name

    def trials(self) -> Sequence[int]:
        return sorted(self.sites)

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        return np.array([space.flat(site) for site in self.sites[trial]], np.int64)

    def describe(self) -> dict[str, Any]:
        rows = [
            [trial, site.tensor, site.offset, site.bit]
            for trial in self.trials()
            for site in self.sites[trial]
        ]
        return {"kind": "sites", "sites": rows}


def _listed(rows: Sequence[tuple[int, Site]], model: Fault) -> Listed:
    patterns: dict[int, tuple[Site, ...]] = {}
    for trial, site in rows:
        if site in patterns.get(trial, ()):
            raise InputError(f"injection {trial} names {site} twice, which would restore it")
        patterns[trial] = (*patterns.get(trial, ()), site)
    return Listed(sites=patterns, model=model)


def restore(description: dict[str, Any], fault: str, space: Space) -> Plan:
    """The plan that `describe` described, of the fault model named `fault`."""
    kind = description["kind"]
    model = faults.parse("single" if fault == "sites" else fault)
    if kind == "exhaustive":
        return _exhaustive(model, space)
    if kind == "sweep":
        return Sweep(model=model, rates=tuple(description["rates"]), draws=description["draws"])
    if kind == "sites":
        return _listed(
            [
                (trial, Site(tensor=tensor, offset=offset, bit=bit))
                for trial, tensor, offset, bit in description["sites"]
            ],
            model,
        )
    return Random(
        model=model,
        n=description["trials"],
        margin=description.get("margin"),
        confidence=description.get("confidence"),
    )


def _exhaustive(model: Fault, space: Space) -> Exhaustive:
    assert isinstance(model, Numbered)
    return Exhaustive(model=model, n=model.population(space))


def make(
    space: Space,
    *,
    fault: str = "single",
    trials: int | None = None,
    margin: float | None = None,
    confidence: float = 0.95,
    exhaustive: bool = False,
    sites: Path | None = None,
    rates: Sequence[float] = (),
    draws: int | None = None,
) -> Plan:
    """The plan that the options of `inject` ask for; InputError when they ask for none or two.

    Exactly one of `trials`, `margin` (finite-population sample size at `confidence`),
    `exhaustive`, `sites` and `rates` (with `draws`, 50 by default), among those that the fault
    model goes with.
    """
    model = faults.parse(fault)
    given = {
        "--trials": trials is not None,
        "--margin": margin is not None,
        "--exhaustive": exhaustive,
        "--sites": sites is not None,
        "--rates": bool(rates),
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) != 1:
        raise InputError(
            f"{' and '.join(names) or 'no plan'} given; expected exactly one of {', '.join(given)}"
        )
    if names[0] not in model.plans:
        fitting = [name for name in given if name in model.plans]
        raise InputError(
            f"--fault {fault} with {names[0]} given; {fault} goes with {' or '.join(fitting)}"
        )
    if draws is not None and not rates:
        raise InputError(f"--draws {draws} given without --rates; use --trials")
    if rates:
        return _sweep(model, rates, DEFAULT_DRAWS if draws is None else draws)
    if sites is not None:
        return read_sites(sites, space, model)
    if exhaustive:
        return _exhaustive(model, space)
    if margin is not None:
        population = min(model.population(space), LARGE_POPULATION)
        n = metrics.sample_size(population, margin, confidence)
        return Random(model=model, n=n, margin=margin, confidence=confidence)
    assert trials is not None
    most = model.population(space) if isinstance(model, Numbered) else None
    if trials < 1 or (most is not None and trials > most):
        limit = "at least 1" if most is None else f"1 to {most} (all patterns of {fault})"
        raise InputError(f"--trials {trials} given; expected {limit}")
    return Random(model=model, n=trials)


def _sweep(model: Fault, rates: Sequence[float], draws: int) -> Sweep:
    bad = [rate for rate in rates if not 0 <= rate <= 1]
    if bad or len(set(rates)) < len(rates):
        raise InputError(f"--rates must be distinct and lie in [0, 1], got {list(rates)}")
    if draws < 1:
        raise InputError(f"--draws must be at least 1, got {draws}")
    return Sweep(model=model, rates=tuple(float(rate) for rate in rates), draws=draws)


def _offset(text: str, shape: tuple[int, ...]) -> int:
    """An element offset, or an index such as "(3, 0, 1, 2)", as other injectors write it."""
    if not text.startswith("("):
        return int(text)
    index = tuple(int(part) for part in text.strip("()").split(",") if part.strip())
    return int(np.ravel_multi_index(index, shape))


def read_sites(path: Path, space: Space, model: Fault) -> Listed:
    """Patterns of a CSV file with the columns Injection,Layer,TensorIndex,Bit.

    Layer is the initializer, TensorIndex the element offset in C order (or a tuple index); rows
    with the same Injection are one pattern, and Injection is the trial number. InputError names
    the line of a site that the file does not have.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); a CSV file expected") from None
    reader = csv.DictReader(io.StringIO(text))
    if not set(CSV_COLUMNS) <= set(reader.fieldnames or ()):
        raise InputError(
            f"{path} has the columns {reader.fieldnames}; expected {','.join(CSV_COLUMNS)}"
        )
    shapes = {tensor.name: tensor.shape for tensor in space.tensors}
    rows = []
    for row in reader:
        try:
            site = Site(
                tensor=row["Layer"],
                offset=_offset(row["TensorIndex"], shapes.get(row["Layer"], ())),
                bit=int(row["Bit"]),
            )
            space.flat(site)
            trial = int(row["Injection"])
        except (ValueError, TypeError) as error:  # InputError is a ValueError
            raise InputError(f"{path}, line {reader.line_num}: {error}") from None
        if trial < 0:
            raise InputError(f"{path}, line {reader.line_num}: Injection {trial} is negative")
        rows.append((trial, site))
    if not rows:
        raise InputError(f"{path} lists no sites; expected a row a flip")
    return _listed(rows, model)
