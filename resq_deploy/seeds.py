"""Named random streams of one root seed.

Trial 7 draws the same numbers alone, in parallel, or after a resume, because its
stream is named by what it is ("trial", 7) and not by when it is drawn.
"""

from __future__ import annotations

import zlib

import numpy as np

from resq_deploy.errors import InputError


def _key(name: str | int) -> int:
    return zlib.crc32(name.encode()) if isinstance(name, str) else int(name)


def sequence(root: int, *name: str | int) -> np.random.SeedSequence:
    """The seed sequence of the stream `name` under the root seed `root`; InputError below 0."""
    if root < 0:
        raise InputError(f"seed must be at least 0, got {root}")
    return np.random.SeedSequence(entropy=root, spawn_key=tuple(_key(part) for part in name))


def stream(root: int, *name: str | int) -> np.random.Generator:
    """An independent generator for the stream `name` (strings and integers >= 0).

    >>> bool(stream(1, "trial", 7).random() == stream(1, "trial", 7).random())
    True
    """
    return np.random.default_rng(sequence(root, *name))


def integer(root: int, *name: str | int) -> int:
    """A 63-bit seed for libraries that take one integer (torch.Generator.manual_seed)."""
    return int(sequence(root, *name).generate_state(1, np.uint64)[0] >> 1)
