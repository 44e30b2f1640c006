"""The value that every data set is: images, labels, and a digest of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images and labels, checked once."""

    name: str
    x: NDArray[Any]
    """(N, C, H, W) uint8 pixels; files that are not ours may take any shape and type (N, ...)."""
    y: NDArray[np.int64]
    """(N,) labels, 0 to n_classes - 1."""

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

    def __len__(self) -> int:
        return len(self.y)

    @property
    def n_classes(self) -> int:
        return int(self.y.max()) + 1

    @cached_property
    def sha256(self) -> str:
        """Digest of shape, type and bytes of x and y."""
        digest = hashlib.sha256()
        for array in (self.x, self.y):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def take(self, index: Any) -> Dataset:
        """The images of an index array or slice, in its order."""
        return Dataset(name=self.name, x=self.x[index], y=self.y[index])

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


def as_float(x: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels in [0, 1]: uint8 divided by 255, floating point as it is."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    return x.astype(np.float32)
