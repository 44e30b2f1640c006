"""GTSRB, German traffic signs (Stallkamp et al., 2012): official archives or unpacked folders.

Archives are compared with their published MD5 (the sums that torchvision's sources and other
loaders list) before they are opened; a folder has no digests, its number of images is checked.
The training images are GTSRB_Final_Training_Images.zip (39,209 images) or, where only that is
there, the training set of the earlier online competition, GTSRB-Training_fixed.zip (26,640
images), which torchvision takes.

Images are PPM of 15 to 250 pixels with a border of about a tenth around the sign. `gtsrb` resizes
the whole image, as torchvision's users do; `gtsrb-roi` first cuts out the annotated region of the
sign, as the winner of the competition did (Ciresan et al., 2012).
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resq_deploy.data import files, pictures
from resq_deploy.data.base import Dataset, Split, groups
from resq_deploy.errors import InputError

SIZE = 32
"""Pixels per side where the recipe does not say otherwise."""
N_CLASSES = 43
MD5 = {
    "GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",
    "GTSRB-Training_fixed.zip": "513f3c79a4c5141765e10e952eaa2478",
    "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
    "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
}
LABELS = "GT-final_test.csv"
MEMBER_LIMIT = 2**24
"""Bytes that one file in an archive may have; the largest published one has under 0.5 MB."""


@dataclass(frozen=True)
class Part:
    """One published set of images: where it lies, in an archive or unpacked, and how many."""

    archive: str
    folder: str
    n_images: int


TRAIN = [
    Part("GTSRB_Final_Training_Images.zip", "Final_Training/Images", 39_209),
    Part("GTSRB-Training_fixed.zip", "Training", 26_640),
]
TEST = Part("GTSRB_Final_Test_Images.zip", "Final_Test/Images", 12_630)


class _Tree:
    """The files below a folder, on disk or in a zip, by relative name; nothing is unpacked."""

    def __init__(self, where: Path, folder: str) -> None:
        self.where = where
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}
        if where.is_dir():
            self.names = sorted(p.relative_to(where).as_posix() for p in where.rglob("*.*"))
            return
        files.check_md5(f"GTSRB archive {where}", where, MD5[where.name])
        try:
            self._zip = zipfile.ZipFile(where)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(f"{where} cannot be read ({error}); fetch it again") from None
        start = re.compile(rf"(GTSRB/)?{re.escape(folder)}/" if folder else "")
        for info in self._zip.infolist():
            if (found := start.match(info.filename)) and not info.is_dir():
                self._members[info.filename[found.end() :]] = info
        self.names = sorted(self._members)

    def read(self, name: str) -> bytes:
        if self._zip is None:
            return files.read(self.where / name)
        info = self._members[name]
        if info.file_size > MEMBER_LIMIT:
            raise InputError(
                f"{self.where}: {name} has {info.file_size} bytes; at most {MEMBER_LIMIT} expected"
            )
        try:
            with self._zip.open(info) as member:
                # Asked for a length, zipfile inflates no more than that, whatever is packed.
                return member.read(info.file_size)
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
        ) as error:
            raise InputError(
                f"{self.where}: {name} cannot be read ({error}); fetch it again"
            ) from None

    def rows(self, name: str) -> list[dict[str, str]]:
        """Rows of a table with `;` between its columns."""
        if name not in self.names:
            raise InputError(f"{self.where}: table {name} is missing; unpack the archive again")
        text = self.read(name).decode("utf-8", errors="replace")
        return list(csv.DictReader(io.StringIO(text), delimiter=";", skipinitialspace=True))


def _tree(root: Path, part: Part) -> _Tree | None:
    """The part below `root`: unpacked (also in GTSRB/, gtsrb/, gtsrb/GTSRB/), else as archive."""
    for base in (root, root / "gtsrb"):
        for folder in (base / "GTSRB" / part.folder, base / part.folder):
            if folder.is_dir():
                return _Tree(folder, "")
        if (base / part.archive).is_file():
            return _Tree(base / part.archive, part.folder)
    return None


def _labels(root: Path) -> list[dict[str, str]]:
    for base in (root, root / "gtsrb"):
        for folder in (base, base / "GTSRB"):
            if (folder / LABELS).is_file():
                return _Tree(folder, "").rows(LABELS)
        if (base / "GTSRB_Final_Test_GT.zip").is_file():
            return _Tree(base / "GTSRB_Final_Test_GT.zip", "").rows(LABELS)
    raise InputError(
        f"GTSRB table {LABELS} not found in {root}; expected it, or the official archive "
        "GTSRB_Final_Test_GT.zip, there"
    )


@dataclass(frozen=True)
class _Row:
    """One annotated image."""

    file: str
    label: int
    track: int
    box: tuple[int, int, int, int]


def _row(raw: dict[str, str], where: str, folder: str = "", track: int = 0) -> _Row:
    try:
        left, top, right, bottom = (int(raw[f"Roi.{c}"]) for c in ("X1", "Y1", "X2", "Y2"))
        label = int(raw["ClassId"])
        if not 0 <= label < N_CLASSES:
            raise ValueError(f"ClassId {label}")
        return _Row(folder + raw["Filename"], label, track, (left, top, right, bottom))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: a row does not hold Filename, Roi.X1, Roi.Y1, Roi.X2, Roi.Y2 and a ClassId "
            f"of 0 to {N_CLASSES - 1} ({error})"
        ) from None


def _training_rows(tree: _Tree) -> list[_Row]:
    rows = []
    for label in range(N_CLASSES):
        folder = f"{label:05d}"
        table = f"{folder}/GT-{folder}.csv"
        for raw in tree.rows(table):
            frame = re.fullmatch(r"(\d{5})_\d{5}\.ppm", raw.get("Filename") or "")
            if frame is None:
                raise InputError(
                    f"{tree.where}: {table} names {raw.get('Filename')!r}; expected TRACK_FRAME.ppm"
                )
            row = _row(raw, f"{tree.where}: {table}", f"{folder}/", int(frame[1]))
            if row.label != label:
                raise InputError(f"{tree.where}: {table} gives {row.file} the class {row.label}")
            rows.append(row)
    return rows


def _parts(root: Path, split: Split) -> tuple[_Tree, Part, list[_Row]]:
    parts = TRAIN if split == "train" else [TEST]
    for part in parts:
        if (tree := _tree(root, part)) is not None:
            break
    else:
        expected = " or ".join(f"{p.archive} (or GTSRB/{p.folder}/)" for p in parts)
        raise InputError(f"GTSRB {split} images not found in {root}; expected {expected} there")
    if split == "train":
        return tree, part, _training_rows(tree)
    return tree, part, [_row(raw, LABELS) for raw in _labels(root)]


def load(root: Path, split: Split, size: int | None = None, *, roi: bool = False) -> Dataset:
    """One split, (N, 3, size, size) uint8; 43 classes; `group` numbers the tracks of training.

    Order: class, then file, as in the tables. Raises InputError for missing, changed, damaged or
    incomplete files.
    """
    tree, part, rows = _parts(root, split)
    images = {name for name in tree.names if name.endswith(".ppm")}
    labelled = {row.file for row in rows}
    missing = sorted(labelled - images)
    if missing or not len(rows) == len(labelled) == len(images) == part.n_images:
        lost = f"; {missing[0]} is missing" if missing else ""
        raise InputError(
            f"{tree.where} holds {len(images)} images and labels of {len(labelled)}; the published "
            f"set has {part.n_images}{lost}: unpack {part.archive} again"
        )
    x = np.empty((len(rows), 3, size or SIZE, size or SIZE), np.uint8)
    for i, row in enumerate(rows):
        x[i] = pictures.decode(
            tree.read(row.file), f"{tree.where}: {row.file}", size=size or SIZE,
            box=row.box if roi else None, formats=("PPM",),
        )  # fmt: skip
    y = np.array([row.label for row in rows], np.int64)
    group = groups(y, np.array([row.track for row in rows])) if split == "train" else None
    name = "gtsrb-roi" if roi else "gtsrb"
    return Dataset(name=f"{name}/{split}", x=x, y=y, group=group)
