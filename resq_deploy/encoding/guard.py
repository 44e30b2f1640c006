"""Range guard: codes of 7 bits, so that the two top bits of a byte must agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding.base import ALL
from resq_deploy.encoding.table import Checked


@dataclass(frozen=True, kw_only=True)
class Guard(Checked):
    """Codes in [-64, 63]: a flip of bit 7 or of bit 6 is seen, one of both is not.

    Costs the lowest bit of precision: the scale of a channel is max|w| / 63.
    """

    kind = "guard"
    limit: ClassVar[int] = 63

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        return np.asarray((ALL >= -64) & (ALL < 64))
