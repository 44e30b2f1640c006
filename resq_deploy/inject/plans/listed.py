"""A plan of given sites, read from CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy.errors import InputError
from resq_deploy.inject.faults import Fault
from resq_deploy.inject.plans.base import Plan
from resq_deploy.inject.space import Flat, Space
from resq_deploy.records import Site

CSV_COLUMNS = ("Injection", "Layer", "TensorIndex", "Bit")


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

    @classmethod
    def of(cls, rows: Sequence[tuple[int, Site]], model: Fault) -> Listed:
        """The plan of (trial, site) rows; InputError when a trial names a site twice."""
        patterns: dict[int, tuple[Site, ...]] = {}
        for trial, site in rows:
            if site in patterns.get(trial, ()):
                raise InputError(f"injection {trial} names {site} twice, which would restore it")
            patterns[trial] = (*patterns.get(trial, ()), site)
        return cls(sites=patterns, model=model)


def _offset(text: str, shape: tuple[int, ...]) -> int:
    """An element offset, or an index such as "(3, 0, 1, 2)", as other injectors write it."""
    if not text.startswith("("):
        return int(text)
    index = tuple(int(part) for part in text.strip("()").split(",") if part.strip())
    try:
        return int(np.ravel_multi_index(index, shape))
    except ValueError:
        raise InputError(f"index {text} given for the shape {shape}") from None


def read_sites(path: Path, space: Space, model: Fault) -> Listed:
    """Patterns of a CSV file with the columns Injection,Layer,TensorIndex,Bit.

    Layer is the initializer, TensorIndex the element offset in C order (or a tuple index); rows
    with the same Injection are one pattern, and Injection is the trial number. InputError names
    the line of a site that the file does not have.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); a CSV file expected") from None
    reader = csv.DictReader(io.StringIO(text))
    if not set(CSV_COLUMNS) <= set(reader.fieldnames or ()):
        raise InputError(
            f"{path} has the columns {reader.fieldnames}; expected {','.join(CSV_COLUMNS)}"
        )
    rows = []
    for row in reader:
        try:
            tensor = space.tensors[space.index(row["Layer"])]
            offset = _offset(row["TensorIndex"], tensor.shape)
            site = Site(tensor=tensor.name, offset=offset, bit=int(row["Bit"]))
            space.flat(site)
            trial = int(row["Injection"])
        except (ValueError, TypeError) as error:  # InputError is a ValueError
            raise InputError(f"{path}, line {reader.line_num}: {error}") from None
        if trial < 0:
            raise InputError(f"{path}, line {reader.line_num}: Injection {trial} is negative")
        rows.append((trial, site))
    if not rows:
        raise InputError(f"{path} lists no sites; expected a row a flip")
    return Listed.of(rows, model)
