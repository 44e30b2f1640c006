"""Functions compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile when first called; the result is kept on disk where there is a place for it.

    Options as of `numba.njit`; divisions give infinity and NaN, indices are not checked.
    """
    options |= {"error_model": "numpy", "boundscheck": False}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written
            return njit(**options)(function)

    return decorate
