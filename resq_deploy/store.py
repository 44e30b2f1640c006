"""The campaign store: one SQLite file with a header and one row per finished trial.

Written in write-ahead mode, every batch of finished trials in its own transaction: killing
a campaign at any moment loses at most the trials in flight.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resq_deploy.errors import HeaderMismatch, InputError
from resq_deploy.records import Count, Site, Trial

FORMAT = "resq-deploy campaign 2"
OLDER = ("resq-deploy campaign 1",)

_COUNTS = ("n_total", "n_correct", "n_sdc", "n_changed", "n_sdc5", "n_nonfinite")
_COLUMNS = ("trial", "rate", "n_flips", "tensor", "offset", "bit", *_COUNTS) + (
    "margin_lost",
    "margin_worst",
    "refused",
)

_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE trials (trial INTEGER PRIMARY KEY, rate REAL, n_flips INTEGER NOT NULL, "
    "tensor TEXT, offset INTEGER, bit INTEGER, "
    + "".join(f"{name} INTEGER NOT NULL, " for name in _COUNTS)
    + "margin_lost REAL NOT NULL, margin_worst REAL NOT NULL, refused INTEGER NOT NULL)",
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a campaign is; two runs with equal headers produce equal trials."""

    model_sha256: str
    """Digest of the ONNX file."""
    data_sha256: str
    """Digest of the images and labels used (Dataset.sha256)."""
    n_images: int
    fault: str
    """Fault model, as given on the command line: `single`, `k:3`, `ber`; `sites` for a list."""
    protection: str = "none"
    """Memory protection, as given on the command line."""
    plan: dict[str, Any]
    """Which trials: the description of the plan, plain JSON values."""
    seed: int
    """Root seed, >= 0."""
    engine: str
    reloaded: dict[str, str] = field(default_factory=dict)
    """Tensors whose faults the fast engine leaves to the reload engine, and why."""
    shard: str
    """`i/n`: the trials with trial % n == i; `0/1` is all of them."""
    golden: Count
    """The run without faults."""
    space: list[dict[str, Any]]
    """The tensors of the fault space in order: name, dtype, shape, ... (inject.space)."""
    versions: dict[str, str]
    cpu: dict[str, Any]
    warnings: list[str]
    """What a reader of the results must know."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _identity(header: Header) -> dict[str, Any]:
    """The fields that must be equal before trials may stand in one store, by name.

    onnxruntime and VNNI because kernels may round or saturate differently; numpy because it
    does not promise the same random streams in every version.
    """
    return {
        "model_sha256": header.model_sha256,
        "data_sha256": header.data_sha256,
        "n_images": header.n_images,
        "fault": header.fault,
        "protection": header.protection,
        "plan": header.plan,
        "seed": header.seed,
        "engine": header.engine,
        "shard": header.shard,
        "versions.onnxruntime": header.versions["onnxruntime"],
        "versions.numpy": header.versions["numpy"],
        "cpu.vnni": header.cpu["vnni"],
        "golden": [header.golden.n_correct, header.golden.n_total],
        "space": header.space,
    }


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_same(field: str, a: Any, b: Any, *, where: str) -> None:
    """HeaderMismatch that names `field` with both values when they differ."""
    if a != b:
        raise HeaderMismatch(f"{where}: {field} differs: {_short(a)} and {_short(b)}")


def check_same_campaign(a: Header, b: Header, *, where: str) -> None:
    """HeaderMismatch naming the first field in which two headers are not one campaign."""
    left, right = _identity(a), _identity(b)
    for name in left:
        check_same(name, left[name], right[name], where=where)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as one line; what was committed before stays in the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(
            f"store {path}: {error}; expected a campaign store on a disk with room, used by no "
            "other writer (trials stored before are kept)"
        ) from None


class Store:
    """An open campaign store; a context manager that closes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def _meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise InputError(f"store {self.path} has no {key}; it is not a campaign store")
        return json.loads(row[0])

    @property
    def header(self) -> Header:
        """What the campaign is."""
        with _translated(self.path):
            fields = self._meta("header")
        return Header(**{**fields, "golden": Count(**fields["golden"])})

    @property
    def seconds(self) -> float:
        """Wall-clock time spent so far, over all resumed runs and merged stores."""
        with _translated(self.path):
            return float(self._meta("seconds"))

    def done(self) -> set[int]:
        """Numbers of the finished trials."""
        with _translated(self.path):
            return {row[0] for row in self._db.execute("SELECT trial FROM trials")}

    def trials(self) -> list[Trial]:
        """The finished trials in the order of their numbers."""
        with _translated(self.path):
            rows = self._db.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM trials ORDER BY trial"  # noqa: S608
            ).fetchall()
        return [_trial(row) for row in rows]

    def add(self, trials: Iterable[Trial], *, seconds: float) -> None:
        """Store finished trials, and the time they took, in one transaction."""
        rows = [_row(trial) for trial in trials]
        with _translated(self.path), self._db:
            self._db.executemany(
                f"INSERT OR IGNORE INTO trials VALUES ({', '.join('?' * len(_COLUMNS))})",  # noqa: S608
                rows,
            )
            self._db.execute(
                "UPDATE meta SET value = value + ? WHERE key = 'seconds'", (float(seconds),)
            )


