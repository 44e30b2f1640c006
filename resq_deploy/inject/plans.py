"""Campaign plans: which trials there are, and which bits each of them flips.

A plan describes itself in plain JSON values; the store keeps that description, and `restore`
turns it into the plan again, so that sites can be drawn again from the seed.
"""

from __future__ import annotations

import csv
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import metrics
from resq_deploy.errors import InputError
from resq_deploy.inject import faults
from resq_deploy.inject.faults import BitErrorRate, Fault, SingleFlip
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
    """Every bit of the fault space once, in its order: trial number = flat bit index."""

    n_bits: int
    model: Fault = field(default_factory=SingleFlip)

    def trials(self) -> Sequence[int]:
        return range(self.n_bits)

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        return np.array([trial], np.int64)

    def describe(self) -> dict[str, Any]:
        return {"kind": "exhaustive"}


@dataclass(frozen=True, kw_only=True)
class Sweep(Plan):
    """`draws` patterns at each bit error rate: trial number = index of the rate * draws + draw."""

    rates: tuple[float, ...]
    draws: int
    model: Fault = field(default_factory=BitErrorRate)

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
    model: Fault = field(default_factory=SingleFlip)

    @property
    def fault(self) -> str:
        return "sites"

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


def _listed(rows: Sequence[tuple[int, Site]]) -> Listed:
    patterns: dict[int, tuple[Site, ...]] = {}
    for trial, site in rows:
        if site in patterns.get(trial, ()):
            raise InputError(f"injection {trial} names {site} twice, which would restore it")
        patterns[trial] = (*patterns.get(trial, ()), site)
    return Listed(sites=patterns)


def restore(description: dict[str, Any], fault: str, space: Space) -> Plan:
    """The plan that `describe` described, of the fault model named `fault`."""
    kind = description["kind"]
    if kind == "exhaustive":
        return Exhaustive(n_bits=space.n_bits)
    if kind == "sweep":
        return Sweep(rates=tuple(description["rates"]), draws=description["draws"])
    if kind == "sites":
        return _listed(
            [
                (trial, Site(tensor=tensor, offset=offset, bit=bit))
                for trial, tensor, offset, bit in description["sites"]
            ]
        )
    return Random(
        model=faults.parse(fault),
        n=description["trials"],
        margin=description.get("margin"),
        confidence=description.get("confidence"),
    )


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

    `fault` ber needs `rates` (and takes `draws`, 50 by default); the others need exactly one of
    `trials`, `margin` (finite-population sample size at `confidence`), `exhaustive`, `sites`.
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
            f"{' and '.join(names) or 'no plan'} given; expected exactly one of "
            f"{', '.join(given)} (--rates with --fault ber)"
        )
    if isinstance(model, BitErrorRate) != bool(rates):
        raise InputError(
            f"--fault {fault} with {names[0]} given; --fault ber goes with --rates, other fault "
            "models with --trials, --margin, --exhaustive or --sites"
        )
    if draws is not None and not rates:
        raise InputError(f"--draws {draws} given without --rates; use --trials")
    if rates:
        return _sweep(rates, DEFAULT_DRAWS if draws is None else draws)
    if sites is not None:
        return read_sites(sites, space)
    if exhaustive:
        if not isinstance(model, SingleFlip):
            raise InputError(f"--exhaustive goes with --fault single, got {fault}")
        return Exhaustive(n_bits=space.n_bits)
    if margin is not None:
        flips = model.k if isinstance(model, faults.KFlips) else 1
        population = min(math.comb(space.n_bits, flips), LARGE_POPULATION)
        n = metrics.sample_size(population, margin, confidence)
        return Random(model=model, n=n, margin=margin, confidence=confidence)
    assert trials is not None
    most = space.n_bits if isinstance(model, SingleFlip) else None
    if trials < 1 or (most is not None and trials > most):
        limit = "at least 1" if most is None else f"1 to {most} (the bits of the file)"
        raise InputError(f"--trials {trials} given; expected {limit}")
    return Random(model=model, n=trials)


def _sweep(rates: Sequence[float], draws: int) -> Sweep:
    bad = [rate for rate in rates if not 0 <= rate <= 1]
    if bad or len(set(rates)) < len(rates):
        raise InputError(f"--rates must be distinct and lie in [0, 1], got {list(rates)}")
    if draws < 1:
        raise InputError(f"--draws must be at least 1, got {draws}")
    return Sweep(rates=tuple(float(rate) for rate in rates), draws=draws)


def _offset(text: str, shape: tuple[int, ...]) -> int:
    """An element offset, or an index such as "(3, 0, 1, 2)", as other injectors write it."""
    if not text.startswith("("):
        return int(text)
    index = tuple(int(part) for part in text.strip("()").split(",") if part.strip())
    return int(np.ravel_multi_index(index, shape))


def read_sites(path: Path, space: Space) -> Listed:
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
    return _listed(rows)
