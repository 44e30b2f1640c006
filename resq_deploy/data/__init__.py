"""Data sets as numpy arrays: uint8 pixels (N, C, H, W), or whatever a file's own input is.

A new data set is one module here with a `load` for one split and one row in `SOURCES`.
Nothing is ever downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from resq_deploy.data import cifar, digits, gtsrb, imagefolder, npz
from resq_deploy.data.base import Dataset, Split, Splits, draw, hold_out
from resq_deploy.errors import InputError

if TYPE_CHECKING:  # a campaign loads data without recipes, whose library it need not load
    from resq_deploy import recipe

ROOT_VARIABLE = "RESQ_DATA"


@dataclass(frozen=True)
class Source:
    """A named data set."""

    load: Callable[[Path, Split, int | None], Dataset]
    """One split from (root, split, size)."""
    md5: dict[str, str] = field(default_factory=dict)
    """Published MD5 of its files, by name relative to `root`."""
    needs_root: bool = True
    resizes: bool = False
    """Whether `size` has a meaning."""


def _cifar(published: cifar.Published) -> Source:
    return Source(
        load=lambda root, split, size: cifar.load(published, root, split), md5=published.files
    )


SOURCES: dict[str, Source] = {
    "digits": Source(load=lambda root, split, size: digits.load(split), needs_root=False),
    "cifar10": _cifar(cifar.CIFAR10),
    "cifar100": _cifar(cifar.CIFAR100),
    "gtsrb": Source(load=gtsrb.load, md5=gtsrb.MD5, resizes=True),
    "gtsrb-roi": Source(
        load=lambda root, split, size: gtsrb.load(root, split, size, roi=True),
        md5=gtsrb.MD5,
        resizes=True,
    ),
    "imagefolder": Source(load=imagefolder.load, resizes=True),
}


def folder(root: Path | None) -> Path | None:
    """The data folder: `root`, else what RESQ_DATA names, else None."""
    return root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)


def _need(root: Path | None, name: str) -> Path:
    given = folder(root)
    if given is None:
        raise InputError(
            f"no folder given for data set {name!r}; set `root` under [data] in the recipe, or "
            f"the environment variable {ROOT_VARIABLE}, to the folder that holds it"
        )
    if not given.is_dir():
        raise InputError(f"data folder {given} for {name!r} does not exist or is not a folder")
    return given


def npz_path(name: str, root: Path | None) -> Path:
    """The path `name` of an .npz, or where it lies in the data folder."""
    given = folder(root)
    if given is not None and not Path(name).exists() and (given / name).exists():
        return given / name
    return Path(name)


def source(name: str) -> Source:
    """The row of `SOURCES`; InputError lists the names there are."""
    if name not in SOURCES:
        raise InputError(
            f"data set {name!r} is unknown; expected one of {', '.join(sorted(SOURCES))}, or the "
            "path of an .npz file with x and y"
        )
    return SOURCES[name]


def load_split(name: str, root: Path | None, split: Split, size: int | None = None) -> Dataset:
    """One split of a named data set, or an `.npz`; the files of the other need not exist.

    `name` is a key of `SOURCES` or the path of an `.npz` with `x` and `y` (see `npz.load`); a
    relative path that does not exist is looked for under `root` too. `root` falls back to the
    environment variable RESQ_DATA. `size`, in pixels, resizes the images of the sets that come in
    several sizes. Raises InputError when the name is unknown, or the files are missing or are not
    the published ones.
    """
    if name.endswith(".npz"):
        found, resizes = npz.load(npz_path(name, root)), False
    else:
        known = source(name)
        resizes = known.resizes
        at = _need(root, name) if known.needs_root else Path()
        found = known.load(at, split, size)
    if size is not None and not resizes:
        able = ", ".join(n for n, s in SOURCES.items() if s.resizes)
        raise InputError(f"size {size} given for data set {name!r}; it resizes {able} only")
    return found


def load_test(name: str, root: Path | None = None) -> Dataset:
    """The test images of a data set, by name and folder; see `load_split`."""
    return load_split(name, root, "test")


def load(
    name: str,
    root: Path | None = None,
    *,
    train: str | None = None,
    test: str | None = None,
    size: int | None = None,
    validation: float = 0.0,
    train_images: int | None = None,
) -> Splits:
    """Training and test split; `name`, `root` and `size` as in `load_split`.

    `train` and `test`, paths of `.npz` files, take the place of the set's own splits. A set that
    is one `.npz` has test images only, unless `train` is given. `validation` above 0 holds out
    that fraction of the training images, which take the place of the test images (`hold_out`).
    `train_images` of the rest are kept, a fixed draw (`base.draw`).
    """
    if train is not None:
        training: Dataset | None = load_split(train, root, "train")
    else:
        training = None if name.endswith(".npz") else load_split(name, root, "train", size)
    if validation > 0 and training is not None:
        splits = hold_out(training, validation)
    elif test is not None:
        splits = Splits(train=training, test=load_split(test, root, "test"))
    else:
        splits = Splits(train=training, test=load_split(name, root, "test", size))
    if train_images is None or splits.train is None:
        return splits
    return replace(splits, train=draw(splits.train, train_images))


def of(config: recipe.Data) -> Splits:
    """The splits that the section [data] of a recipe asks for."""
    return load(
        config.name, config.root, train=config.train, test=config.test, size=config.size,
        validation=config.validation, train_images=config.train_images,
    )  # fmt: skip


__all__ = ["ROOT_VARIABLE", "SOURCES", "Dataset", "Split", "Splits", "load", "load_test", "of"]
