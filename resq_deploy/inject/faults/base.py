"""The interface of a fault model."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Flat = NDArray[np.int64]


class Fault(Protocol):
    """Draws fault patterns; the same arguments always give the same pattern.

    Contract, tested for every model: the indices are distinct, lie in [0, n_bits), and depend
    on the arguments only, not on which patterns were drawn before.
    """

    @property
    def name(self) -> str:
        """What the command line calls it."""

    def sample(self, n_bits: int, *, seed: int, draw: int, rate: float | None = None) -> Flat:
        """Flat bit indices that pattern number `draw` (from 0) flips under the root `seed`.

        `rate` is the bit error rate in [0, 1] for models that have one, else None.
        """
