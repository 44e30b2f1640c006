"""Data sets: the official layouts, the fixed split, and files that must not be opened."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resq_deploy import data, recipe
from resq_deploy.cli import main
from resq_deploy.data import augment, base, cifar, files, gtsrb, npz, pictures
from resq_deploy.data.base import Dataset, as_float
from resq_deploy.data.check import check
from resq_deploy.errors import InputError

PER_BATCH = 3


class Hostile:
    """A pickle that creates a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.fixture(autouse=True)
def _no_data_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        monkeypatch.delenv(data.ROOT_VARIABLE, raising=False)


# ----------------------------------------------------------------------------- CIFAR

SETS = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}


class Official:
    """A tiny CIFAR in the official format, whose digests stand for the published ones."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.published, self.monkeypatch = name, SETS[name], monkeypatch
        names = [n for part in self.published.md5.values() for n in part]
        self.pixels = {
            n: np.random.default_rng(i).integers(0, 256, (PER_BATCH, 3072), np.uint8)
            for i, n in enumerate(names)
        }
        self.files = {
            n: self.pack(x, [i, (i + 1) % 10, 9]) for i, (n, x) in enumerate(self.pixels.items())
        }
        self.trust()

    def pack(self, x: object, y: object) -> bytes:
        rows = {b"data": x, self.published.labels: y, b"batch_label": b"x"}
        return pickle.dumps(rows, protocol=2)  # as published

    def trust(self, *, archive: Path | None = None) -> None:
        """Take the digests of the files, and of an archive, for the published ones."""
        for part in self.published.md5.values():
            for name in part:
                if name in self.files:
                    self.monkeypatch.setitem(part, name, files.md5(self.files[name]))
        digest = self.published.archive_md5 if archive is None else files.md5(archive)
        changed = dataclasses.replace(self.published, archive_md5=digest)
        self.monkeypatch.setitem(data.SOURCES, self.name, data._cifar(changed))

    def archive(self, path: Path) -> None:
        with tarfile.open(path, "w:gz") as out:
            for name, raw in self.files.items():
                member = tarfile.TarInfo(f"{self.published.folder}/{name}")
                member.size = len(raw)
                out.addfile(member, io.BytesIO(raw))

    def place(self, root: Path, layout: str) -> None:
        if layout == "archive":
            path = root / self.published.archive
            self.archive(path)
            self.trust(archive=path)
        else:
            folder = root / self.published.folder if layout == "beside" else root
            folder.mkdir(parents=True, exist_ok=True)
            for name, raw in self.files.items():
                (folder / name).write_bytes(raw)


@pytest.fixture(params=SETS)
def official(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Official:
    return Official(request.param, monkeypatch)


@pytest.fixture
def official10(monkeypatch: pytest.MonkeyPatch) -> Official:
    return Official("cifar10", monkeypatch)


LAYOUTS = pytest.mark.parametrize("layout", ["beside", "inside", "archive"])


@LAYOUTS
def test_cifar_official_layouts(tmp_path: Path, official: Official, layout: str) -> None:
    official.place(tmp_path, layout)
    splits = data.load(official.name, tmp_path)
    assert splits.train is not None
    batches = list(official.published.md5["train"])
    assert splits.train.x.shape == (len(batches) * PER_BATCH, 3, 32, 32)
    assert splits.train.x.dtype == np.uint8 and splits.test.x.shape == (PER_BATCH, 3, 32, 32)
    # batches in the published order, rows as they stand: red plane first, then green, blue
    assert splits.train.y[::PER_BATCH].tolist() == list(range(len(batches)))
    assert splits.test.y[0] == len(batches) and splits.test.y.dtype == np.int64
    rows = np.concatenate([official.pixels[n] for n in batches])
    np.testing.assert_array_equal(splits.train.x.reshape(len(rows), -1), rows)


def test_cifar_test_images_need_no_training_files(tmp_path: Path, official: Official) -> None:
    official.place(tmp_path, "beside")
    for name in official.published.md5["train"]:
        (tmp_path / official.published.folder / name).unlink()
    assert len(data.load_test(official.name, tmp_path)) == PER_BATCH
    with pytest.raises(InputError, match="not found"):
        data.load(official.name, tmp_path)


def test_cifar10_from_the_environment_variable(
    tmp_path: Path, official10: Official, monkeypatch: pytest.MonkeyPatch
) -> None:
    official10.place(tmp_path, "beside")
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    assert len(data.load("cifar10").test) == PER_BATCH
    # a folder that is given goes first
    with pytest.raises(InputError, match="does not exist"):
        data.load("cifar10", tmp_path / "elsewhere")


@pytest.mark.parametrize("layout", ["beside", "inside"])
def test_a_changed_cifar_file_is_never_unpickled(
    tmp_path: Path, official: Official, layout: str
) -> None:
    trap = tmp_path / "executed"
    name = next(iter(official.published.md5["train"]))
    hostile = official.files[name] = pickle.dumps(Hostile(trap))
    official.place(tmp_path, layout)
    with pytest.raises(InputError, match=f"{name}.*MD5.*not opened"):
        data.load(official.name, tmp_path)
    assert not trap.exists()
    pickle.loads(hostile)
    assert trap.exists(), "the trap works"


def test_a_changed_cifar_archive_is_never_opened(tmp_path: Path, official: Official) -> None:
    official.archive(tmp_path / official.published.archive)
    with pytest.raises(InputError, match=r"archive.*MD5.*not opened"):
        data.load(official.name, tmp_path)


@LAYOUTS
def test_a_hostile_pickle_with_the_right_digest_runs_nothing(
    tmp_path: Path, official: Official, layout: str
) -> None:
    trap = tmp_path / "executed"
    for name in official.files:
        official.files[name] = pickle.dumps({b"data": Hostile(trap)})
    official.trust()
    official.place(tmp_path, layout)
    with pytest.raises(InputError, match="not a readable pickle of plain arrays.*not allowed"):
        data.load(official.name, tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "reference",
    [b"cbuiltins\neval\n(S'1'\ntR.", b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n(S'x'\ntR."],
)
def test_a_pickle_may_name_arrays_only(reference: bytes) -> None:
    with pytest.raises(InputError, match="not allowed"):
        files.unpickle(reference, "it")


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_arrays_are_unpickled(protocol: int) -> None:
    value = {b"x": np.arange(6, dtype=np.uint8).reshape(2, 3), b"y": [1, 2.5, "a", b"b", None]}
    found = files.unpickle(pickle.dumps(value, protocol), "it")
    np.testing.assert_array_equal(found[b"x"], value[b"x"])
    assert found[b"y"] == value[b"y"]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((PER_BATCH, 3071), np.uint8), [0, 1, 2]),
        (np.zeros((PER_BATCH, 3072), np.float32), [0, 1, 2]),
        (np.zeros((2, 3072), np.uint8), [0, 1, 2]),
        (np.zeros((PER_BATCH, 3072), np.uint8), [0, 1, 100]),
        (np.zeros((PER_BATCH, 3072), np.uint8), [0, 1, -1]),
        (np.zeros((PER_BATCH, 3072), np.uint8), [0, 1, float("nan")]),
        ([1, 2, 3], [0, 1, 2]),
    ],
)
def test_cifar_batches_of_another_form_are_refused(
    tmp_path: Path, official: Official, x: object, y: object
) -> None:
    for name in official.files:
        official.files[name] = official.pack(x, y)
    official.trust()
    official.place(tmp_path, "beside")
    with pytest.raises(InputError, match="does not hold uint8 rows of 3,072 pixels"):
        data.load(official.name, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "cut early", "changed", "not gzip"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_damaged_cifar_archive_is_refused(
    tmp_path: Path, official: Official, damage: str, trusted: bool
) -> None:
    path = tmp_path / official.published.archive
    official.place(tmp_path, "archive")
    raw = path.read_bytes()
    half = len(raw) // 2
    changed = {
        "cut": raw[:half],
        "cut early": raw[:10],
        "changed": raw[:half] + bytes(b ^ 0xFF for b in raw[half : half + 64]) + raw[half + 64 :],
        "not gzip": b"<html>404</html>" * 50,
    }
    path.write_bytes(changed[damage])
    if trusted:
        official.trust(archive=path)  # what stands behind the digest
    with pytest.raises(
        InputError, match="cannot be read|not found|has MD5" if trusted else "has MD5"
    ):
        data.load(official.name, tmp_path)


def test_only_plain_members_of_their_name_are_read_from_an_archive(
    tmp_path: Path, official10: Official, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / cifar.CIFAR10.archive
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    with tarfile.open(path, "w:gz") as out:
        for name in ("../escaped", "/escaped", "cifar-10-batches-py/../escaped"):
            member = tarfile.TarInfo(name)
            member.size = 1
            out.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        out.addfile(link)
    official10.trust(archive=path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="test_batch not found"):
        data.load_test("cifar10", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "escaped").exists()


@LAYOUTS
def test_an_oversized_file_is_not_read(
    tmp_path: Path, official10: Official, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    official10.place(tmp_path, layout)
    monkeypatch.setattr(files, "LIMIT", 100)
    with pytest.raises(InputError, match="at most 100 expected|not found"):
        data.load("cifar10", tmp_path)


def test_an_archive_without_a_batch_is_refused(tmp_path: Path, official10: Official) -> None:
    official10.files.pop("test_batch")
    official10.place(tmp_path, "archive")
    with pytest.raises(InputError, match="test_batch"):
        data.load("cifar10", tmp_path)


def test_missing_data_say_how_to_mend_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=data.ROOT_VARIABLE):
        data.load("cifar10")
    for name, published in SETS.items():
        with pytest.raises(InputError, match=f"{published.folder}.*{published.archive}"):
            data.load(name, tmp_path)
    with pytest.raises(InputError, match=r"'cifar11' is unknown.*cifar10, cifar100, digits"):
        data.load("cifar11")
    with pytest.raises(InputError, match="size 16 given.*gtsrb"):
        data.load("digits", size=16)


def real_root(*names: str) -> Path:
    root = os.environ.get(data.ROOT_VARIABLE)
    if not root or not all((Path(root) / name).exists() for name in names):
        pytest.skip(f"RESQ_DATA does not name a folder with {', '.join(names)}")
    return Path(root)


def test_real_cifar10() -> None:
    real_root(cifar.CIFAR10.folder)
    splits = data.load("cifar10")
    assert splits.train is not None
    assert splits.train.x.shape == (50_000, 3, 32, 32) and splits.test.x.shape[0] == 10_000
    assert np.bincount(splits.train.y).tolist() == [5000] * 10
    assert np.bincount(splits.test.y).tolist() == [1000] * 10
    # the per-channel mean that everybody normalises with: 0.4914, 0.4822, 0.4465
    mean = splits.train.x.mean(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)


def test_real_cifar100() -> None:
    real_root(cifar.CIFAR100.folder)
    test = data.load_test("cifar100")
    assert test.x.shape == (10_000, 3, 32, 32) and np.bincount(test.y).tolist() == [100] * 100


def test_digits() -> None:
    splits = data.load("digits")
    assert splits.train is not None
    assert splits.train.x.shape == (797, 1, 32, 32) and splits.test.x.shape == (1000, 1, 32, 32)
    for part in (splits.train, splits.test):
        assert part.x.dtype == np.uint8 and part.x.max() == 255 and part.x.min() == 0
        assert np.bincount(part.y).min() > 0.8 * len(part) / 10
        # every pixel of the 8x8 original stands for 4x4 here
        blocks = part.x.reshape(-1, 8, 4, 8, 4)
        assert (blocks == blocks[:, :, :1, :, :1]).all()


def test_digits_split_is_fixed() -> None:
    # published numbers hang on these images: a change here moves every table
    splits = data.load("digits")
    assert splits.train is not None
    assert splits.test.sha256[:16] == "d9f5a5ded97bf2cd"
    assert splits.train.sha256[:16] == "1fedf84042b9184c"


def test_digits_train_and_test_together_are_the_whole_set() -> None:
    from sklearn.datasets import load_digits

    splits = data.load("digits")
    assert splits.train is not None
    ours = np.concatenate([splits.train.x, splits.test.x])[:, 0, ::4, ::4]
    whole = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(i.tobytes() for i in ours) == sorted(i.tobytes() for i in whole)


# ----------------------------------------------------------------------------- .npz


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


X, Y = np.arange(48, dtype=np.uint8).reshape(3, 1, 4, 4), np.array([0, 1, 2], np.int32)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float32])
def test_npz_goes_in_as_it_is(tmp_path: Path, dtype: type) -> None:
    splits = data.load(str(save(tmp_path / "mine.npz", x=X.astype(dtype), y=Y, track=Y)))
    assert splits.train is None and splits.test.name == "mine"
    assert splits.test.x.dtype == dtype and splits.test.y.dtype == np.int64
    np.testing.assert_array_equal(splits.test.x, X.astype(dtype))


@pytest.mark.parametrize("field", ["x", "y"])
def test_npz_with_pickled_objects_is_refused_unopened(tmp_path: Path, field: str) -> None:
    trap = tmp_path / "executed"
    objects = np.array([Hostile(trap)] * 3, dtype=object)
    path = save(tmp_path / "bad.npz", **{"x": X, "y": Y, field: objects})
    with pytest.raises(InputError, match=r"cannot be read as \.npz.*expected x and y"):
        npz.load(path)
    assert not trap.exists()


def test_npz_that_is_one_pickle_is_refused_unopened(tmp_path: Path) -> None:
    trap, path = tmp_path / "executed", tmp_path / "bad.npz"
    path.write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(InputError, match="cannot be read"):
        npz.load(path)
    assert not trap.exists()


def test_npz_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", x=X, y=Y).read_bytes()
    path = tmp_path / "cut.npz"
    for cut in [0, 1, 4, 30, *range(60, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="cannot be read"):
            npz.load(path)


@pytest.mark.parametrize("save_as", [np.savez, np.savez_compressed])
def test_npz_with_one_damaged_byte_is_read_or_refused_but_never_crashes(
    tmp_path: Path, save_as
) -> None:
    path = tmp_path / "damaged.npz"
    save_as(path, x=X, y=Y)
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            npz.load(path)
        except InputError:
            refused += 1
    assert refused > len(whole) // 3


@pytest.mark.parametrize(
    ("name", "content"),
    [("text.npz", b"x,y\n1,2\n"), ("empty.npz", b""), ("folder.npz", None), ("none.npz", ...)],
)
def test_what_is_no_npz_is_refused(tmp_path: Path, name: str, content: object) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.mkdir()
    with pytest.raises(InputError, match=name):
        npz.load(path)


def test_a_bare_npy_under_the_name_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "array.npz"
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(InputError, match="expected"):
        npz.load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "labels": Y}, "expected the arrays x and y"),
        ({"x": X, "y": Y.astype(np.float32)}, "integer labels, got float32"),
        ({"x": X, "y": Y[:2]}, r"\(3, 1, 4, 4\) and \(2,\)"),
        ({"x": X, "y": Y[:, None]}, "expected"),
        ({"x": X[:0], "y": Y[:0]}, "N > 0"),
        ({"x": np.array(["a", "b", "c"]), "y": Y}, "x must hold numbers"),
        ({"x": X, "y": Y - 1}, "labels >= 0"),
        ({"x": np.full((3, 4), np.nan, np.float32), "y": Y}, "NaN"),
        ({"x": np.full((3, 4), np.inf, np.float32), "y": Y}, "infinite"),
    ],
)
def test_npz_with_wrong_arrays_is_refused(tmp_path: Path, arrays: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        npz.load(save(tmp_path / "wrong.npz", **arrays))


# ----------------------------------------------------------------------------- the value


def test_digest_sees_pixels_labels_type_and_shape() -> None:
    y = Y.astype(np.int64)
    kinds = [
        Dataset(name="a", x=X, y=y),
        Dataset(name="a", x=X + 1, y=y),
        Dataset(name="a", x=X, y=y[::-1]),
        Dataset(name="a", x=X.view(np.int8), y=y),
        Dataset(name="a", x=X.reshape(3, 4, 4, 1), y=y),
    ]
    assert len({d.sha256 for d in kinds}) == len(kinds)
    assert kinds[0].sha256 == Dataset(name="b", x=np.asfortranarray(X), y=y).sha256


def test_take_and_first() -> None:
    whole = Dataset(name="a", x=X, y=Y.astype(np.int64))
    assert whole.take([2, 0]).y.tolist() == [2, 0] and whole.n_classes == 3
    assert whole.first(None) is whole and whole.first(2).y.tolist() == [0, 1]
    for n in (0, -1, 4):
        with pytest.raises(InputError, match=f"{n} images asked for; a has 3"):
            whole.first(n)


def test_pixels_as_float() -> None:
    assert as_float(np.array([0, 51, 255], np.uint8)).tolist() == [0.0, np.float32(0.2), 1.0]
    kept = as_float(np.array([0.25, 1.0]))
    assert kept.dtype == np.float32 and kept.tolist() == [0.25, 1.0]


# ----------------------------------------------------------------------------- augmentation


@given(
    hnp.arrays(np.uint8, (5, 2, 8, 8)),
    st.integers(0, 2**32),
    st.sampled_from(["crop", "crop-flip"]),
)
def test_augmented_images_are_windows_of_the_padded_image(
    x: np.ndarray, seed: int, name: str
) -> None:
    before = x.copy()
    out = augment.AUGMENTATIONS[name](x, np.random.default_rng(seed))
    assert out.shape == x.shape and out.dtype == x.dtype
    np.testing.assert_array_equal(x, before)
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
    for image, source in zip(out, padded, strict=True):
        mirrored = [image, image[..., ::-1]] if name == "crop-flip" else [image]
        assert any(
            (source[:, i : i + 8, j : j + 8] == candidate).all()
            for i in range(9)
            for j in range(9)
            for candidate in mirrored
        )


def test_crop_flip_mirrors_about_half_and_crop_none() -> None:
    x = np.zeros((400, 1, 16, 16), np.uint8)
    x[..., 4:12, 4:12] = np.arange(1, 9, dtype=np.uint8)  # a ramp that survives every window

    def rising(name: str) -> int:
        out = augment.AUGMENTATIONS[name](x, np.random.default_rng(0)).astype(int)
        return int((out[:, 0, 8, :] @ np.linspace(-1, 1, 16) != 0).sum()), out

    assert augment.none(x, np.random.default_rng(0)) is x
    _, crop = rising("crop")
    _, flip = rising("crop-flip")
    falls = [
        sum(bool((np.diff(row[row > 0]) < 0).any()) for row in out[:, 0, 8, :])
        for out in (crop, flip)
    ]
    assert falls[0] == 0 and 140 <= falls[1] <= 260  # six standard deviations around 200


# ----------------------------------------------------------------------------- training .npz


def test_npz_files_take_the_place_of_the_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = save(tmp_path / "mine_train.npz", x=X, y=Y)
    test = save(tmp_path / "mine_test.npz", x=X[:2] + 1, y=Y[:2])
    pair = data.load(str(test), train=str(train))
    assert pair.train is not None and pair.train.name == "mine_train" and len(pair.test) == 2
    # a relative path: as it stands, else in the data folder
    in_folder = data.load("mine_test.npz", tmp_path, train="mine_train.npz")
    assert in_folder.train is not None and in_folder.train.sha256 == pair.train.sha256
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    (tmp_path / "here").mkdir()
    save(tmp_path / "here/mine_train.npz", x=X[:1], y=Y[:1])
    monkeypatch.chdir(tmp_path / "here")
    assert len(data.load_test("mine_train.npz")) == 1, "what lies here goes first"
    monkeypatch.chdir(tmp_path.parent)
    mixed = data.load("digits", train="mine_train.npz")
    assert mixed.train is not None and len(mixed.train) == 3 and len(mixed.test) == 1000
    both = data.load("gtsrb", train="mine_train.npz", test="mine_test.npz")
    assert len(both.test) == 2, "the set's own files are not needed"
    with pytest.raises(InputError, match=r"none\.npz"):
        data.load("digits", train="none.npz")


def recipe_file(folder: Path, lines: str) -> Path:
    text = recipe.TEMPLATE.replace('name = "cifar10"', lines)
    path = folder / "models/my.toml"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_recipe_names_npz_files_beside_it_or_in_the_data_folder(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path, f'name = "a.npz"\ntrain = "b.npz"\nroot = "{tmp_path / "data"}"\n#'
    )
    (tmp_path / "data").mkdir()
    save(path.parent / "a.npz", x=X, y=Y)
    save(tmp_path / "data/b.npz", x=X[:1], y=Y[:1])
    loaded = recipe.load(path)
    splits = data.of(loaded.data)
    assert splits.train is not None and len(splits.train) == 1 and len(splits.test) == 3
    # artefacts name the file, not the folder of this machine
    assert loaded.portable()["data"]["name"] == "a.npz"
    assert str(tmp_path) not in json.dumps(loaded.portable())


def test_a_recipe_gives_only_what_differs_from_the_one_that_it_extends(tmp_path: Path) -> None:
    base = recipe_file(tmp_path, 'name = "cifar10"\nroot = "images"')
    other = base.parent / "other.toml"
    other.write_text('extends = "my.toml"\nname = "other"\n[fault]\nepochs = 1\n[prove]\ndraws = 2')
    one, two = recipe.load(base), recipe.load(other)
    assert (two.name, two.fault.epochs, two.prove.draws) == ("other", 1, 2)
    changed = {"name": one.name, "fault": one.fault, "prove": one.prove}
    assert two.model_copy(update=changed) == one and one.fault.epochs == 4
    assert recipe.files(other) == [other, base] and recipe.files(base) == [base]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('extends = "my.toml"', "name: Field required"),
        ('extends = "none.toml"\nname = "x"', "none.toml cannot be read"),
        ('extends = "../models/my.toml"\nname = "x"', "a recipe in the same folder expected, got"),
        ('extends = ["my.toml"]\nname = "x"', "a recipe in the same folder expected, got"),
        ('extends = "x.toml"\nname = "x"', "x.toml extends x.toml; extend that one"),
        ('extends = "my.toml"\nname = "x"\nfault = 1', "fault: Input should be a valid"),
        ('extends = "my.toml"\nname = "x"\n[fault]\nepoch = 1', "fault.epoch: unknown field"),
    ],
    ids=["name", "missing", "folder", "list", "chain", "section", "field"],
)
def test_a_wrong_extension_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = recipe_file(tmp_path, 'name = "cifar10"').parent / "x.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        recipe.load(path)


# ----------------------------------------------------------------------------- parts of a set


def test_train_images_are_a_fixed_draw_from_every_class(tmp_path: Path) -> None:
    x = np.repeat(np.arange(200), 16).astype(np.uint8).reshape(200, 1, 4, 4)
    y = np.repeat(np.arange(4), 50)
    path = str(save(tmp_path / "t.npz", x=x, y=y))
    part = data.load("digits", train=path, train_images=40).train
    assert part is not None and len(part) == 40
    assert set(part.y) == {0, 1, 2, 3}, "a set that comes class by class"
    kept = part.x[:, 0, 0, 0]
    assert kept.tolist() == sorted(set(kept)) and np.array_equal(y[kept], part.y)
    again = data.load("digits", train=path, train_images=40).train
    assert again is not None and again.sha256 == part.sha256, "always the same images"
    rest = data.load("digits", train=path, train_images=40, validation=0.5)
    assert rest.train is not None and (len(rest.train), len(rest.test)) == (40, 100)
    with pytest.raises(InputError, match="train_images 201 asked for; t has 200"):
        data.load("digits", train=path, train_images=201)


# ----------------------------------------------------------------------------- validation


def tracks(n_classes: int = 3, n_tracks: int = 5, frames: int = 4) -> Dataset:
    y = np.repeat(np.arange(n_classes), n_tracks * frames)
    track = np.tile(np.repeat(np.arange(n_tracks), frames), n_classes)
    x = np.arange(len(y) * 16).astype(np.uint8).reshape(len(y), 1, 4, 4)
    return Dataset(name="t", x=x, y=y, group=base.groups(y, track))


def test_tracks_are_numbered_within_a_class() -> None:
    found = tracks()
    assert found.group is not None and len(np.unique(found.group)) == 15
    for group in np.unique(found.group):
        assert len(np.unique(found.y[found.group == group])) == 1


@given(st.floats(0.01, 0.99), st.integers(1, 4), st.integers(2, 6), st.integers(1, 4))
def test_validation_never_divides_a_track(
    fraction: float, n_classes: int, n_tracks: int, frames: int
) -> None:
    whole = tracks(n_classes, n_tracks, frames)
    splits = base.hold_out(whole, fraction)
    rest, held = splits.train, splits.test
    assert rest is not None and rest.group is not None and held.group is not None
    assert not set(rest.group) & set(held.group)
    assert len(rest) + len(held) == len(whole)
    for label in range(n_classes):
        n = int((held.y == label).sum())
        share, all_but_one = fraction * n_tracks * frames, (n_tracks - 1) * frames
        assert n >= min(share, all_but_one) - 1e-9 and n < share + frames
        assert (rest.y == label).any()
    again = base.hold_out(whole, fraction)
    assert again.test.sha256 == held.sha256, "always the same images"


def test_validation_takes_the_place_of_the_test_images(tmp_path: Path) -> None:
    whole = tracks()
    assert whole.group is not None
    path = save(
        tmp_path / "t.npz", x=whole.x, y=whole.y, track=np.tile(np.repeat(np.arange(5), 4), 3)
    )
    splits = data.load("digits", train=str(path), validation=0.2)
    assert splits.train is not None and (len(splits.train), len(splits.test)) == (48, 12)
    assert splits.test.name == "t/validation" and splits.train.name == "t/fit"
    with pytest.raises(InputError, match="two or more groups"):
        base.hold_out(tracks(n_tracks=1), 0.5)
    with pytest.raises(InputError, match="track must hold an integer for each of the 3 images"):
        npz.load(save(tmp_path / "bad.npz", x=X, y=Y, track=Y[:2]))


# ----------------------------------------------------------------------------- GTSRB

COLUMNS = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
FRAMES = 3


def ppm(label: int, track: int = 0, frame: int = 0, size: tuple[int, int] = (24, 20)) -> bytes:
    """A dark border of 5 pixels around a bright field whose colour tells class and track."""
    w, h = size
    image = np.zeros((h, w, 3), np.uint8)
    image[5:-5, 5:-5] = (40 + label, 100 + 10 * track + frame, 250)
    return b"P6\n%d %d\n255\n" % (w, h) + image.tobytes()


def annotation(name: str, label: int, size: tuple[int, int] = (24, 20)) -> str:
    w, h = size
    return f"{name};{w};{h};5;5;{w - 5};{h - 5};{label}"


class Signs:
    """A tiny GTSRB in the official layout: 43 classes, two tracks of three frames, 10 to test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, training: gtsrb.Part) -> None:
        self.training = training
        self.train: dict[str, bytes] = {}
        for label in range(gtsrb.N_CLASSES):
            rows = [COLUMNS]
            for track in range(2):
                for frame in range(FRAMES):
                    name = f"{track:05d}_{frame:05d}.ppm"
                    self.train[f"{label:05d}/{name}"] = ppm(label, track, frame)
                    rows.append(annotation(name, label))
            self.train[f"{label:05d}/GT-{label:05d}.csv"] = "\r\n".join(rows).encode()
        labels = [(7 * i) % gtsrb.N_CLASSES for i in range(10)]
        self.test = {f"{i:05d}.ppm": ppm(label, size=(30, 31)) for i, label in enumerate(labels)}
        self.test["GT-final_test.test.csv"] = b"Filename;Width\r\n"  # as published: no classes
        rows = [annotation(f"{i:05d}.ppm", label, (30, 31)) for i, label in enumerate(labels)]
        self.labels = "\r\n".join([COLUMNS, *rows]).encode()
        small = [dataclasses.replace(p, n_images=gtsrb.N_CLASSES * 2 * FRAMES) for p in gtsrb.TRAIN]
        monkeypatch.setattr(gtsrb, "TRAIN", small)
        monkeypatch.setattr(gtsrb, "TEST", dataclasses.replace(gtsrb.TEST, n_images=10))
        self.monkeypatch = monkeypatch

    def zip(self, path: Path, members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, raw in members.items():
                out.writestr(name, raw)
        self.trust(path)

    def trust(self, path: Path) -> None:
        self.monkeypatch.setitem(gtsrb.MD5, path.name, files.md5(path))

    def place(self, root: Path, layout: str) -> None:
        trees = {self.training: self.train, gtsrb.TEST: self.test}
        root.mkdir(exist_ok=True)
        if layout == "archives":
            for part, members in trees.items():
                inside = {f"GTSRB/{part.folder}/{n}": raw for n, raw in members.items()}
                self.zip(root / part.archive, {"GTSRB/Readme.txt": b"read me", **inside})
            self.zip(root / "GTSRB_Final_Test_GT.zip", {gtsrb.LABELS: self.labels})
            return
        base_folder = {"unpacked": root, "torchvision": root / "gtsrb", "inside": root}[layout]
        tree = base_folder if layout == "inside" else base_folder / "GTSRB"
        for part, members in trees.items():
            for name, raw in members.items():
                path = tree / part.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)
        (base_folder / gtsrb.LABELS).write_bytes(self.labels)


