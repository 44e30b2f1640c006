"""Data sets: the official layouts, the fixed split, and files that must not be opened."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resq_deploy import data
from resq_deploy.data import augment, cifar10, npz
from resq_deploy.data.base import Dataset, as_float
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


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Six tiny batches in the official format, their MD5 taken for the published ones."""
    files = {}
    for i, name in enumerate(sorted(cifar10.MD5)):
        pixels = np.random.default_rng(i).integers(0, 256, (PER_BATCH, 3072), np.uint8)
        batch = {b"data": pixels, b"labels": [i, (i + 1) % 10, 9], b"batch_label": b"x"}
        files[name] = pickle.dumps(batch)
        digest = hashlib.md5(files[name], usedforsecurity=False).hexdigest()
        monkeypatch.setitem(cifar10.MD5, name, digest)
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as out:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = len(raw)
            out.addfile(member, io.BytesIO(raw))


def place(root: Path, layout: str, files: dict[str, bytes]) -> None:
    if layout == "archive":
        archive(root / cifar10.ARCHIVE, files)
    else:
        write(root / cifar10.FOLDER if layout == "beside" else root, files)


LAYOUTS = pytest.mark.parametrize("layout", ["beside", "inside", "archive"])


@LAYOUTS
def test_cifar10_official_layouts(tmp_path: Path, batches: dict[str, bytes], layout: str) -> None:
    place(tmp_path, layout, batches)
    splits = data.load("cifar10", tmp_path)
    assert splits.train is not None
    assert splits.train.x.shape == (5 * PER_BATCH, 3, 32, 32) and splits.train.x.dtype == np.uint8
    assert splits.test.x.shape == (PER_BATCH, 3, 32, 32)
    # batches in the published order, rows as they stand: red plane first, then green, blue
    assert splits.train.y[::PER_BATCH].tolist() == [0, 1, 2, 3, 4]
    assert splits.test.y.tolist() == [5, 6, 9] and splits.test.y.dtype == np.int64
    third = pickle.loads(batches["data_batch_3"], encoding="bytes")[b"data"]
    np.testing.assert_array_equal(
        splits.train.x[2 * PER_BATCH : 3 * PER_BATCH].reshape(PER_BATCH, -1), third
    )


def test_cifar10_from_the_environment_variable(
    tmp_path: Path, batches: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, "beside", batches)
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    assert len(data.load("cifar10").test) == PER_BATCH
    # a folder that is given goes first
    with pytest.raises(InputError, match="does not exist"):
        data.load("cifar10", tmp_path / "elsewhere")


@LAYOUTS
def test_a_changed_cifar10_file_is_never_unpickled(
    tmp_path: Path, batches: dict[str, bytes], layout: str
) -> None:
    trap = tmp_path / "executed"
    hostile = pickle.dumps(Hostile(trap))
    place(tmp_path, layout, {**batches, "data_batch_2": hostile})
    with pytest.raises(InputError, match="data_batch_2.*MD5.*not opened"):
        data.load("cifar10", tmp_path)
    assert not trap.exists()
    pickle.loads(hostile)
    assert trap.exists(), "the trap works"


@pytest.mark.parametrize("damage", ["cut", "cut early", "changed", "not gzip"])
def test_a_damaged_cifar10_archive_is_refused(
    tmp_path: Path, batches: dict[str, bytes], damage: str
) -> None:
    path = tmp_path / cifar10.ARCHIVE
    archive(path, batches)
    raw = path.read_bytes()
    half = len(raw) // 2
    changed = {
        "cut": raw[:half],
        "cut early": raw[:10],
        "changed": raw[:half] + bytes(b ^ 0xFF for b in raw[half : half + 64]) + raw[half + 64 :],
        "not gzip": b"<html>404</html>" * 50,
    }
    path.write_bytes(changed[damage])
    with pytest.raises(InputError, match=r"cannot be read|has MD5"):
        data.load("cifar10", tmp_path)


def test_an_archive_without_a_batch_is_refused(tmp_path: Path, batches: dict[str, bytes]) -> None:
    batches.pop("test_batch")
    archive(tmp_path / cifar10.ARCHIVE, batches)
    with pytest.raises(InputError, match="test_batch"):
        data.load("cifar10", tmp_path)


def test_missing_data_say_how_to_mend_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=data.ROOT_VARIABLE):
        data.load("cifar10")
    with pytest.raises(InputError, match=f"{cifar10.FOLDER}.*{cifar10.ARCHIVE}"):
        data.load("cifar10", tmp_path)
    with pytest.raises(InputError, match=r"'cifar11' is unknown.*cifar10, digits"):
        data.load("cifar11")


def test_real_cifar10() -> None:
    root = os.environ.get(data.ROOT_VARIABLE)
    if not root:
        pytest.skip("RESQ_DATA is not set: it names the folder that holds CIFAR-10")
    splits = data.load("cifar10")
    assert splits.train is not None
    assert splits.train.x.shape == (50_000, 3, 32, 32) and splits.test.x.shape[0] == 10_000
    assert np.bincount(splits.train.y).tolist() == [5000] * 10
    assert np.bincount(splits.test.y).tolist() == [1000] * 10
    # the per-channel mean that everybody normalises with: 0.4914, 0.4822, 0.4465
    mean = splits.train.x.mean(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)


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
