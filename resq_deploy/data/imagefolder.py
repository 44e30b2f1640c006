"""A folder of images: ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png (or ROOT/val)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resq_deploy.data import files, pictures
from resq_deploy.data.base import Dataset, Split
from resq_deploy.errors import InputError

SUFFIXES = (".png", ".ppm", ".jpg", ".jpeg", ".bmp")
FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _folder(root: Path, split: Split) -> Path | None:
    return next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)


def load(root: Path, split: Split, size: int | None = None) -> Dataset:
    """One split, (N, 3, H, W) uint8; labels number the class folders in the order of their names.

    With `size` images are resized to size x size pixels, without it they must all have the same
    size. Raises InputError for missing folders, classes that differ between the splits, broken
    images, and images of different sizes.
    """
    folder = _folder(root, split)
    wanted = " or ".join(f"{name}/CLASS/*.png" for name in FOLDERS[split])
    if folder is None:
        raise InputError(f"image folder {root} has no {split} images; expected {wanted} in it")
    classes = _classes(folder)
    other = _folder(root, "test" if split == "train" else "train")
    if other is not None and _classes(other) != classes:
        odd = sorted(set(classes) ^ set(_classes(other)))
        raise InputError(
            f"{folder} and {other} have different classes ({', '.join(odd[:3])} in one only); "
            "expected the same class folders in both"
        )
    x: list[NDArray[np.uint8]] = []
    y: list[int] = []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            image = pictures.decode(files.read(path), str(path), size=size)
            if x and image.shape != x[0].shape:
                (_, h, w), (_, first_h, first_w) = image.shape, x[0].shape
                raise InputError(
                    f"{path} has {w} x {h} pixels, the images before it {first_w} x {first_h}; "
                    "expected one size: set `size` under [data] in the recipe to resize"
                )
            x.append(image)
            y.append(label)
    if not x:
        raise InputError(f"image folder {folder} holds no images; expected {wanted} in {root}")
    return Dataset(name=f"{root.name}/{split}", x=np.stack(x), y=np.asarray(y, np.int64))
