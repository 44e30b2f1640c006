"""Fault models: the contract of `Fault.sample` on each, and the statistics of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from resq_deploy import bits
from resq_deploy.errors import InputError
from resq_deploy.inject import faults
from resq_deploy.inject.faults import single
from resq_deploy.inject.space import Space, Tensor

# name, rate: every fault model stands here once
MODELS = [("single", None), ("k:3", None), ("ber", 0.01), ("ber", 0.5)]


def space(n_bits: int) -> Space:
    """A memory of one tensor of single bits."""
    return Space(
        tensors=(
            Tensor(name="w", dtype="uint1", shape=(n_bits,), op_type="", node="", absorbed=False),
        )
    )


SIZES = [64, 5_000, 2**22 + 1]  # the last one is above single.PERMUTED


@pytest.mark.parametrize("name, rate", MODELS)
@pytest.mark.parametrize("n_bits", SIZES)
class TestContract:
    def test_distinct_bits_of_the_space(self, name: str, rate: float | None, n_bits: int) -> None:
        flat = faults.parse(name).sample(space(n_bits), seed=1, draw=5, rate=rate)
        assert flat.dtype == np.int64
        assert len(np.unique(flat)) == len(flat)
        assert flat.size == 0 or (flat.min() >= 0 and flat.max() < n_bits)

    def test_depends_on_the_arguments_only(
        self, name: str, rate: float | None, n_bits: int
    ) -> None:
        def draw(number: int) -> list[int]:
            return faults.parse(name).sample(space(n_bits), seed=1, draw=number, rate=rate).tolist()

        forwards = [draw(number) for number in range(8)]
        single._order.cache_clear()
        backwards = [draw(number) for number in reversed(range(8))]
        assert forwards == backwards[::-1]
        assert len({tuple(flat) for flat in forwards}) > 1

    def test_depends_on_the_seed(self, name: str, rate: float | None, n_bits: int) -> None:
        fault = faults.parse(name)
        a, b = (
            [fault.sample(space(n_bits), seed=seed, draw=d, rate=rate).tolist() for d in range(8)]
            for seed in (1, 2)
        )
        assert a != b

    def test_name_is_what_parse_takes(self, name: str, rate: float | None, n_bits: int) -> None:
        assert faults.parse(name).name == name


@pytest.mark.parametrize(
    "name, n_bits, rate, patterns",
    [
        ("single", 1568, None, [[1567], [637], [796]]),
        ("single", 2**22 + 1, None, [[2136253], [2584223], [77079]]),
        ("k:3", 1568, None, [[175, 723, 1128], [457, 463, 806], [604, 920, 1550]]),
        ("ber", 1568, 0.003, [[323, 886, 1138], [514, 931, 1319], [656, 1134, 1339, 1366]]),
    ],
)
def test_patterns_of_published_results(
    name: str, n_bits: int, rate: float | None, patterns: list[list[int]]
) -> None:
    """Drawn by version 0.1.0 (seed 7, draws 0, 1 and 7): published results can be reproduced."""
    fault = faults.parse(name)
    drawn = [fault.sample(space(n_bits), seed=7, draw=d, rate=rate).tolist() for d in (0, 1, 7)]
    assert drawn == patterns


@settings(deadline=None)
@given(
    codes=st.lists(st.integers(-128, 127), min_size=1, max_size=40),
    fault=st.sampled_from(["single", "k:2", "ber"]),
    draw=st.integers(0, 7),
)
def test_a_pattern_applied_twice_restores(codes: list[int], fault: str, draw: int) -> None:
    array = np.array(codes, np.int8)
    rate = 0.2 if fault == "ber" else None
    flat = faults.parse(fault).sample(space(array.size * 8), seed=3, draw=draw, rate=rate)
    once = bits.flip_sites(array, flat // 8, flat % 8)
    assert bits.count_flips(array, once) == len(flat)
    assert np.array_equal(bits.flip_sites(once, flat // 8, flat % 8), array)


def test_single_flips_visit_every_bit_exactly_once() -> None:
    fault = faults.parse("single")
    drawn = [int(fault.sample(space(500), seed=0, draw=d)[0]) for d in range(500)]
    assert sorted(drawn) == list(range(500))


def test_rejection_gives_distinct_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space above the limit, small enough here to be drawn to its last bit."""
    monkeypatch.setattr(single, "PERMUTED", 0)
    single._order.cache_clear()
    fault = faults.parse("single")
    drawn = [int(fault.sample(space(500), seed=0, draw=d)[0]) for d in range(500)]
    single._order.cache_clear()
    assert sorted(drawn) == list(range(500))


