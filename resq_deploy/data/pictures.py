"""Image files as arrays, with Pillow: bounded in size, every failure one line with the file."""

from __future__ import annotations

import io
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import InputError, MissingExtra

MAX_PIXELS = 2**26
"""Pixels that one image may have; a small file can claim any number."""


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("PIL", "train") from error
    return Image


def decode(
    raw: bytes,
    where: str,
    *,
    size: int | None,
    box: tuple[int, int, int, int] | None = None,
    formats: tuple[str, ...] = ("PNG", "PPM", "JPEG", "BMP"),
) -> NDArray[np.uint8]:
    """One image as (3, H, W) uint8, red, green, blue; greyscale is repeated, alpha dropped.

    `box` (left, top, right, bottom; right and bottom excluded) is cut out first; `size` resizes
    to size x size pixels, bilinear over the area that a pixel covers. Raises InputError, which
    names `where`, for what is no image of `formats`, is cut short or is too large.
    """
    image_module: Any = _pillow()
    try:
        with image_module.open(io.BytesIO(raw), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} in all")
            if box is not None:
                left, top, right, bottom = box
                if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                    raise ValueError(f"region {box} is not inside its {width} x {height} pixels")
            pixels = image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        unknown = type(error).__name__ == "UnidentifiedImageError"
        why = f"it is none of {', '.join(formats)}" if unknown else error
        raise InputError(
            f"{where} cannot be read as an image ({why}); replace it or take it away"
        ) from None
    if box is not None:
        pixels = pixels.crop(box)
    if size is not None:
        pixels = pixels.resize((size, size), image_module.Resampling.BILINEAR)
    return np.asarray(pixels, np.uint8).transpose(2, 0, 1)
