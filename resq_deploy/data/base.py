"""The value that every data set is: images, labels, and a digest of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError
from resq_deploy.seeds import stream

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images and labels, checked once."""

    name: str
    x: NDArray[Any]
    """(N, C, H, W) uint8 pixels; files that are not ours may take any shape and type (N, ...)."""
    y: NDArray[np.int64]
    """(N,) labels, 0 to n_classes - 1."""
    group: NDArray[np.int64] | None = None
    """(N,) number of the group of each image, such as the frames of one sign; a split into
    training and validation images keeps groups whole. None: every image is its own."""

    def __post_init__(self) -> None:
        if self.x.ndim < 2 or self.y.shape != self.x.shape[:1] or len(self.y) == 0:
            raise InputError(
                f"{self.name}: x of shape (N, ...) and y of shape (N,) with N > 0 expected, got "
                f"{self.x.shape} and {self.y.shape}"
            )
        if not np.issubdtype(self.y.dtype, np.integer) or self.y.min() < 0:
            raise InputError(f"{self.name}: y must hold integer labels >= 0, got {self.y.dtype}")
        if np.issubdtype(self.x.dtype, np.floating) and not np.isfinite(self.x).all():
            raise InputError(f"{self.name}: x holds NaN or infinite values")
        if self.group is not None and self.group.shape != self.y.shape:
            raise InputError(
                f"{self.name}: a group for each of the {len(self.y)} images expected, got an array "
                f"of shape {self.group.shape}"
            )

    def __len__(self) -> int:
        return len(self.y)

    @property
    def n_classes(self) -> int:
        return int(self.y.max()) + 1

    def check_labels(self, n_outputs: int) -> None:
        """InputError when a label is beyond the outputs of a model."""
        if self.n_classes > n_outputs:
            raise InputError(
                f"{self.name} has labels up to {self.y.max()}, the model has {n_outputs} outputs"
            )

    @cached_property
    def sha256(self) -> str:
        """Digest of shape, type and bytes of x and y (not of the groups)."""
        digest = hashlib.sha256()
        for array in (self.x, self.y):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def take(self, index: Any) -> Dataset:
        """The images of an index array or slice, in its order."""
        group = None if self.group is None else self.group[index]
        return Dataset(name=self.name, x=self.x[index], y=self.y[index], group=group)

    def first(self, n: int | None) -> Dataset:
        """The first n images (all when n is None); InputError when there are fewer."""
        if n is None:
            return self
        if not 0 < n <= len(self):
            raise InputError(f"{n} images asked for; {self.name} has {len(self)}")
        return self.take(slice(n))


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What a data set source returns. `train` is None where only test images exist."""

    train: Dataset | None
    test: Dataset


def groups(y: NDArray[np.int64], track: NDArray[Any]) -> NDArray[np.int64]:
    """(N,) group numbers from labels and from tracks (N,) that are numbered within a class."""
    pairs = np.stack([y, track.astype(np.int64)])
    return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def hold_out(train: Dataset, fraction: float) -> Splits:
    """Training images divided in two: the rest to train with, `fraction` in the place of the test.

    In every class whole groups are drawn (always the same ones) until at least `fraction` of its
    images, in (0, 1), are held out; one group always stays. Raises InputError when no class has
    two groups.
    """
    group = np.arange(len(train)) if train.group is None else train.group
    held = np.zeros(len(train), bool)
    for label in range(train.n_classes):
        mine = np.flatnonzero(train.y == label)
        names = stream(0, "validation", label).permutation(np.unique(group[mine]))
        for name in names[1:]:
            if held[mine].sum() >= fraction * len(mine):
                break
            held[mine[group[mine] == name]] = True
    if not held.any():
        raise InputError(
            f"{train.name}: no images can be held out; expected a class with two or more groups"
        )
    return Splits(
        train=replace(train.take(~held), name=f"{train.name}/fit"),
        test=replace(train.take(held), name=f"{train.name}/validation"),
    )


def draw(train: Dataset, n: int) -> Dataset:
    """n training images, always the same ones, in the order of the set; InputError for too many.

    Drawn, because some sets come class by class.
    """
    if n > len(train):
        raise InputError(f"train_images {n} asked for; {train.name} has {len(train)}")
    return train.take(np.sort(stream(0, "train_images").permutation(len(train))[:n]))


def as_float(x: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels in [0, 1]: uint8 divided by 255, floating point as it is."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    return x.astype(np.float32)