@pytest.fixture(params=[0, 1], ids=["final", "competition"])
def signs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Signs:
    return Signs(monkeypatch, gtsrb.TRAIN[request.param])


@pytest.fixture
def final_signs(monkeypatch: pytest.MonkeyPatch) -> Signs:
    return Signs(monkeypatch, gtsrb.TRAIN[0])


@pytest.mark.parametrize("layout", ["archives", "unpacked", "torchvision", "inside"])
def test_gtsrb_official_layouts(tmp_path: Path, signs: Signs, layout: str) -> None:
    signs.place(tmp_path, layout)
    splits = data.load("gtsrb", tmp_path)
    assert splits.train is not None and splits.train.group is not None
    assert splits.train.x.shape == (43 * 2 * FRAMES, 3, 32, 32)
    assert splits.train.x.dtype == np.uint8
    assert splits.train.y.tolist() == np.repeat(np.arange(43), 2 * FRAMES).tolist()
    assert np.bincount(splits.train.group).tolist() == [FRAMES] * 86
    assert splits.test.y.tolist() == [(7 * i) % 43 for i in range(10)]
    # the middle of every image has the colour of its class, red plane first
    assert (splits.train.x[:, 0, 16, 16] == 40 + splits.train.y).all()
    assert (splits.train.x[:, 2, 16, 16] == 250).all()
    assert (splits.test.x[:, 0, 16, 16] == 40 + splits.test.y).all()
    assert (splits.train.x[:, :, 0, 0] == 0).all(), "the whole image, border included"


