"""CIFAR-10 (Krizhevsky, 2009) from the official python archive or its unpacked folder.

The batches are pickles: each is compared with its published MD5 before it is unpickled,
so that a changed file is never executed.
"""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np

from resq_deploy.data.base import Dataset, Splits
from resq_deploy.errors import InputError

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def _raw(root: Path, name: str) -> bytes:
    for folder in (root / FOLDER, root):
        if (folder / name).is_file():
            return (folder / name).read_bytes()
    if (root / ARCHIVE).is_file():
        try:
            with tarfile.open(root / ARCHIVE) as archive:
                member = archive.extractfile(f"{FOLDER}/{name}")
                if member is not None:
                    return member.read()
        except (tarfile.TarError, KeyError, OSError, EOFError) as error:
            raise InputError(f"{root / ARCHIVE} cannot be read ({error}); fetch it again") from None
    raise InputError(
        f"CIFAR-10 file {name} not found in {root}; expected the folder {FOLDER}/ or the official "
        f"archive {ARCHIVE} there"
    )


def _batch(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    raw = _raw(root, name)
    digest = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if digest != MD5[name]:
        raise InputError(
            f"CIFAR-10 file {name} in {root} has MD5 {digest}, the published one is {MD5[name]}; "
            "it was not opened: fetch the official archive again"
        )
    batch = pickle.loads(raw, encoding="bytes")  # noqa: S301 (digest checked above)
    x = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
    return x, np.asarray(batch[b"labels"], np.int64)


def load(root: Path) -> Splits:
    """50,000 training and 10,000 test images (N, 3, 32, 32) uint8, in the published order."""
    parts = [_batch(root, name) for name in sorted(MD5)]
    train, test = parts[:-1], parts[-1]
    return Splits(
        train=Dataset(
            name="cifar10/train",
            x=np.concatenate([x for x, _ in train]),
            y=np.concatenate([y for _, y in train]),
        ),
        test=Dataset(name="cifar10/test", x=test[0], y=test[1]),
    )
