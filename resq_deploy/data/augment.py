"""Training-time augmentation on uint8 batches; one function a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[Any]


def _crop(x: Images, rng: np.random.Generator, pad: int) -> Images:
    n, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w), axis=(2, 3))
    top, left = rng.integers(0, 2 * pad + 1, (2, n))
    return np.asarray(windows[np.arange(n), :, top, left])


def none(x: Images, rng: np.random.Generator) -> Images:
    """Images as they are."""
    return x


def crop(x: Images, rng: np.random.Generator) -> Images:
    """Zero-pad by 4 pixels, cut a random window (digits must not be mirrored)."""
    return _crop(x, rng, 4)


def crop_flip(x: Images, rng: np.random.Generator) -> Images:
    """Zero-pad by 4 pixels, cut a random window, mirror every other image: usual for CIFAR."""
    x = _crop(x, rng, 4)
    mirror = rng.random(len(x)) < 0.5
    x[mirror] = x[mirror, ..., ::-1]
    return x


AUGMENTATIONS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "none": none,
    "crop": crop,
    "crop-flip": crop_flip,
}