def test_gtsrb_region_and_size(tmp_path: Path, final_signs: Signs) -> None:
    final_signs.place(tmp_path, "archives")
    cut = data.load("gtsrb-roi", tmp_path, size=16)
    assert cut.train is not None and cut.train.x.shape[1:] == (3, 16, 16)
    assert (cut.train.x[:, 2] == 250).all() and (cut.test.x[:, 2] == 250).all(), "no border"
    assert data.load_split("gtsrb", tmp_path, "test", 48).x.shape == (10, 3, 48, 48)


def test_gtsrb_validation_keeps_tracks_whole(tmp_path: Path, final_signs: Signs) -> None:
    final_signs.place(tmp_path, "archives")
    splits = data.load("gtsrb", tmp_path, validation=0.3)
    assert splits.train is not None and splits.train.group is not None
    assert len(splits.train) == len(splits.test) == 43 * FRAMES
    assert not set(splits.train.group) & set(splits.test.group)


@pytest.mark.parametrize("archive", list(gtsrb.MD5))
def test_a_changed_gtsrb_archive_is_never_opened(
    tmp_path: Path, archive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = gtsrb.TRAIN[archive == gtsrb.TRAIN[1].archive]
    found = Signs(monkeypatch, training)
    found.place(tmp_path, "archives")
    with (tmp_path / archive).open("ab") as file:
        file.write(b"x") if archive in os.listdir(tmp_path) else pytest.fail("not there")
    with pytest.raises(InputError, match=rf"{archive} has MD5 .*not opened.*fetch"):
        data.load("gtsrb", tmp_path)


@pytest.mark.parametrize("archive", ["GTSRB_Final_Training_Images.zip", "GTSRB_Final_Test_GT.zip"])
@pytest.mark.parametrize("damage", ["cut", "changed", "not zip"])
def test_a_damaged_gtsrb_archive_behind_the_digest_is_refused(
    tmp_path: Path, final_signs: Signs, archive: str, damage: str
) -> None:
    final_signs.place(tmp_path, "archives")
    path = tmp_path / archive
    raw = path.read_bytes()
    # flip bytes in the data of the first member: behind its header and name
    changed = raw[:60] + bytes(b ^ 0xFF for b in raw[60:90]) + raw[90:]
    path.write_bytes({"cut": raw[: len(raw) // 2], "changed": changed, "not zip": b"<p>"}[damage])
    final_signs.trust(path)
    with pytest.raises(InputError, match=r"cannot be read"):
        data.load("gtsrb", tmp_path)


def test_hostile_zip_members_are_neither_read_nor_written(
    tmp_path: Path, final_signs: Signs
) -> None:
    final_signs.train |= {"../../../escaped.ppm": ppm(0), "00000/../../escaped.ppm": ppm(0)}
    final_signs.place(tmp_path / "data", "archives")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"holds 260 images and labels of 258"):
        data.load("gtsrb", tmp_path / "data")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", ["folder", "archive"])
def test_a_table_cannot_name_files_elsewhere(
    tmp_path: Path, final_signs: Signs, where: str
) -> None:
    (tmp_path / "secret.ppm").write_bytes(ppm(0))
    final_signs.labels = final_signs.labels.replace(b"00003.ppm", b"../../../secret.ppm")
    final_signs.place(tmp_path / "data", "unpacked" if where == "folder" else "archives")
    with pytest.raises(InputError, match=r"secret\.ppm is missing"):
        data.load_test("gtsrb", tmp_path / "data")


def test_a_zip_bomb_is_not_inflated(tmp_path: Path, final_signs: Signs) -> None:
    final_signs.test["00004.ppm"] = bytes(gtsrb.MEMBER_LIMIT + 1)
    final_signs.place(tmp_path, "archives")
    with pytest.raises(InputError, match=r"00004\.ppm has 16777217 bytes; at most 16777216"):
        data.load_test("gtsrb", tmp_path)


def test_a_zip_bomb_that_lies_about_its_size_is_not_inflated(
    tmp_path: Path, final_signs: Signs
) -> None:
    import tracemalloc

    final_signs.test["00004.ppm"] = bytes(64 * 2**20)
    final_signs.place(tmp_path, "archives")
    path = tmp_path / gtsrb.TEST.archive
    # in both headers 64 MiB becomes 1000 bytes
    raw = path.read_bytes()
    true, lie = (64 * 2**20).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert raw.count(true) == 2
    path.write_bytes(raw.replace(true, lie))
    final_signs.trust(path)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"00004\.ppm cannot be read"):
        data.load_test("gtsrb", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.train.pop("00007/00001_00002.ppm"), "holds 257 images and labels of 258"),
        (lambda s: s.train.pop("00007/GT-00007.csv"), "table 00007/GT-00007.csv is missing"),
        (
            lambda s: s.train.update({"00007/00001_00002.ppm": ppm(7)[:-1]}),
            r"00007/00001_00002\.ppm cannot be read as an image",
        ),
        (
            lambda s: s.train.update({"00007/00001_00002.ppm": b"P6\n99999 99999\n255\n"}),
            r"00007/00001_00002\.ppm cannot be read as an image \(.*pixels",
        ),
        (
            lambda s: s.train.update(
                {"00007/GT-00007.csv": s.train["00007/GT-00007.csv"].replace(b";7", b";8")}
            ),
            "gives 00007/00000_00000.ppm the class 8",
        ),
        (
            lambda s: s.train.update(
                {"00007/GT-00007.csv": s.train["00007/GT-00007.csv"].replace(b"00000_", b"x")}
            ),
            "expected TRACK_FRAME.ppm",
        ),
        (
            lambda s: s.train.update(
                {"00007/GT-00007.csv": s.train["00007/GT-00007.csv"].replace(b"Roi.X2", b"right")}
            ),
            "a row does not hold",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["archives", "unpacked"])
def test_incomplete_gtsrb_is_refused(
    tmp_path: Path, final_signs: Signs, layout: str, change: object, message: str
) -> None:
    change(final_signs)  # type: ignore[operator]
    final_signs.place(tmp_path, layout)
    with pytest.raises(InputError, match=message):
        data.load("gtsrb", tmp_path)


def test_gtsrb_labels_are_checked(tmp_path: Path, final_signs: Signs) -> None:
    right = final_signs.labels
    for labels, message in [
        (right.replace(b"26;0\r", b"26;43\r"), "ClassId of 0 to 42"),
        (right.replace(b"00003.ppm", b"00002.ppm"), "holds 10 images and labels of 9"),
    ]:
        final_signs.labels = labels
        final_signs.place(tmp_path, "unpacked")
        with pytest.raises(InputError, match=message):
            data.load_test("gtsrb", tmp_path)


@pytest.mark.parametrize("x2", ["31", "5", "nan", "-1", ""])
def test_gtsrb_regions_must_lie_in_the_image(tmp_path: Path, final_signs: Signs, x2: str) -> None:
    final_signs.labels = final_signs.labels.replace(b"5;5;25;26;0", f"5;5;{x2};26;0".encode())
    final_signs.place(tmp_path, "unpacked")
    with pytest.raises(InputError, match=r"00000\.ppm cannot be read.*region|a row does not hold"):
        data.load_split("gtsrb-roi", tmp_path, "test")


def test_missing_gtsrb_says_what_is_expected(tmp_path: Path, final_signs: Signs) -> None:
    with pytest.raises(InputError, match=r"GTSRB_Final_Training_Images\.zip.*GTSRB-Training_fix"):
        data.load("gtsrb", tmp_path)
    final_signs.place(tmp_path, "archives")
    (tmp_path / "GTSRB_Final_Test_GT.zip").unlink()
    with pytest.raises(InputError, match=r"GT-final_test\.csv.*GTSRB_Final_Test_GT\.zip"):
        data.load_test("gtsrb", tmp_path)


def test_real_gtsrb_as_npz() -> None:
    root = real_root("gtsrb_train.npz", "gtsrb_test.npz")
    train = npz.load(root / "gtsrb_train.npz")
    assert train.group is not None and len(np.unique(train.group)) == 1307
    splits = base.hold_out(train, 0.2)
    assert splits.train is not None and splits.train.group is not None
    assert not set(splits.train.group) & set(splits.test.group)
    assert splits.test.n_classes == 43 and 0.2 <= len(splits.test) / len(train) < 0.25


# ----------------------------------------------------------------------------- image folders


def png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def image_folder(root: Path, test: str = "test") -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 3), (test, 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                png(root / split / name / f"{i}.png", rng.integers(0, 256, (8, 10, 3), np.uint8))
            (root / split / name / "notes.txt").write_text("not an image")


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path: Path, test: str) -> None:
    image_folder(tmp_path, test)
    splits = data.load("imagefolder", tmp_path)
    assert splits.train is not None and splits.train.x.shape == (6, 3, 8, 10)
    assert splits.train.y.tolist() == [0, 0, 0, 1, 1, 1] and splits.test.y.tolist() == [0, 0, 1, 1]
    first = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    np.testing.assert_array_equal(splits.train.x[0], first.transpose(2, 0, 1))
    assert data.load("imagefolder", tmp_path, size=16).test.x.shape == (4, 3, 16, 16)


def test_image_folder_makes_every_image_rgb(tmp_path: Path) -> None:
    image_folder(tmp_path)
    png(tmp_path / "test/cat/0.png", np.full((8, 10), 7, np.uint8))
    png(tmp_path / "test/cat/1.png", np.full((8, 10, 4), (1, 2, 3, 9), np.uint8))
    test = data.load_test("imagefolder", tmp_path)
    assert (test.x[0] == 7).all() and test.x[1, :, 0, 0].tolist() == [1, 2, 3]


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r'pip install "resq-deploy\[train\]"'):
        data.load_test("imagefolder", tmp_path)


