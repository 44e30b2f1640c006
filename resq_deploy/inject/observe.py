"""What one trial did to the answers: sums and extremes over images, which add up over chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics
from resq_deploy.records import Site, Trial

Array = NDArray[Any]


TOP = 5
MARGIN_UNIT = 2.0**-20
"""Margins are summed as whole multiples of this part of an output unit, so that sums over chunks
do not depend on their order."""


def _flat(output: Array) -> NDArray[np.float64]:
    return metrics.flat(output).astype(np.float64)


def _margins(output: NDArray[np.float64], top1: NDArray[np.int64]) -> NDArray[np.float64]:
    """(M,) lead of class `top1` (M,) over the best other class; NaN where it is not finite."""
    if output.shape[1] < 2:
        return np.zeros(len(output))
    rows = np.arange(len(output))
    others = output.copy()
    others[rows, top1] = -np.inf
    finite = np.isfinite(output).all(axis=1)
    lead = np.full(len(output), np.nan)
    lead[finite] = output[finite, top1[finite]] - others[finite].max(axis=1)
    return lead


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
    def top5(self) -> NDArray[np.int64]:
        """(N, 5) classes of the highest outputs, or all where there are fewer."""
        return np.argsort(-_flat(self.output), axis=1, kind="stable")[:, :TOP]

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) is the top-1 the label?"""
        return np.asarray(self.top1 == self.y)

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """(N,) lead of the top-1 over the next best class; NaN where an output is not finite."""
        return _margins(_flat(self.output), self.top1)


class Struck(NamedTuple):
    """What a trial corrupts."""

    rate: float | None
    """Bit error rate in [0, 1]; None where the fault model has none."""
    n_flips: int
    """Stored bits that it inverts."""
    site: Site | None
    """The stored bit that it struck, None unless it was just one."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Counts over the images of a trial, or over a chunk of them; chunks add up."""

    n_total: int = 0
    n_correct: int = 0
    n_sdc: int = 0
    n_changed: int = 0
    n_sdc5: int = 0
    n_nonfinite: int = 0
    n_margins: int = 0
    """Images whose golden and faulty outputs are finite."""
    margin_lost: int = 0
    """Sum over those images, in MARGIN_UNITs, of the golden top-1's lost lead."""
    margin_worst: float = -math.inf
    """The largest such loss, in output units; minus infinity without such an image."""
    refused: bool = False
    """onnxruntime did not load or run the file: no image has an answer."""

    def __add__(self, other: Observed) -> Observed:
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("margin_worst", "refused")
        }
        return Observed(
            **sums,
            margin_worst=max(self.margin_worst, other.margin_worst),
            refused=self.refused or other.refused,
        )


def observe(golden: Golden, output: Array, images: NDArray[np.int64] | None = None) -> Observed:
    """Compare `output` (M, ...) with the golden run, bit for bit and by its highest classes.

    `images` (M,), ascending: which images `output` is about, where the others gave the golden
    output; by default all of them (M = N).

    SDC-1 (the top-1 differs from the golden top-1) and SDC-5 (it is not among the golden run's
    five highest) are those of Li et al., "Understanding error propagation in deep learning neural
    network (DNN) accelerators and applications", SC 2017.
    """
    if images is None:
        images = np.arange(len(golden.y))
    top1 = metrics.top1(output)
    wrong = top1 != golden.top1[images]
    outside = (golden.top5[images][wrong] != top1[wrong, None]).all(axis=1)
    before = golden.margins
    after = _margins(_flat(output), golden.top1[images])
    lost = before[images] - after
    lost = lost[np.isfinite(lost)]
    n_untouched = int(np.isfinite(before).sum()) - int(np.isfinite(before[images]).sum())
    untouched = [0.0] if n_untouched else []
    return Observed(
        n_total=len(golden.y),
        n_correct=int(golden.correct.sum())
        + int((top1 == golden.y[images]).sum())
        - int(golden.correct[images].sum()),
        n_sdc=int(wrong.sum()),
        n_changed=int(metrics.changed(golden.output[images], output).sum()),
        n_sdc5=int(outside.sum()),
        n_nonfinite=int(np.isnan(before).sum())
        - int(np.isnan(before[images]).sum())
        + int(np.isnan(after).sum()),
        n_margins=n_untouched + lost.size,
        margin_lost=sum(int(units) for units in np.rint(lost / MARGIN_UNIT).tolist()),
        margin_worst=max([*untouched, *lost.tolist()], default=-math.inf),
    )


def refused(golden: Golden) -> Observed:
    """What is counted when onnxruntime refuses the faulty file: no image is answered."""
    return Observed(n_total=len(golden.y), refused=True)


def trial(number: int, struck: Struck, observed: Observed) -> Trial:
    """The record of a trial whose chunks of images add up to `observed`.

    A trial that onnxruntime refused on some images counts as refused on all.
    """
    found = Observed(n_total=observed.n_total, refused=True) if observed.refused else observed
    n = found.n_margins
    return Trial(
        trial=number,
        rate=struck.rate,
        n_flips=struck.n_flips,
        site=struck.site,
        n_total=found.n_total,
        n_correct=found.n_correct,
        n_sdc=found.n_sdc,
        n_changed=found.n_changed,
        n_sdc5=found.n_sdc5,
        n_nonfinite=found.n_nonfinite,
        margin_lost=found.margin_lost * MARGIN_UNIT / n if n else 0.0,
        margin_worst=found.margin_worst if n else 0.0,
        refused=found.refused,
    )
