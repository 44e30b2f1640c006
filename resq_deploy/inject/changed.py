"""What a fault changes in the values between kernels: lists of codes, or whole rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Changed:
    """What is new in a kept value: some images have their changes listed, others whole rows."""

    listed: Images
    """(L,) images with lists, in any order."""
    first: NDArray[np.int64]
    """(L + 1,) where the list of an image begins and ends."""
    places: NDArray[np.int32]
    """Bytes of an image's value, ascending for each image."""
    codes: Bytes
    """The new bytes there."""
    whole: Images
    """(W,) images with rows, in any order."""
    rows: Bytes
    """(W, bytes)"""

    @cached_property
    def images(self) -> Images:
        """(L + W,) all of them, those with lists first."""
        return np.concatenate([self.listed, self.whole])


NO_CHANGE = Changed(
    listed=np.empty(0, np.int64),
    first=np.zeros(1, np.int64),
    places=np.empty(0, np.int32),
    codes=np.empty(0, np.uint8),
    whole=np.empty(0, np.int64),
    rows=np.empty((0, 0), np.uint8),
)


class Output:
    """Where the changes of a value are written; used again by every trial."""

    def __init__(self, n: int, size: int) -> None:
        """Of a value with `size` bytes for each of `n` images."""
        self._n, self._size = n, size
        # Lists of all images together take no more room than their rows would.
        self._most = max(n * size // 5, size)
        self._found, self._first = np.empty(n, np.int64), np.zeros(n + 1, np.int64)
        self._places, self._codes = np.empty(size, np.int32), np.empty(size, np.uint8)
        self._whole, self._rows = np.empty(n, np.int64), np.empty((0, size), np.uint8)
        self.clear()

    def clear(self) -> None:
        self.n_listed = self.n_entries = self.n_whole = 0

    @property
    def lists(self) -> tuple[int, int, Images, NDArray[np.int64], NDArray[np.int32], Bytes]:
        """What kernels append to: listed images and entries so far, and the lists."""
        return (
            self.n_listed, self.n_entries, self._found, self._first, self._places, self._codes,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Entries that the lists have room for."""
        return len(self._places)

    def grow(self) -> bool:
        """More room for lists; False when there is enough already."""
        size = min(self._most, 4 * len(self._places))
        if size == len(self._places):
            return False
        self._places, self._codes = (
            np.concatenate([old, np.empty(size - len(old), old.dtype)])
            for old in (self._places, self._codes)
        )
        return True

    def room(self, n: int) -> tuple[Bytes, Images]:
        """Where the next n rows and the numbers of their images go."""
        end = self.n_whole + n
        if end > len(self._rows):
            rows = np.empty((min(self._n, max(end, 2 * len(self._rows))), self._size), np.uint8)
            rows[: self.n_whole] = self._rows[: self.n_whole]
            self._rows = rows
        return self._rows[self.n_whole : end], self._whole[self.n_whole : end]

    def changed(self) -> Changed:
        return Changed(
            listed=self._found[: self.n_listed],
            first=self._first[: self.n_listed + 1],
            places=self._places[: self.n_entries],
            codes=self._codes[: self.n_entries],
            whole=self._whole[: self.n_whole],
            rows=self._rows[: self.n_whole],
        )