def test_image_folder_sizes_must_agree_or_be_given(tmp_path: Path) -> None:
    image_folder(tmp_path)
    png(tmp_path / "train/dog/1.png", np.zeros((9, 10, 3), np.uint8))
    with pytest.raises(InputError, match=r"1\.png has 10 x 9 pixels, .* 10 x 8; .*`size`"):
        data.load("imagefolder", tmp_path)
    splits = data.load("imagefolder", tmp_path, size=8)
    assert splits.train is not None and splits.train.x.shape == (6, 3, 8, 8)


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", None, b"\x89PNG\r\n\x1a\n" + bytes(30)], ids=["0", "html", "cut", "bad"]
)
def test_a_broken_image_is_named(tmp_path: Path, raw: bytes | None) -> None:
    image_folder(tmp_path)
    path = tmp_path / "test/dog/1.png"
    path.write_bytes(path.read_bytes()[:-40] if raw is None else raw)
    with pytest.raises(InputError, match=r"dog/1\.png cannot be read as an image") as caught:
        data.load_test("imagefolder", tmp_path)
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_an_image_with_too_many_pixels_is_not_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 79)
    with pytest.raises(InputError, match=r"0\.png .*\(10 x 8 pixels, at most 79 in all\)"):
        data.load_test("imagefolder", tmp_path)


