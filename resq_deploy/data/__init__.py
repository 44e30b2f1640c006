"""Data sets as numpy arrays: uint8 pixels (N, C, H, W), or whatever a file's own input is.

A new data set is one module here with a `load(root)` and one row in `SOURCES`.
Nothing is ever downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from resq_deploy.data.base import Dataset, Splits
from resq_deploy.errors import InputError

ROOT_VARIABLE = "RESQ_DATA"


def _digits(root: Path | None) -> Splits:
    from resq_deploy.data import digits

    return digits.load()


def _cifar10(root: Path | None) -> Splits:
    from resq_deploy.data import cifar10

    return cifar10.load(_need(root, "cifar10"))


SOURCES: dict[str, Callable[[Path | None], Splits]] = {"digits": _digits, "cifar10": _cifar10}


def _need(root: Path | None, name: str) -> Path:
    given = root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    if given is None:
        raise InputError(
            f"no folder given for data set {name!r}; set `root` under [data] in the recipe, or "
            f"the environment variable {ROOT_VARIABLE}, to the folder that holds it"
        )
    if not given.is_dir():
        raise InputError(f"data folder {given} for {name!r} does not exist or is not a folder")
    return given


def load(name: str, root: Path | None = None) -> Splits:
    """Training and test split of a named data set, or of a folder-less `.npz` (test only).

    `name` is a key of `SOURCES` or the path of an `.npz` with `x` and `y` (see `npz.load`).
    `root` falls back to the environment variable RESQ_DATA. Raises InputError when the name
    is unknown, or the files are missing or are not the published ones.
    """
    if name.endswith(".npz"):
        from resq_deploy.data import npz

        return Splits(train=None, test=npz.load(Path(name)))
    if name not in SOURCES:
        raise InputError(
            f"data set {name!r} is unknown; expected one of {', '.join(sorted(SOURCES))}, or the "
            "path of an .npz file with x and y"
        )
    return SOURCES[name](root)


__all__ = ["ROOT_VARIABLE", "SOURCES", "Dataset", "Splits", "load"]
