"""Only the most significant bits of every element are protected."""

from __future__ import annotations

from dataclasses import dataclass

from resq_deploy.inject.protect.base import Protection


@dataclass(frozen=True, kw_only=True)
class TopBits(Protection):
    """The `k` most significant bits of every element stand in cells that do not flip.

    Faults are drawn from all bits, as without protection; those that strike an immune bit change
    nothing. So campaigns with and without can be compared on the same faults. Costs no extra
    bits, but k hardened ones an element.
    """

    k: int

    @property
    def name(self) -> str:
        return f"top:{self.k}"

    @property
    def immune(self) -> int:
        return self.k
