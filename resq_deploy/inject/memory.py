"""The memory that holds a file's tensors: what is stored, and what is read after bits flipped.

Values between the kernels (activations) stand behind them in the same space; what they hold depends
on the image, so that only the flips are known.

A fault strikes *stored* bits, check bits of a protection included. The network computes with
what is *read*, which the protection decides. Engines know nothing of either: they take a
`Change`, the elements that are read differently, or `Flips` of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy import bits
from resq_deploy.errors import InputError
from resq_deploy.inject import protect
from resq_deploy.inject.discovery import Discovery
from resq_deploy.inject.protect import Protection
from resq_deploy.inject.space import ACTIVATION, Flat, Space, Tensor

Change = dict[str, tuple[NDArray[np.int64], NDArray[Any]]]
"""By initializer: offsets (n,) of the elements that are read differently from what the file
holds (C order, ascending, distinct, n > 0) and the n values read there, in the tensor's own
numpy type (int4 as int8 in [-8, 7], uint4 as uint8 in [0, 15]). Others read as they are. By
activation: its `Flips`."""


class Flips(NamedTuple):
    """The entry of an activation in a Change: bits that flip in the value of every image."""

    offsets: NDArray[np.int64]
    """(n,) elements of the value of one image (C order, ascending, distinct, n > 0)."""
    masks: NDArray[np.uint8]
    """(n,) what is read there: what the kernel wrote, exclusive-or these."""

    def dense(self, tensor: Tensor) -> NDArray[Any]:
        """The masks in the shape and type of `tensor`, 0 where nothing flips."""
        found = np.zeros(tensor.shape, np.uint8)
        found.reshape(-1)[self.offsets] = self.masks
        return found.view(tensor.dtype)


Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """Stored tensors behind a protection.

    Bits are numbered by `space`: first those of the file's tensors, then those of the check
    tensors that the protection adds, one for each tensor.
    """

    space: Space
    """All that is stored, check tensors included: what faults are drawn from."""
    contents: tuple[Bytes, ...]
    """The bytes of the file's own tensors, as their `raw_data` has them."""
    protection: Protection

    @classmethod
    def of(cls, found: Discovery, protection: str = "none") -> Memory:
        """The memory of a model that `discovery.discover` has prepared.

        `protection` as on the command line; InputError when it does not exist or does not fit.
        """
        guard = protect.parse(protection)
        files = [tensor for tensor in found.space.tensors if tensor.target != ACTIVATION]
        if guard.name != "none" and len(files) < len(found.space.tensors):
            raise InputError(
                f"--protect {guard.name} with --target {ACTIVATION} given; protections stand in "
                "front of what a file stores, not of values between kernels"
            )
        stored = {proto.name: proto.raw_data for proto in found.model.graph.initializer}
        return cls(
            space=guard.stored(found.space),
            contents=tuple(np.frombuffer(stored[tensor.name], np.uint8) for tensor in files),
            protection=guard,
        )

    @property
    def n_bits(self) -> int:
        """Stored bits, check bits included."""
        return self.space.n_bits

    def bits(self, flat: Flat) -> NDArray[np.uint8]:
        """The stored values, 0 or 1, of flat bit indices (n,), in their order.

        InputError for bits of activations, which depend on the image.
        """
        flat = np.asarray(flat, np.int64)
        order = np.argsort(flat, kind="stable")
        found = [
            self._stored(index, offsets * self.space.tensors[index].width + positions)
            for index, (offsets, positions) in self.space.split(flat[order]).items()
        ]
        values = np.empty(len(flat), np.uint8)
        values[order] = np.concatenate(found) if found else np.empty(0, np.uint8)
        return values

    def _stored(self, index: int, positions: Flat) -> NDArray[np.uint8]:
        """Values of the bits `positions` (counted within the tensor) of a stored tensor."""
        if self.space.tensors[index].target == ACTIVATION:
            name = self.space.tensors[index].name
            raise InputError(f"what {name} holds depends on the image; faults that flip expected")
        if index < len(self.contents):
            codes = self.contents[index][positions // 8]
            return _bit(codes, positions % 8)
        width = self.space.tensors[index].width
        words = self._words(index - len(self.contents), positions // width)
        return _bit(self.protection.encode(words), positions % width)

    def _words(self, index: int, words: Flat) -> Bytes:
        """Words (n, protection.word) of a tensor, what is behind its end filled with zeros."""
        raw = self.contents[index]
        where = words[:, None] * self.protection.word + np.arange(self.protection.word)
        return np.where(where < raw.size, raw[np.minimum(where, raw.size - 1)], np.uint8(0))

    def read(self, flips: Flat) -> Change:
        """What is read differently once the stored bits `flips` (distinct) are inverted."""
        n = len(self.contents)
        none = (np.empty(0, np.int64), np.empty(0, np.int64))
        parts = self.space.split(flips)
        struck = {
            index: parts.pop(index)
            for index in list(parts)
            if self.space.tensors[index].target == ACTIVATION
        }
        change: Change = {}
        for index in sorted({index % n for index in parts}):
            tensor = self.space.tensors[index]
            offset, bit = parts.get(index, none)
            vulnerable = bit < tensor.width - self.protection.immune
            data = (offset * tensor.width + bit)[vulnerable]
            word, check_bit = parts.get(n + index, none)
            where, values = self._decode(index, data, word, check_bit)
            offsets, elements = _elements(tensor, self.contents[index], where, values)
            if len(offsets):
                change[tensor.name] = (offsets, elements)
        for index, (offset, bit) in struck.items():
            offsets, place = np.unique(offset, return_inverse=True)
            masks = np.zeros(len(offsets), np.uint8)
            np.bitwise_xor.at(masks, place, _masks(bit))
            change[self.space.tensors[index].name] = Flips(offsets, masks)
        return change

    def _decode(
        self, index: int, data: Flat, word: Flat, check_bit: Flat
    ) -> tuple[Flat, NDArray[np.uint8]]:
        """Bytes (ascending) that are read differently, and their values.

        `data` are bits within the tensor; bit `check_bit` of the check code of `word` flips too.
        """
        size = self.protection.word
        words = np.unique(np.concatenate([data // (8 * size), word]))
        before = self._words(index, words)
        faulty = before.copy()
        row = np.searchsorted(words, data // (8 * size))
        np.bitwise_xor.at(faulty, (row, data // 8 % size), _masks(data % 8))
        check = self.protection.encode(before)
        np.bitwise_xor.at(check, np.searchsorted(words, word), _masks(check_bit))
        after = self.protection.decode(faulty, check)
        row, column = np.nonzero(after != before)
        where = words[row] * size + column
        inside = where < self.contents[index].size
        return where[inside], after[row, column][inside]


def _bit(codes: Bytes, positions: Flat) -> NDArray[np.uint8]:
    return (codes >> positions.astype(np.uint8)) & np.uint8(1)


def _masks(positions: Flat) -> NDArray[np.uint8]:
    return np.left_shift(1, positions).astype(np.uint8)


def _elements(
    tensor: Tensor, raw: Bytes, where: Flat, values: NDArray[np.uint8]
) -> tuple[Flat, NDArray[Any]]:
    """Offsets and values of the elements in the changed bytes `where` of a tensor."""
    if tensor.width < 8:
        both = np.stack([values & 15, values >> 4], axis=1)
        codes, before = both.reshape(-1), np.stack([raw[where] & 15, raw[where] >> 4], axis=1)
        offsets: Flat = (where[:, None] * 2 + np.arange(2)).reshape(-1)
        kept = (codes != before.reshape(-1)) & (offsets < tensor.size)
        return offsets[kept], bits.from_nibbles(codes[kept], tensor.dtype)
    size = tensor.width // 8
    offsets = np.unique(where // size)
    elements = raw.reshape(-1, size)[offsets]
    elements[np.searchsorted(offsets, where // size), where % size] = values
    found: NDArray[Any] = elements.reshape(-1).view(tensor.dtype)
    return offsets, found


def write(proto: onnx.TensorProto, dtype: str, offsets: Flat, values: NDArray[Any]) -> None:
    """Write elements into the `raw_data` of an initializer of the type `dtype`, as stored."""
    raw = np.frombuffer(proto.raw_data, np.uint8).copy()
    if bits.width(dtype) < 8:
        codes = bits.unpack(raw, 2 * raw.size, dtype)
        codes[offsets] = values
        proto.raw_data = bits.pack(codes).tobytes()
        return
    raw.view(dtype)[offsets] = values
    proto.raw_data = raw.tobytes()


def stored(found: Discovery, change: Change) -> Discovery:
    """The same file, storing the values of `change` (no `Flips`) for good."""
    model, dtypes = onnx.ModelProto(), {tensor.name: tensor.dtype for tensor in found.space.tensors}
    model.CopyFrom(found.model)
    for proto in model.graph.initializer:
        if proto.name in change:
            write(proto, dtypes[proto.name], *change[proto.name])
    return replace(found, model=model)
