"""What a trial counts, against loops written out, and that chunks add up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_deploy.inject.observe import Golden, Observed, Struck, observe, refused, trial

N, C = 9, 7


def outputs(seed: int, *, faulty: bool, kind: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (N, C)).astype(kind)  # few values, so that ties are common
    if faulty and kind is np.float32:
        scores[rng.random((N, C)) < 0.03] = rng.choice([np.nan, np.inf, -np.inf])
    return scores


def by_hand(golden: np.ndarray, output: np.ndarray, y: np.ndarray) -> dict:
    """One image at a time, in plain Python."""
    found = {"n_correct": 0, "n_sdc": 0, "n_sdc5": 0, "n_changed": 0, "n_nonfinite": 0}
    lost = []
    for g, o, label in zip(golden, output, y, strict=True):
        before, after = int(np.argmax(g)), int(np.argmax(o))
        ranked = sorted(range(C), key=lambda c: (-float(g[c]), c))
        found["n_correct"] += after == label
        found["n_sdc"] += after != before
        found["n_sdc5"] += after not in ranked[:5]
        found["n_changed"] += g.tobytes() != o.tobytes()
        finite = all(math.isfinite(v) for v in o)
        found["n_nonfinite"] += not finite
        if finite:

            def lead(row: np.ndarray, best: int = before) -> float:
                return float(row[best]) - max(float(row[c]) for c in range(C) if c != best)

            lost.append(lead(g) - lead(o))
    return {**found, "margin_lost": np.mean(lost), "margin_worst": max(lost)}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([np.float32, np.uint8, np.int8]))
def test_counts_equal_a_loop_over_images(seed: int, kind: type) -> None:
    golden, output = (
        outputs(seed, faulty=False, kind=kind),
        outputs(seed + 1, faulty=True, kind=kind),
    )
    output[:3] = golden[:3]
    y = np.random.default_rng(seed).integers(0, C, N)
    found = trial(5, Struck(None, 1, None), observe(Golden(output=golden, y=y), output))
    for name, value in by_hand(golden, output, y).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6), name
    assert (found.trial, found.n_total, found.refused) == (5, N, False)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, N), st.integers(0, N))
def test_chunks_and_changed_images_alone_add_up_to_the_whole(seed: int, a: int, b: int) -> None:
    golden, output = outputs(seed, faulty=False), outputs(seed + 1, faulty=True)
    output[1::3] = golden[1::3]
    y = np.random.default_rng(seed).integers(0, C, N)
    whole = observe(Golden(output=golden, y=y), output)
    total = Observed()
    cuts = [0, *sorted([a, b]), N]
    for start, end in itertools.pairwise(cuts):
        part = Golden(output=golden[start:end], y=y[start:end])
        rows = np.flatnonzero((golden[start:end] != output[start:end]).any(axis=1))
        total += observe(part, output[start:end][rows], rows)
    assert total == whole  # exactly: no sum depends on the order


def test_an_image_without_an_answer_is_not_right() -> None:
    golden = Golden(output=np.eye(3, dtype=np.float32), y=np.arange(3))
    part = observe(golden, golden.output)
    found = trial(0, Struck(0.1, 7, None), part + refused(golden))
    assert (found.outcome, found.n_total, found.n_correct, found.n_sdc) == ("due", 6, 0, 0)
    assert trial(0, Struck(None, 1, None), part).outcome == "masked"


def test_a_golden_run_that_is_not_finite_has_no_margin() -> None:
    output = np.array([[np.nan, 1.0], [2.0, 1.0]], np.float32)
    golden = Golden(output=output, y=np.zeros(2, np.int64))
    found = observe(golden, np.array([[2.0, 1.5]], np.float32), np.array([1]))
    assert (found.n_nonfinite, found.n_margins, found.margin_worst) == (1, 1, 0.5)


def test_the_worst_loss_is_none_where_only_untouched_images_lost_nothing() -> None:
    output = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    golden = Golden(output=output, y=np.zeros(2, np.int64))
    found = observe(golden, np.array([[3.0, 0.0]], np.float32), np.array([0]))
    assert (found.margin_worst, trial(0, Struck(None, 1, None), found).margin_lost) == (0.0, -1.0)


def test_one_class_has_no_margin_to_lose() -> None:
    golden = Golden(output=np.ones((2, 1), np.float32), y=np.zeros(2, np.int64))
    found = observe(golden, np.zeros((2, 1), np.float32))
    assert (found.n_changed, found.n_sdc, found.margin_lost, found.margin_worst) == (2, 0, 0, 0.0)