def test_image_folder_without_images_or_with_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no train images; expected train/CLASS"):
        data.load("imagefolder", tmp_path)
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        data.load("imagefolder", tmp_path)
    image_folder(tmp_path)
    (tmp_path / "test/fox").mkdir()
    with pytest.raises(InputError, match=r"different classes \(fox in one only\)"):
        data.load("imagefolder", tmp_path)


@given(st.binary(max_size=200))
def test_bytes_are_an_image_or_refused(raw: bytes) -> None:
    for start in (b"", b"P6\n2 2\n255\n", b"\x89PNG\r\n\x1a\n", b"BM"):
        try:
            assert pictures.decode(start + raw, "it", size=None).dtype == np.uint8
        except InputError as error:
            assert str(error).startswith("it cannot be read as an image")


# ----------------------------------------------------------------------------- check


def run(*words: str) -> tuple[int, str, str]:
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["data", *words])
    return result.exit_code, result.stdout, result.stderr


def test_check_says_what_was_found(tmp_path: Path, official10: Official) -> None:
    official10.place(tmp_path, "beside")
    code, out, err = run("cifar10", "--check", str(tmp_path), "--json", str(tmp_path / "c.json"))
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found == check("cifar10", tmp_path) and found["problem"] is None
    assert [f["ok"] for f in found["files"]] == [True] * 6
    train = found["splits"]["train"]
    assert train["n_images"] == 15 and train["shape"] == [3, 32, 32] and train["n_groups"] is None
    assert train["sha256"] == data.load("cifar10", tmp_path).train.sha256  # type: ignore[union-attr]
    assert "test_batch" in out and "3x32x32" in out


