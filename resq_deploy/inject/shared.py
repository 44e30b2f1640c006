"""Golden data in one place that several processes map: nothing is copied, nothing goes to disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError
from resq_deploy.inject.network import Kept

Array = NDArray[Any]

ALIGN = 64


@dataclass(frozen=True)
class Place:
    """One array in a shared file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Handle:
    """What another process needs to open a golden run."""

    path: str
    n: int
    output: Array
    values: dict[str, Place]
    sums: dict[int, Place]
    inputs_by_channel: dict[int, Place]
    sums_by_channel: dict[int, Place]

    def open(self) -> Kept:
        """The golden run, mapped read-only."""
        return Kept(
            n=self.n,
            output=self.output,
            values=self._open(self.values),
            sums=self._open(self.sums),
            inputs_by_channel=self._open(self.inputs_by_channel),
            sums_by_channel=self._open(self.sums_by_channel),
        )

    def _open(self, places: dict[Any, Place]) -> dict[Any, Array]:
        return {key: _map(self.path, place, "r") for key, place in places.items()}


class Shared:
    """Arrays in a file of memory without a name: gone when the processes are, however they end."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("golden"), "w+b")
        self._end = 0
        self._places: dict[int, Place] = {}

    @property
    def path(self) -> str:
        """How this and other processes open the file."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array in the file; InputError when there is no room for it."""
        place = Place(offset=self._end, shape=shape, dtype=np.dtype(dtype).str)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._end += -(-size // ALIGN) * ALIGN
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(self._end, 1))
        except OSError as error:
            raise InputError(
                f"the golden data ({self._end} bytes so far) do not fit into memory "
                f"({error.strerror}); give a smaller --memory or --workers 1"
            ) from None
        array = _map(self.path, place, "r+")
        self._places[id(array)] = place
        return array

    def handle(self, kept: Kept) -> Handle:
        """The description of a golden run whose arrays were allocated here."""
        return Handle(
            path=self.path,
            n=kept.n,
            output=kept.output,
            values=self._found(kept.values),
            sums=self._found(kept.sums),
            inputs_by_channel=self._found(kept.inputs_by_channel),
            sums_by_channel=self._found(kept.sums_by_channel),
        )

    def _found(self, arrays: Mapping[Any, Array]) -> dict[Any, Place]:
        return {key: self._places[id(array)] for key, array in arrays.items()}

    def close(self) -> None:
        """Give the room back once no process maps it any more."""
        self._file.close()


def _map(path: str, place: Place, mode: Any) -> Array:
    if 0 in place.shape:
        return np.empty(place.shape, place.dtype)
    return np.memmap(path, place.dtype, mode, place.offset, place.shape)
