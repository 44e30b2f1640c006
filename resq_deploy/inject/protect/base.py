"""The interface of a memory protection, which is also the one that protects nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError
from resq_deploy.inject.space import CHECK, Space, Tensor

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Protection:
    """Check codes over the words of a memory, and what is read when they do not match.

    A word is `word` consecutive bytes of one tensor (the last one of a tensor is filled up with
    zeros that are not stored), with a check code of `check_bits` bits beside it. Contract, tested
    for every protection: a word that no fault struck is read as it was written.
    """

    word: ClassVar[int] = 1
    check_bits: ClassVar[int] = 0
    """0, 1 or 8."""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return "none"

    @property
    def immune(self) -> int:
        """Most significant bits of every element that stand in cells which do not flip."""
        return 0

    def encode(self, words: Bytes) -> Bytes:
        """Check codes (n,) of words (n, word)."""
        return np.zeros(len(words), np.uint8)

    def decode(self, words: Bytes, checks: Bytes) -> Bytes:
        """What is read (n, word) where words (n, word) and check codes (n,) are stored."""
        return words

    def stored(self, space: Space) -> Space:
        """The fault space of the file, and behind it the check codes of every tensor of it.

        InputError when an element of some tensor has too few bits for this protection.
        """
        for tensor in space.tensors:
            if tensor.width < self.immune:
                raise InputError(
                    f"--protect {self.name} given; the elements of {tensor.name} have "
                    f"{tensor.width} bits"
                )
        if not self.check_bits:
            return space
        checks = (
            Tensor(
                name=f"{tensor.name}#check",
                dtype=f"uint{self.check_bits}",
                shape=(-(-tensor.n_bytes // self.word),),
                op_type=tensor.op_type,
                node=tensor.node,
                absorbed=False,
                target=CHECK,
            )
            for tensor in space.tensors
        )
        return Space(tensors=(*space.tensors, *checks))

    def cost(self, stored: Space) -> dict[str, Any]:
        """What the protection takes, in plain values.

        Keys: name, data_bytes (of the file's own tensors), check_bytes (extra memory),
        hardened_bytes (cells among the data that must not flip), overhead (check_bytes /
        data_bytes).
        """
        data = [tensor for tensor in stored.tensors if tensor.target != CHECK]
        checks = [tensor for tensor in stored.tensors if tensor.target == CHECK]
        data_bytes = sum(tensor.n_bytes for tensor in data)
        check_bytes = sum(tensor.n_bytes for tensor in checks)
        return {
            "name": self.name,
            "data_bytes": data_bytes,
            "check_bytes": check_bytes,
            "hardened_bytes": -(-self.immune * sum(tensor.size for tensor in data) // 8),
            "overhead": check_bytes / data_bytes,
        }
