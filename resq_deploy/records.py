"""The frozen values that travel between the stages. Counts are stored, rates derived."""

from __future__ import annotations

from dataclasses import dataclass

from resq_deploy.errors import InputError


def _count(name: str, value: int, upper: int | None = None) -> None:
    if value < 0 or (upper is not None and value > upper):
        limit = "[0, inf)" if upper is None else f"[0, {upper}]"
        raise InputError(f"{name} must lie in {limit}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A point estimate with its confidence interval; all in the unit of the estimate."""

    value: float
    low: float
    high: float
    confidence: float
    """Nominal coverage, in (0, 1)."""
    n: int
    """Number of independent observations (images or fault patterns) behind it."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """`n_correct` of `n_total` images classified correctly."""

    n_correct: int
    n_total: int

    def __post_init__(self) -> None:
        _count("n_total", self.n_total)
        _count("n_correct", self.n_correct, self.n_total)

    @property
    def rate(self) -> float:
        """Accuracy in [0, 1]; NaN when nothing was counted."""
        return self.n_correct / self.n_total if self.n_total else float("nan")


@dataclass(frozen=True, kw_only=True, order=True)
class Site:
    """One stored bit of a file."""

    tensor: str
    """Name of the initializer."""
    offset: int
    """Element offset in C order, from 0."""
    bit: int
    """0 (least significant) to width - 1 (sign bit of a signed type)."""

    def __post_init__(self) -> None:
        _count("offset", self.offset)
        _count("bit", self.bit)


OUTCOMES = ("masked", "benign", "sdc", "due")
"""What a trial can come to."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault pattern evaluated on all images of a campaign."""

    trial: int
    """Number within the campaign, from 0; names the random stream."""
    rate: float | None
    """Bit error rate in [0, 1]; None where the fault model has none."""
    n_flips: int
    """Stored bits that the pattern inverts."""
    site: Site | None
    """The stored bit that the fault struck; None when it struck any other number than one."""
    n_total: int
    """Images."""
    n_correct: int
    """Images whose top-1 is the label."""
    n_sdc: int
    """Images whose top-1 differs from the golden run (silent data corruption, SDC-1)."""
    n_changed: int
    """Images whose output differs from the golden run in at least one bit."""
    n_sdc5: int = 0
    """Images whose top-1 is not among the golden run's five highest outputs (SDC-5)."""
    n_nonfinite: int = 0
    """Images whose output holds a NaN or an infinity."""
    margin_lost: float = 0.0
    """Mean over the images with finite outputs, in output units: by how much the golden top-1's
    lead over the next best class shrank; negative where it grew."""
    margin_worst: float = 0.0
    """The largest such loss on one image."""
    refused: bool = False
    """onnxruntime did not load or run the file: a detected error, no image is answered."""

    def __post_init__(self) -> None:
        _count("trial", self.trial)
        _count("n_flips", self.n_flips)
        _count("n_correct", self.n_correct, self.n_total)
        _count("n_changed", self.n_changed, self.n_total)
        _count("n_sdc", self.n_sdc, self.n_changed)
        _count("n_sdc5", self.n_sdc5, self.n_sdc)
        _count("n_nonfinite", self.n_nonfinite, self.n_total)

    @property
    def outcome(self) -> str:
        """One of OUTCOMES.

        `due` (detected unrecoverable error: the runtime refused the file), `masked` (no output
        changed), `sdc` (a top-1 changed on some image) or `benign`.
        """
        if self.refused:
            return "due"
        if self.n_changed == 0:
            return "masked"
        return "sdc" if self.n_sdc else "benign"
