"""The fault space of an ONNX file: the stored bits of its weights, numbered from 0.

`discovery` says which of a file's tensors stand in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import bits
from resq_deploy.errors import InputError
from resq_deploy.records import Site

Flat = NDArray[np.int64]

TARGETS = ("weight", "bias", "scale", "zero-point", "float")
"""What of a file may be hit; the first is the default."""

ACTIVATION = "activation"
"""One target more: the 8-bit values between the kernels, which no file stores."""

CHECK = "check"
"""In place of a target: check codes that a memory protection adds."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One initializer of the fault space, or one value between kernels for one image."""

    name: str
    dtype: str
    """Stored type: `int8`, `uint8`, `int4`, `uint4`, `int32`, `float32`, `float16`; `uint1` for
    check bits."""
    shape: tuple[int, ...]
    op_type: str
    """Operator that computes with it; behind DequantizeLinear and changes of layout."""
    node: str
    """Name of that node, or of its first output where it has none."""
    absorbed: bool
    """A Clip stands between the initializer and that operator, and may undo a flip."""
    target: str = "weight"
    """One of TARGETS, ACTIVATION, or CHECK."""
    axis: int | None = None
    """Axis of the output channels of a weight; None where it has none that we know."""

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def width(self) -> int:
        """Stored bits of an element."""
        return bits.width(self.dtype)

    @property
    def n_bits(self) -> int:
        return self.size * self.width

    @property
    def n_bytes(self) -> int:
        """Stored bytes; the last one may be half used."""
        return -(-self.n_bits // 8)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived `n_bits`."""
        return {**vars(self), "shape": list(self.shape), "n_bits": self.n_bits}


@dataclass(frozen=True, kw_only=True)
class Space:
    """Tensors in the order of the network; the bits of all of them numbered through.

    Flat bit index = bits of the tensors before + offset * width + bit.
    """

    tensors: tuple[Tensor, ...]

    @cached_property
    def starts(self) -> Flat:
        """First flat bit index of every tensor, and the number of bits at the end."""
        sizes = [tensor.n_bits for tensor in self.tensors]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @property
    def n_bits(self) -> int:
        return int(self.starts[-1])

    def split(self, flat: Flat) -> dict[int, tuple[Flat, Flat]]:
        """Element offsets and bits of flat bit indices, by index of the tensor they hit."""
        flat = np.asarray(flat, np.int64)
        if flat.size and (flat.min() < 0 or flat.max() >= self.n_bits):
            raise InputError(f"bit outside of [0, {self.n_bits}) given")
        owner = np.searchsorted(self.starts, flat, side="right") - 1
        parts = {}
        for index in np.unique(owner).tolist():
            inside = flat[owner == index] - self.starts[index]
            offset, bit = np.divmod(inside, self.tensors[index].width)
            parts[index] = (offset, bit)
        return parts

    def sites(self, flat: Flat) -> list[Site]:
        """The sites of flat bit indices, in ascending order."""
        return [
            Site(tensor=self.tensors[index].name, offset=offset, bit=bit)
            for index, (offsets, bits_) in self.split(np.sort(flat)).items()
            for offset, bit in zip(offsets.tolist(), bits_.tolist(), strict=True)
        ]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {tensor.name: index for index, tensor in enumerate(self.tensors)}

    def index(self, name: str) -> int:
        """Index of a tensor; InputError when there is none of that name."""
        if name not in self._indices:
            names = ", ".join(self._indices)
            raise InputError(f"no tensor {name!r} in the fault space; it has {names}")
        return self._indices[name]

    def flat(self, site: Site) -> int:
        """Flat bit index of a site; InputError when this file has no such bit."""
        index = self.index(site.tensor)
        tensor = self.tensors[index]
        if site.offset >= tensor.size or site.bit >= tensor.width:
            raise InputError(
                f"{tensor.name} has the offsets 0 to {tensor.size - 1} and the bits 0 to "
                f"{tensor.width - 1}, got offset {site.offset}, bit {site.bit}"
            )
        return int(self.starts[index]) + site.offset * tensor.width + site.bit

    def to_json(self) -> list[dict[str, Any]]:
        return [tensor.to_json() for tensor in self.tensors]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> Space:
        """The space that `to_json` wrote."""
        kept = [{k: v for k, v in row.items() if k != "n_bits"} for row in rows]
        return cls(tensors=tuple(Tensor(**{**k, "shape": tuple(k["shape"])}) for k in kept))
