"""The calibration set of a recipe: which images, by manifest."""

from __future__ import annotations

from pathlib import Path

from resq_deploy import recipe, seeds
from resq_deploy.data.base import Dataset, Splits
from resq_deploy.errors import InputError


def load(config: recipe.Data, splits: Splits) -> Dataset:
    """The images that the manifest `config.calibration` (a path) selects from `splits`.

    Raises InputError when the manifest belongs to another data set, asks for test images where
    there are others, or for more than there are, or its digest does not match.
    """
    path = Path(config.calibration)
    manifest = recipe.load_manifest(path)
    if manifest.data != Path(config.name).stem:
        raise InputError(
            f"{path}: made for data set {manifest.data!r}, the recipe uses {config.name!r}"
        )
    if manifest.split == "test" and splits.train is not None:
        # They would decide in stage 3, and prove it afterwards.
        raise InputError(
            f"{path}: split 'test' given; {splits.train.name} has training images: give 'train'"
        )
    source = splits.train if manifest.split == "train" else splits.test
    if source is None or manifest.images > len(source):
        have = 0 if source is None else len(source)
        raise InputError(f"{path}: {manifest.images} images of split {manifest.split!r} asked for; "
                         f"there are {have}")  # fmt: skip
    chosen = seeds.stream(manifest.seed, "calibration").permutation(len(source))
    images = source.take(chosen[: manifest.images])
    if manifest.sha256 is not None and manifest.sha256 != images.sha256:
        raise InputError(
            f"{path}: the selected images have digest {images.sha256}, the manifest expects "
            f"{manifest.sha256}"
        )
    return images