@pytest.mark.parametrize("n_bits", [2**20, 2**22 + 1])
def test_single_flips_are_uniform(n_bits: int) -> None:
    fault = faults.parse("single")
    drawn = np.array([fault.sample(space(n_bits), seed=5, draw=d)[0] for d in range(8000)])
    for groups in (drawn * 16 // n_bits, drawn % 8):  # places in the file; bits of a byte
        assert stats.chisquare(np.bincount(groups)).pvalue > 1e-3


def test_sets_of_k_bits_are_uniform() -> None:
    fault = faults.parse("k:2")
    drawn = [tuple(fault.sample(space(6), seed=5, draw=d).tolist()) for d in range(3000)]
    counts = [drawn.count((i, j)) for i in range(6) for j in range(i + 1, 6)]
    assert sum(counts) == 3000  # ascending pairs of distinct bits, nothing else
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.9])
def test_flips_at_a_bit_error_rate_are_binomial(rate: float) -> None:
    """Sum over patterns, and spread between them, against the binomial distribution."""
    n_bits, draws = 20_000, 200
    fault = faults.parse("ber")
    n = np.array(
        [len(fault.sample(space(n_bits), seed=2, draw=d, rate=rate)) for d in range(draws)]
    )
    assert stats.binomtest(int(n.sum()), n_bits * draws, rate).pvalue > 1e-3
    spread = n.var(ddof=1) / (n_bits * rate * (1 - rate)) * (draws - 1)
    assert 1e-3 < stats.chi2.cdf(spread, draws - 1) < 1 - 1e-3


def test_every_bit_is_equally_likely_at_a_bit_error_rate() -> None:
    fault = faults.parse("ber")
    hits = np.concatenate([fault.sample(space(64), seed=2, draw=d, rate=0.1) for d in range(2000)])
    assert stats.chisquare(np.bincount(hits, minlength=64)).pvalue > 1e-3


def test_bits_flip_independently_of_their_neighbours() -> None:
    fault, n = faults.parse("ber"), 200_000
    flips = np.zeros(n, bool)
    flips[fault.sample(space(n), seed=2, draw=0, rate=0.2)] = True
    both = int((flips[1:] & flips[:-1]).sum())
    assert stats.binomtest(both, n - 1, 0.04).pvalue > 1e-3


@pytest.mark.parametrize("rate, flips", [(0.0, 0), (1.0, 1000), (1e-300, 0)])
def test_extreme_bit_error_rates(rate: float, flips: int) -> None:
    flat = faults.parse("ber").sample(space(1000), seed=0, draw=0, rate=rate)
    assert flat.tolist() == list(range(flips))


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.integers(1, 300))
def test_any_bit_error_rate_and_size(rate: float, n_bits: int) -> None:
    flat = faults.parse("ber").sample(space(n_bits), seed=0, draw=0, rate=rate)
    assert (np.diff(flat) > 0).all()
    assert flat.size == 0 or (flat[0] >= 0 and flat[-1] < n_bits)


@pytest.mark.parametrize("text", ["", "k", "k:0", "k:-1", "k:x", "double", "ber:1"])
def test_unknown_fault_models_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected single, k:K"):
        faults.parse(text)


@pytest.mark.parametrize(
    "name, draw, rate",
    [("single", 8, None), ("k:9", 0, None), ("ber", 0, None), ("ber", 0, 1.5)],
)
def test_what_cannot_be_drawn_is_refused(name: str, draw: int, rate: float | None) -> None:
    with pytest.raises(InputError):
        faults.parse(name).sample(space(8), seed=0, draw=draw, rate=rate)
