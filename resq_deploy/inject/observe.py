"""What one trial did to the answers: sums and extremes over images, which add up over chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics
from resq_deploy.records import Site, Trial

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """The run without faults of some images, and what observations compare with."""

    output: Array
    """(N, ...) first output of the file."""
    y: NDArray[np.int64]
    """(N,) labels."""

    @cached_property
    def top1(self) -> NDArray[np.int64]:
        """(N,) arg max."""
        return metrics.top1(self.output)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.top1 == self.y)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Counts over the images of a trial, or over a chunk of them; chunks add up."""

    n_total: int = 0
    n_correct: int = 0
    n_sdc: int = 0
    n_changed: int = 0
    refused: bool = False
    """onnxruntime did not load or run the file: no image has an answer."""

    def __add__(self, other: Observed) -> Observed:
        return Observed(
            n_total=self.n_total + other.n_total,
            n_correct=self.n_correct + other.n_correct,
            n_sdc=self.n_sdc + other.n_sdc,
            n_changed=self.n_changed + other.n_changed,
            refused=self.refused or other.refused,
        )


def observe(golden: Golden, output: Array, images: NDArray[np.int64] | None = None) -> Observed:
    """Compare `output` (M, ...) with the golden run, bit for bit and by arg max.

    `images` (M,), ascending: which images `output` is about, where the others gave the golden
    output; by default all of them (M = N).
    """
    chosen = slice(None) if images is None else images
    before = golden.output[chosen]
    top1 = metrics.top1(output)
    gained = int((top1 == golden.y[chosen]).sum()) - int(golden.correct[chosen].sum())
    return Observed(
        n_total=len(golden.y),
        n_correct=int(golden.correct.sum()) + gained,
        n_sdc=int((top1 != golden.top1[chosen]).sum()),
        n_changed=int(metrics.changed(before, output).sum()),
    )


def refused(golden: Golden) -> Observed:
    """What is counted when onnxruntime refuses the faulty file: no image is answered."""
    return Observed(n_total=len(golden.y), refused=True)


def trial(
    number: int, rate: float | None, n_flips: int, site: Site | None, observed: Observed
) -> Trial:
    """The record of a trial; `site` is the cell that it struck, None unless it was just one."""
    return Trial(
        trial=number,
        rate=rate,
        n_flips=n_flips,
        site=site,
        n_total=observed.n_total,
        n_correct=observed.n_correct,
        n_sdc=observed.n_sdc,
        n_changed=observed.n_changed,
    )
