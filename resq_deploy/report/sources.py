"""What a run directory or a campaign store holds, read and checked, with what is missing named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from resq_deploy import store
from resq_deploy.artifacts import read_json
from resq_deploy.errors import InputError
from resq_deploy.records import Count, Trial
from resq_deploy.store import Header

STAGES = ("baseline", "attack", "fault", "adjust")
"""The rows of the stage table: what everybody has, then one more stage each."""
LABELS = {"baseline": "baseline", "attack": "+attack", "fault": "+fault", "adjust": "+adjust"}
BASELINE, HARDENED = STAGES[0], STAGES[-1]
CHECKPOINTS = ("float", *STAGES)
DEPLOYED = "model.qdq.onnx"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Both:
    """The same images through the network that was attacked and through the exported file."""

    twin: Count
    deployed: Count


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """One radius of an attack."""

    epsilon: float
    """L-infinity radius, pixels in [0, 1]."""
    twin: Count
    deployed: Count
    correct: str
    """Per image, `1` where the exported file is right, else `0`."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """prove/STAGE/attack.json: white-box attacks on the twin, replayed on the exported file."""

    model_sha256: str
    n_total: int
    steps: int
    restarts: int
    clean: Both
    clean_correct: str
    epsilons: tuple[Epsilon, ...]

    def __post_init__(self) -> None:
        pairs = [(self.clean.deployed, self.clean_correct)]
        for count, correct in pairs + [(e.deployed, e.correct) for e in self.epsilons]:
            ones = correct.count("1")
            marked = (ones + correct.count("0"), ones)
            if (count.n_total, count.n_correct) != marked or len(correct) != self.n_total:
                raise ValueError(
                    f"{count.n_correct} of {count.n_total} counted, but {ones} of {len(correct)} "
                    f"marked correct, with n_total={self.n_total}"
                )


@dataclass(frozen=True, kw_only=True)
class Clean:
    """prove/STAGE/clean.json: the exported file on the whole test set."""

    n_correct: int
    n_total: int
    correct: str | None = None
    """Per image, `1` or `0`; with it the difference to another stage is paired."""

    @property
    def count(self) -> Count:
        return Count(n_correct=self.n_correct, n_total=self.n_total)

    def __post_init__(self) -> None:
        count, marked = self.count, self.correct
        if marked is not None and (
            (marked.count("1"), len(marked)) != (count.n_correct, count.n_total)
            or marked.strip("01")
        ):
            raise ValueError("n_correct and n_total differ from what `correct` marks")


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A store with at least one finished trial."""

    name: str
    """What the reader knows it by: its path within the run, or its file name."""
    header: Header
    trials: tuple[Trial, ...]
    """In the order of their numbers."""
    seconds: float
    """Wall-clock time that the trials took."""

    @property
    def by_rate(self) -> dict[float, list[Trial]]:
        """Trials by bit error rate, lowest rate first; trials without a rate left out."""
        rates = sorted({t.rate for t in self.trials if t.rate is not None})
        return {rate: [t for t in self.trials if t.rate == rate] for rate in rates}

    @property
    def single(self) -> list[Trial]:
        """Trials with exactly one flip, whose site is known."""
        return [t for t in self.trials if t.site is not None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What was proved about the exported file of one stage; None where it is missing."""

    clean: Clean | None
    ber: Campaign | None
    single: Campaign | None
    attack: Attack | None
    manifest: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory."""

    recipe: dict[str, Any]
    stages: dict[str, Stage]
    """By the names of STAGES, in their order."""
    checkpoints: dict[str, dict[str, Any]]
    """Sidecars by the names of CHECKPOINTS; absent ones left out."""
    missing: list[str] = field(default_factory=list)
    """One line each: what a complete run has and this one has not."""
    warnings: list[str] = field(default_factory=list)
    """One line each: why a result may not be valid."""

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", "unnamed"))

    @property
    def confidence(self) -> float:
        """Nominal coverage of every interval, in (0, 1)."""
        prove = self.recipe.get("prove")
        value = prove.get("confidence", 0.95) if isinstance(prove, dict) else 0.95
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"recipe.json: prove.confidence must lie in (0, 1), got {value!r}")
        return float(value)


def marks(text: str) -> NDArray[np.int64]:
    """Per image 1 or 0 from a text of those digits.

    >>> marks("011")
    array([0, 1, 1])
    """
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - ord("0")