def _row(t: Trial) -> tuple[Any, ...]:
    site = (t.site.tensor, t.site.offset, t.site.bit) if t.site else (None, None, None)
    counts = (getattr(t, name) for name in _COUNTS)
    return (t.trial, t.rate, t.n_flips, *site, *counts, t.margin_lost, t.margin_worst, t.refused)


def _trial(row: tuple[Any, ...]) -> Trial:
    fields = dict(zip(_COLUMNS, row, strict=True))
    tensor, offset, bit = (fields.pop(name) for name in ("tensor", "offset", "bit"))
    site = None if tensor is None else Site(tensor=tensor, offset=offset, bit=bit)
    return Trial(**{**fields, "site": site, "refused": bool(fields["refused"])})


def _connect(path: Path) -> sqlite3.Connection:
    with _translated(path):
        db = sqlite3.connect(path, timeout=10.0)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    return db


def create(path: Path, header: Header) -> Store:
    """A new, empty store; InputError when the file exists."""
    if path.exists():
        raise InputError(f"store {path} exists; continue it with --resume, or give another --out")
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} of store {path} does not exist; create it first")
    db = _connect(path)
    fields = {**vars(header), "golden": vars(header.golden)}
    meta = [("format", FORMAT), ("header", fields), ("seconds", 0.0)]
    with _translated(path), db:
        db.execute("BEGIN")  # tables and header appear together or not at all
        for table in _SCHEMA:
            db.execute(table)
        db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, canonical(v)) for k, v in meta])
    return Store(path, db)


def open_store(path: Path) -> Store:
    """An existing store; InputError when it is missing, damaged, or something else."""
    if not path.is_file():
        raise InputError(f"store {path} does not exist; inject --out writes one")
    db = _connect(path)
    with _translated(path):
        damage = " ".join(db.execute("PRAGMA quick_check(1)").fetchone()[0].split())
        tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
    if damage != "ok":
        raise InputError(f"store {path} is damaged ({damage}); run the campaign again")
    store = Store(path, db)
    found = store._meta("format") if {"meta", "trials"} <= tables else None
    if found in OLDER:
        raise HeaderMismatch(
            f"store {path} has the format {found!r} of an earlier version, this one writes "
            f"{FORMAT!r}; run the campaign again into a new --out (the same plan and seed draw "
            "the same faults)"
        )
    if found != FORMAT:
        raise InputError(f"{path} is not a campaign store of the format {FORMAT!r}")
    return store


def open_or_create(path: Path, header: Header, *, resume: bool) -> Store:
    """The store of a campaign: new, or with `resume` the one at `path` if its header agrees.

    InputError when it exists and `resume` is not given; HeaderMismatch naming the field when
    it belongs to another campaign.
    """
    if not (resume and path.exists()):
        return create(path, header)
    store = open_store(path)
    try:
        check_same_campaign(store.header, header, where=f"cannot resume {path} (stored, now)")
    except HeaderMismatch:
        store.__exit__()
        raise
    return store


def read(paths: Sequence[Path]) -> tuple[Header, list[Trial], float]:
    """Header, trials and seconds of one store, or of the shards of one campaign joined.

    HeaderMismatch when the headers differ in more than the shard; InputError when a trial
    stands in two stores with different results.
    """
    joined: dict[int, Trial] = {}
    first: Header | None = None
    seconds = 0.0
    for path in paths:
        with open_store(path) as store:
            header, trials = store.header, store.trials()
            seconds += store.seconds
        if len(paths) > 1:
            header = replace(header, shard="0/1")
        first = first or header
        check_same_campaign(first, header, where=f"cannot join {paths[0]} and {path}")
        for trial in trials:
            if joined.setdefault(trial.trial, trial) != trial:
                raise InputError(
                    f"trial {trial.trial} of {path} differs from the same trial of another store: "
                    f"{_row(trial)} and {_row(joined[trial.trial])}"
                )
    if first is None:
        raise InputError("no store given; expected at least one")
    return first, [joined[number] for number in sorted(joined)], seconds


def merge(paths: Sequence[Path], out: Path) -> int:
    """Join stores of one campaign into a new store `out`; returns the number of trials."""
    header, trials, seconds = read(paths)
    with create(out, replace(header, shard="0/1")) as store:
        store.add(trials, seconds=seconds)
    return len(trials)
