"""Where trials struck: tables of trials for other programs, and the sites for `--sites`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import store
from resq_deploy.errors import MissingExtra
from resq_deploy.inject import plans
from resq_deploy.inject.addresses import address, read_map
from resq_deploy.inject.space import Space, Tensor
from resq_deploy.records import Site, Trial
from resq_deploy.store import Header

COLUMNS = tuple(
    "trial,tensor,offset,bit,n_flips,n_total,n_correct,n_sdc,n_changed,"
    "rate,n_sdc5,n_nonfinite,margin_lost,margin_worst,outcome".split(",")
)
"""Of the rows of trials; tensor, offset and bit are the struck site."""
ADDRESSES = ("address", "address_bit")
"""Two columns more where a memory map is given."""


def channel(tensor: Tensor, offset: int) -> int | None:
    """Output channel of an element of a weight; None where its axis is not known."""
    if tensor.axis is None:
        return None
    return int(np.unravel_index(offset, tensor.shape)[tensor.axis])


def _struck(header: Header, trials: Sequence[Trial]) -> Iterator[tuple[Trial, list[Site]]]:
    """Every trial with its sites; those of several are drawn again from the seed."""
    space = Space.from_json(header.space)
    plan = plans.restore(header.plan, header.fault, space)
    for trial in trials:
        if trial.site is not None:
            yield trial, [trial.site]
        else:
            yield trial, space.sites(plan.cells(trial.trial, space, header.seed))


def _rows(
    paths: Sequence[Path], *, joined: bool, map_file: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A row in COLUMNS a trial, and with a memory map in ADDRESSES; None where it has no value.

    With `joined` the sites of patterns with several cells are joined with `;`.
    """
    header, trials, _ = store.read(paths)
    mapped = read_map(map_file, header)
    pairs = _struck(header, trials) if joined else ((t, [t.site] if t.site else []) for t in trials)
    for trial, hit in pairs:
        row = {name: getattr(trial, name, None) for name in COLUMNS}
        cells = [vars(site) for site in hit]
        if mapped is not None:
            cells = [vars(site) | address(mapped, site) for site in hit]
        for name in ("tensor", "offset", "bit", *(ADDRESSES if mapped else ())):
            values = ["" if cell[name] is None else str(cell[name]) for cell in cells]
            row[name] = ";".join(values) or None
        yield row


def write_csv(
    paths: Sequence[Path], out: Path, *, sites: bool = False, map_file: Path | None = None
) -> int:
    """One row per trial in COLUMNS, and with a memory map in ADDRESSES. Returns the number of rows.

    With `sites` the sites of patterns with several cells stand in the columns of sites and
    addresses, joined with `;`; without, those columns are empty there.
    """
    rows = [list(row.values()) for row in _rows(paths, joined=sites, map_file=map_file)]
    columns = COLUMNS if map_file is None else (*COLUMNS, *ADDRESSES)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, *rows])
    return len(rows)


def write_parquet(paths: Sequence[Path], out: Path, *, sites: bool = False) -> int:
    """The rows of `write_csv` as a Parquet file; MissingExtra without pyarrow. Returns rows.

    tensor, offset and bit are strings, which hold one site or, joined with `;`, several.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingExtra("pyarrow", "report") from None
    kinds = dict.fromkeys(COLUMNS, pa.int64())
    kinds |= dict.fromkeys(("tensor", "offset", "bit", "outcome"), pa.string())
    kinds |= dict.fromkeys(("rate", "margin_lost", "margin_worst"), pa.float64())
    rows = list(_rows(paths, joined=sites))
    parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(kinds.items())), out)
    return len(rows)


def write_sites(paths: Sequence[Path], out: Path) -> int:
    """The faults alone, as Injection,Layer,TensorIndex,Bit: input for `--sites`. Returns rows."""
    header, trials, _ = store.read(paths)
    rows = 0
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(plans.CSV_COLUMNS)
        for trial, hit in _struck(header, trials):
            writer.writerows([trial.trial, s.tensor, s.offset, s.bit] for s in hit)
            rows += len(hit)
    return rows