def test_check_names_the_first_problem_and_what_is_right(
    tmp_path: Path, official10: Official
) -> None:
    official10.place(tmp_path, "beside")
    broken = tmp_path / "cifar-10-batches-py/data_batch_3"
    broken.write_bytes(broken.read_bytes() + b"x")
    code, out, err = run("cifar10", "--check", str(tmp_path), "--json", str(tmp_path / "c.json"))
    assert code == 2 and err.count("\n") == 1 and "data_batch_3" in err and "fetch" in err
    assert "NOT the published file" in out and "test" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert [f["ok"] for f in found["files"]].count(False) == 1
    assert list(found["splits"]) == ["test"] and found["problem"] in err


def test_check_of_every_kind_of_set(tmp_path: Path, final_signs: Signs) -> None:
    final_signs.place(tmp_path, "archives")
    code, out, _ = run("gtsrb", "--check", str(tmp_path), "--size", "16")
    assert code == 0 and out.count(" ok") == 3 and "86" in out and "3x16x16" in out
    assert run("digits")[0] == 0
    image_folder(tmp_path)
    assert run("imagefolder", "--check", str(tmp_path))[0] == 0
    save(tmp_path / "mine.npz", x=X, y=Y)
    code, out, _ = run("mine.npz", "--check", str(tmp_path))
    assert code == 0 and "none published" in out and "1x4x4" in out
    code, _, err = run("mine.npz")
    assert code == 2 and "mine.npz" in err
    code, _, err = run("signs")
    assert code == 2 and "'signs' is unknown" in err
    assert "train images" in str(check("gtsrb", tmp_path / "train")["problem"]), "the first one"
    code, _, err = run("cifar10")
    assert code == 2 and data.ROOT_VARIABLE in err