def campaign(path: Path, name: str) -> Campaign:
    """A store; InputError in one line when it is missing, broken, or without a finished trial."""
    try:
        header, trials, seconds = store.read([path])
    except InputError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"store {path} has a broken header or trial: {error}") from None
    if not trials:
        raise InputError(f"store {path} has no finished trial; continue it with --resume")
    return Campaign(name=name, header=header, trials=tuple(trials), seconds=seconds)


def _checked(kind: type[T], path: Path) -> T:
    """A JSON file as a record; InputError names the first field that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}: {message}") from None


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: an object expected, got {type(value).__name__}")
    return value


def _planned(header: Header) -> int | None:
    """Trials that a sweep or a random plan has; None where the header does not say."""
    plan = header.plan
    if plan.get("kind") == "sweep":
        return len(plan["rates"]) * int(plan["draws"])
    return int(plan["trials"]) if plan.get("kind") == "random" else None


def _check_files(stage: str, proved: Stage, warnings: list[str]) -> None:
    """Warn where a proof was measured on another file than the exported one."""
    files = (proved.manifest or {}).get("files", {})
    exported = files.get(DEPLOYED) if isinstance(files, dict) else None
    digests = {
        "ber.store": proved.ber and proved.ber.header.model_sha256,
        "single.store": proved.single and proved.single.header.model_sha256,
        "attack.json": proved.attack and proved.attack.model_sha256,
    }
    warnings.extend(
        f"prove/{stage}/{name} was measured on another file than export/{stage}/{DEPLOYED}"
        for name, found in digests.items()
        if found and exported and found != exported
    )


def _check_campaign(found: Campaign, missing: list[str], told: dict[str, list[str]]) -> None:
    """`told` has the warnings of campaigns, and which gave them."""
    planned = _planned(found.header)
    if planned is not None and len(found.trials) < planned:
        missing.append(f"{found.name}: {planned - len(found.trials)} of {planned} planned trials")
    for text in found.header.warnings:
        told.setdefault(text, []).append(found.name)


def _left_out(recipe: dict[str, Any]) -> set[str]:
    """Training stages that the recipe does not ask for."""
    sections = {name: recipe.get(name) for name in STAGES[1:-1]}
    return {n for n, s in sections.items() if isinstance(s, dict) and s.get("epochs") == 0}


def load(folder: Path) -> Run:
    """A run directory, as far as it is there; InputError when it is none, or a file is broken."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a run directory of `resq-deploy run` expected")
    missing: list[str] = []
    warnings: list[str] = []
    told: dict[str, list[str]] = {}
    left_out: set[str] = set()

    def present(name: str) -> Path | None:
        if (folder / name).is_file():
            return folder / name
        if not left_out.intersection(Path(name).parts):
            missing.append(name)
        return None

    def read(name: str, kind: type[T]) -> T | None:
        path = present(name)
        return None if path is None else _checked(kind, path)

    def read_object(name: str) -> dict[str, Any] | None:
        path = present(name)
        return None if path is None else _object(path)

    def read_campaign(name: str) -> Campaign | None:
        path = present(name)
        if path is None:
            return None
        found = campaign(path, name)
        _check_campaign(found, missing, told)
        return found

    recipe = read_object("recipe.json")
    left_out = _left_out(recipe or {})
    sidecars = {name: read_object(f"{name}/checkpoint.json") for name in CHECKPOINTS}
    stages = {}
    for name in STAGES:
        # Single flips are only promised for the two ends of the pipeline.
        wanted = name in (BASELINE, HARDENED) or (folder / f"prove/{name}/single.store").is_file()
        stages[name] = Stage(
            clean=read(f"prove/{name}/clean.json", Clean),
            ber=read_campaign(f"prove/{name}/ber.store"),
            single=read_campaign(f"prove/{name}/single.store") if wanted else None,
            attack=read(f"prove/{name}/attack.json", Attack),
            manifest=read_object(f"export/{name}/manifest.json"),
        )
        _check_files(name, stages[name], warnings)
    proofs = [p for s in stages.values() for p in (s.clean, s.ber, s.single, s.attack)]
    found: Sequence[object] = [recipe, *sidecars.values(), *proofs]
    if all(part is None for part in found):
        raise InputError(
            f"{folder} holds no run: neither recipe.json nor a checkpoint nor a proof is there; "
            "a directory written by `resq-deploy run` expected"
        )
    return Run(
        recipe=recipe or {},
        stages=stages,
        checkpoints={name: made for name, made in sidecars.items() if made is not None},
        missing=missing,
        warnings=[*warnings, *(f"{', '.join(names)}: {text}" for text, names in told.items())],
    )
