"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the official python archives or unpacked folders.

The files are pickles. An archive, and each file in it or in the folder, is compared with its
published MD5 before it is opened; then only plain arrays are unpickled. The digests are those
of the authors' page (archives) and of torchvision's sources (files).
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resq_deploy.data import files
from resq_deploy.data.base import Dataset, Split
from resq_deploy.errors import InputError


@dataclass(frozen=True)
class Published:
    """What the authors published: one archive with one folder of pickles."""

    name: str
    title: str
    archive: str
    archive_md5: str
    folder: str
    md5: dict[Split, dict[str, str]]
    """Files of each split, in their published order, with their MD5."""
    labels: bytes
    n_classes: int

    @property
    def files(self) -> dict[str, str]:
        """MD5 of the archive and of every file in the folder, by name."""
        inside = {f"{self.folder}/{n}": m for part in self.md5.values() for n, m in part.items()}
        return {self.archive: self.archive_md5} | inside


CIFAR10 = Published(
    name="cifar10",
    title="CIFAR-10",
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    md5={
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    labels=b"labels",
    n_classes=10,
)
CIFAR100 = Published(
    name="cifar100",
    title="CIFAR-100",
    archive="cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    md5={
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    labels=b"fine_labels",
    n_classes=100,
)


def _from_archive(path: Path, published: Published, names: list[str]) -> dict[str, bytes]:
    files.check_md5(f"{published.title} archive {path}", path, published.archive_md5)
    wanted = {f"{published.folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in wanted and member.isreg() and member.size <= files.LIMIT:
                    opened = archive.extractfile(member)
                    assert opened is not None
                    found[wanted[member.name]] = opened.read()
                    if len(found) == len(wanted):
                        break
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None
    return found


def _raw(root: Path, published: Published, names: list[str]) -> dict[str, bytes]:
    """The bytes of the files called `names`, from the first place that has one of them."""
    for folder in (root / published.folder, root):
        found = {n: files.read(folder / n) for n in names if (folder / n).is_file()}
        if found:
            break
    else:
        archive = root / published.archive
        found = _from_archive(archive, published, names) if archive.is_file() else {}
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"{published.title} file {missing[0]} not found in {root}; expected the folder "
            f"{published.folder}/ or the official archive {published.archive} there"
        )
    return found


def _batch(raw: bytes, published: Published, what: str) -> tuple[NDArray[np.uint8], list[int]]:
    batch = files.unpickle(raw, what)
    try:
        x, y = batch[b"data"], batch[published.labels]
        if x.dtype != np.uint8 or x.ndim != 2 or x.shape != (len(y), 3 * 32 * 32):
            raise ValueError(f"data of shape {x.shape} and type {x.dtype}")
        if not all(isinstance(label, int) and 0 <= label < published.n_classes for label in y):
            raise ValueError("labels out of range")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{what} does not hold uint8 rows of 3,072 pixels and "
            f"{published.labels.decode()} 0 to {published.n_classes - 1} ({error})"
        ) from None
    return x.reshape(-1, 3, 32, 32), y


def load(published: Published, root: Path, split: Split) -> Dataset:
    """One split, (N, 3, 32, 32) uint8 in the published order: red, green, blue planes.

    Raises InputError when a file is missing, is not the published one, or has another form.
    """
    wanted = published.md5[split]
    parts = []
    for name, raw in _raw(root, published, list(wanted)).items():
        what = f"{published.title} file {name} in {root}"
        files.check_md5(what, raw, wanted[name])
        parts.append(_batch(raw, published, what))
    return Dataset(
        name=f"{published.name}/{split}",
        x=np.concatenate([x for x, _ in parts]),
        y=np.concatenate([np.asarray(y, np.int64) for _, y in parts]),
    )
