"""scikit-learn's digits (1,797 8x8 images), enlarged to 32x32: the embedded default."""

from __future__ import annotations

import numpy as np

from resq_deploy.data.base import Dataset, Split
from resq_deploy.errors import MissingExtra
from resq_deploy.seeds import stream

N_TEST = 1000  # large enough for intervals of +-3 points; 797 images remain for training


def load(split: Split) -> Dataset:
    """797 training or 1,000 test images (N, 1, 32, 32) uint8; the split is fixed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("sklearn", "train") from error
    bunch = load_digits()
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    x = x.repeat(4, axis=2).repeat(4, axis=3)
    y = bunch.target.astype(np.int64)
    order = stream(0, "digits", "split").permutation(len(y))
    rows = order[:N_TEST] if split == "test" else order[N_TEST:]
    return Dataset(name=f"digits/{split}", x=x[rows], y=y[rows])
