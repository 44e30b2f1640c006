"""Any `.npz` with `x` and `y`; read without pickle, so a hostile file cannot run code."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from resq_deploy.data.base import Dataset, groups
from resq_deploy.errors import InputError


def load(path: Path) -> Dataset:
    """`x` (N, ...) and `y` (N,) integer; pixels uint8, or float32 in [0, 1] for our networks.

    `track` (N,) integer, where it is there, numbers within a class the images that belong
    together (`Dataset.group`). Raises InputError for anything else.
    """
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds one bare array; expected an .npz with x and y")
        with opened as file:
            missing = {"x", "y"} - set(file.files)
            if missing:
                raise InputError(
                    f"{path} holds {', '.join(file.files)}; expected the arrays x and y"
                )
            x, y = file["x"], file["y"]
            track = file["track"] if "track" in file.files else None
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,  # a damaged header may ask for any amount
        RuntimeError,  # encrypted members and unknown compression
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{path} cannot be read as .npz ({error}); expected x and y") from None
    if x.dtype.kind not in "biuf":
        raise InputError(f"{path}: x must hold numbers, got {x.dtype}")
    if not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{path}: y must hold integer labels, got {y.dtype}")
    group = None
    if track is not None:
        if not np.issubdtype(track.dtype, np.integer) or track.shape != y.shape:
            raise InputError(
                f"{path}: track must hold an integer for each of the {len(y)} images, got "
                f"{track.dtype} of shape {track.shape}"
            )
        group = groups(y, track)
    return Dataset(name=path.stem, x=x, y=y.astype(np.int64), group=group)
