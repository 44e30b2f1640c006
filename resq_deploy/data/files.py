"""Reading what others packed: published digests first, nothing unpacked to disk, sizes bounded."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

from resq_deploy.errors import InputError

LIMIT = 256 * 2**20
"""Bytes that one file of a data set may have; the largest published one has 154 MB (CIFAR-100)."""

_PICKLE_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""What a pickle of plain containers, numbers, text and arrays refers to; nothing that acts."""


def md5(raw: bytes | Path) -> str:
    """Hexadecimal MD5 of bytes, or of a file in pieces."""
    if isinstance(raw, bytes):
        return hashlib.md5(raw, usedforsecurity=False).hexdigest()
    with raw.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_md5(what: str, raw: bytes | Path, expected: str) -> None:
    """InputError unless the MD5 of `raw` is the published one."""
    found = md5(raw)
    if found != expected:
        raise InputError(
            f"{what} has MD5 {found}, the published one is {expected}; it was not opened: fetch "
            "the official archive again"
        )


def read(path: Path) -> bytes:
    """The bytes of a file of at most LIMIT bytes; InputError for a larger one."""
    size = path.stat().st_size
    if size > LIMIT:
        raise InputError(f"{path} has {size} bytes; at most {LIMIT} expected: it is another file")
    return path.read_bytes()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def unpickle(raw: bytes, what: str) -> Any:
    """Value of a pickle (Python 2 text as bytes) made of containers, numbers, text and arrays.

    Anything that names another class or function is refused before it is called: InputError.
    """
    try:
        return _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{what} is not a readable pickle of plain arrays ({error})") from None
