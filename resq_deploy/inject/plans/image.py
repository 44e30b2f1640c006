"""The plan of one trial in which the memory holds exactly the bytes of a dump."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError
from resq_deploy.inject.faults import SingleFlip
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.plans.base import Plan
from resq_deploy.inject.space import Flat, Space, Tensor
from resq_deploy.memory_map import MemoryMap

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Image(Plan):
    """Trial 0: every bit in which the dump differs from the file is flipped."""

    model = SingleFlip()
    sha256: str
    """Of the dump."""
    masks: dict[str, Bytes]
    """By tensor that differs: its bytes in the dump, exclusive-or those of the file."""
    n_fill_bits: int
    """Bits that differ between the tensors, where nothing is stored."""

    @property
    def fault(self) -> str:
        return "image"

    def trials(self) -> Sequence[int]:
        return (0,)

    def cells(self, trial: int, space: Space, seed: int) -> Flat:
        found = [
            int(start) + _positions(self.masks[tensor.name], tensor)
            for start, tensor in zip(space.starts, space.tensors, strict=False)
            if tensor.name in self.masks
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def differences(self, space: Space) -> list[dict[str, Any]]:
        """The tensors that differ, with the number of their bytes and bits that do."""
        return [
            {
                "tensor": tensor.name,
                "n_bytes": tensor.n_bytes,
                "n_bits_differ": len(_positions(self.masks[tensor.name], tensor)),
                "n_bytes_differ": int(np.count_nonzero(self.masks[tensor.name])),
            }
            for tensor in space.tensors
            if tensor.name in self.masks
        ]

    def describe(self) -> dict[str, Any]:
        packed = {
            name: base64.b64encode(zlib.compress(mask.tobytes())).decode()
            for name, mask in self.masks.items()
        }
        return {
            "kind": "image",
            "sha256": self.sha256,
            "n_fill_bits": self.n_fill_bits,
            "masks": packed,
        }

    @classmethod
    def restore(cls, *, sha256: str, n_fill_bits: int, masks: dict[str, str]) -> Image:
        """The plan that `describe` described."""
        unpacked = {
            name: np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
            for name, text in masks.items()
        }
        return cls(sha256=sha256, n_fill_bits=n_fill_bits, masks=unpacked)


def _positions(mask: Bytes, tensor: Tensor) -> Flat:
    """Bits of a tensor that differ; the unused half of a last byte does not count."""
    positions = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
    return positions[positions < tensor.n_bits].astype(np.int64)


def read_image(path: Path, mapped: MemoryMap, memory: Memory) -> Image:
    """The plan of a dump of `weights.bin`, as `mapped` describes it.

    `memory` holds the tensors of the file. InputError for a dump of another length, and for a map
    that does not fit the file's tensors.
    """
    try:
        dump = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); a dump expected") from None
    if dump.size != mapped.bytes:
        raise InputError(
            f"{path} has {dump.size} bytes; the map describes {mapped.bytes}: dump all of the "
            "array resq_model_weights, and nothing else"
        )
    contents = {
        tensor.name: content
        for tensor, content in zip(memory.space.tensors, memory.contents, strict=False)
    }
    filled, masks = dump.copy(), {}
    for stored in mapped.tensors:
        content = contents.get(stored.name)
        if content is None or hashlib.sha256(content.tobytes()).hexdigest() != stored.sha256:
            raise InputError(
                f"the map has a tensor {stored.name!r} that the model does not hold with these "
                "bytes; give the map that was exported with the model"
            )
        part = slice(stored.address, stored.address + stored.bytes)
        filled[part] = 0
        mask = dump[part] ^ content
        if mask.any():
            masks[stored.name] = mask
    return Image(
        sha256=hashlib.sha256(dump.tobytes()).hexdigest(),
        masks=masks,
        n_fill_bits=int(np.bitwise_count(filled).sum()),
    )
