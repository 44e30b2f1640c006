"""What a data folder holds: files with their digests, splits, and the first problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import data
from resq_deploy.data import files
from resq_deploy.data.base import Dataset, Split
from resq_deploy.errors import InputError

SPLITS: tuple[Split, ...] = ("train", "test")


def _facts(found: Dataset) -> dict[str, Any]:
    counts = np.bincount(found.y)
    return {
        "n_images": len(found),
        "n_classes": int((counts > 0).sum()),
        "fewest_of_a_class": int(counts[counts > 0].min()),
        "most_of_a_class": int(counts.max()),
        "n_groups": None if found.group is None else len(np.unique(found.group)),
        "shape": list(found.x.shape[1:]),
        "dtype": str(found.x.dtype),
        "sha256": found.sha256,
    }


def _files(name: str, root: Path | None) -> list[dict[str, Any]]:
    """The files with a published digest that are there; an .npz has none."""
    given = data.folder(root)
    rows: list[tuple[str, Path, str | None]] = []
    if name.endswith(".npz"):
        path = data.npz_path(name, root)
        rows = [(path.name, path, None)]
    elif given is not None:
        rows = [(file, given / file, md5) for file, md5 in data.source(name).md5.items()]
    found = []
    for file, path, published in rows:
        if path.is_file():
            md5 = files.md5(path)
            ok = None if published is None else md5 == published
            found.append({"file": file, "md5": md5, "published_md5": published, "ok": ok})
    return found


def check(name: str, root: Path | None = None, size: int | None = None) -> dict[str, Any]:
    """Look at a data set without using it: {name, root, files, splits, problem}.

    `files`: those with a published MD5 that lie in the folder, each {file, md5, published_md5,
    ok}. `splits`: n_images, n_classes, shape (C, H, W), dtype, sha256 ... of what could be read.
    `problem`: the first thing that keeps a split from being used, in one line, or None. Raises
    InputError for an unknown name only.
    """
    if not name.endswith(".npz"):
        data.source(name)
    given = data.folder(root)
    found: dict[str, Any] = {
        "name": name,
        "root": None if given is None else str(given),
        "files": _files(name, root),
        "splits": {},
        "problem": None,
    }
    for split in SPLITS:
        if split == "train" and name.endswith(".npz"):
            continue
        try:
            found["splits"][split] = _facts(data.load_split(name, root, split, size))
        except InputError as error:
            found["problem"] = found["problem"] or str(error)
    return found
