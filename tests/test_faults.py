"""Fault models: the contract of `Fault.sample` on each, and the statistics of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from resq_deploy import bits
from resq_deploy.errors import InputError
from resq_deploy.inject import faults
from resq_deploy.inject.faults import base
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.protect import Protection
from resq_deploy.inject.space import Space, Tensor

# name, rate: every fault model stands here once
MODELS = [
    ("single", None),
    ("k:3", None),
    ("ber", 0.01),
    ("ber", 0.5),
    ("adjacent:3", None),
    ("burst:8", None),
    ("stuck0", None),
    ("stuck0", 0.01),
    ("stuck1", None),
    ("0to1", 0.1),
    ("1to0", 0.1),
    ("byte", None),
]


def space(n_bits: int) -> Space:
    """A memory of one tensor of single bits."""
    return Space(
        tensors=(
            Tensor(name="w", dtype="uint1", shape=(n_bits,), op_type="", node="", absorbed=False),
        )
    )


SIZES = [64, 5_000, 2**22 + 1]  # the last one is above base.PERMUTED


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
        base.order.cache_clear()
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
    monkeypatch.setattr(base, "PERMUTED", 0)
    base.order.cache_clear()
    fault = faults.parse("single")
    drawn = [int(fault.sample(space(500), seed=0, draw=d)[0]) for d in range(500)]
    base.order.cache_clear()
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


@pytest.mark.parametrize(
    "text", ["", "k", "k:0", "k:-1", "k:x", "double", "ber:1", "burst", "stuck2", "single\n"]
)
def test_unknown_fault_models_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected one of single, k:K"):
        faults.parse(text)


@pytest.mark.parametrize(
    "name, draw, rate",
    [("single", 8, None), ("k:9", 0, None), ("ber", 0, None), ("ber", 0, 1.5)],
)
def test_what_cannot_be_drawn_is_refused(name: str, draw: int, rate: float | None) -> None:
    with pytest.raises(InputError):
        faults.parse(name).sample(space(8), seed=0, draw=draw, rate=rate)


def test_every_fault_model_is_tested_and_documented() -> None:
    tested = {faults.parse(name).name.partition(":")[0] for name, _ in MODELS}
    assert tested == {name.partition(":")[0] for name in faults.MODELS}
    text = (Path(__file__).parents[1] / "docs/cli.md").read_text(encoding="utf-8")
    for name in faults.MODELS:
        assert f"| `{name}` |" in text, f"docs/cli.md wants a row for {name}"


# --------------------------------------------------------------------------- what each one does

# tensors of 20, 3, 9 and 1 bits: places and bytes that end with a tensor
PARTS = Space(
    tensors=tuple(
        Tensor(name=f"t{n}", dtype="uint1", shape=(n,), op_type="", node="", absorbed=False)
        for n in (20, 3, 9, 1)
    )
)
OWNER = np.repeat(range(4), [20, 3, 9, 1])


def all_patterns(name: str, space: Space = PARTS) -> list[tuple[int, ...]]:
    fault = faults.parse(name)
    assert isinstance(fault, faults.Numbered)
    return [tuple(fault.pattern(space, i).tolist()) for i in range(fault.population(space))]


@pytest.mark.parametrize("n, places", [(1, 33), (2, 19 + 2 + 8), (3, 18 + 1 + 7), (10, 11)])
def test_adjacent_upsets_have_every_place_within_a_tensor_once(n: int, places: int) -> None:
    found = all_patterns(f"adjacent:{n}")
    assert len(set(found)) == len(found) == places
    for cells in found:
        assert cells == tuple(range(cells[0], cells[0] + n))
        assert len(set(OWNER[list(cells)])) == 1


def test_bytes_are_replaced_by_every_other_value_once() -> None:
    found = all_patterns("byte")
    assert len(set(found)) == len(found) == 2 * 255 + 15 + 7 + 255 + 1 + 1
    for cells in found:
        inside = np.array(cells) - np.flatnonzero(OWNER == OWNER[cells[0]])[0]
        assert len(set(inside // 8)) == 1 and len(set(OWNER[list(cells)])) == 1


def test_exhaustive_draws_are_the_patterns_in_another_order() -> None:
    fault = faults.parse("adjacent:2")
    drawn = [tuple(fault.sample(PARTS, seed=1, draw=d).tolist()) for d in range(29)]
    assert sorted(drawn) == sorted(all_patterns("adjacent:2"))


def test_bursts_are_uniform_over_places_and_inner_bits() -> None:
    fault = faults.parse("burst:4")
    drawn = [tuple(fault.sample(PARTS, seed=1, draw=d).tolist()) for d in range(4000)]
    starts = [cells[0] for cells in drawn]
    assert all(cells[-1] - cells[0] == 3 for cells in drawn)
    assert set(starts) == {*range(17), *range(23, 29)}
    shapes = [tuple(c - cells[0] for c in cells) for cells in drawn]
    kinds = [(0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2, 3)]
    assert stats.chisquare([shapes.count(k) for k in kinds]).pvalue > 1e-3
    assert stats.chisquare([starts.count(s) for s in sorted(set(starts))]).pvalue > 1e-3
    assert fault.population(PARTS) == 23 * 4


@pytest.mark.parametrize("n, flips", [(1, [0]), (2, [0, 1])])
def test_short_bursts_have_no_inner_bits(n: int, flips: list[int]) -> None:
    cells = faults.parse(f"burst:{n}").sample(PARTS, seed=0, draw=0)
    assert (cells - cells[0]).tolist() == flips


def memory_of(codes: list[int]) -> Memory:
    space = Space(
        tensors=(
            Tensor(
                name="w", dtype="int8", shape=(len(codes),), op_type="", node="", absorbed=False
            ),
        )
    )
    raw = np.array(codes, np.int8).view(np.uint8)
    return Memory(space=space, contents=(raw,), protection=Protection())


@settings(deadline=None)
@given(
    codes=st.lists(st.integers(-128, 127), min_size=1, max_size=20),
    name=st.sampled_from(["stuck0", "stuck1", "0to1", "1to0"]),
    draw=st.integers(0, 7),
)
def test_only_cells_that_hold_the_other_value_flip(codes: list[int], name: str, draw: int) -> None:
    memory, fault = memory_of(codes), faults.parse(name)
    cells = fault.sample(memory.space, seed=1, draw=draw, rate=0.3)
    flips = fault.flips(cells, memory)
    source = {"stuck0": 1, "stuck1": 0, "0to1": 0, "1to0": 1}[name]
    held = [codes[c // 8] >> (c % 8) & 1 for c in cells.tolist()]
    assert flips.tolist() == [
        c for c, bit in zip(cells.tolist(), held, strict=True) if bit == source
    ]
    # read back, no struck cell holds the source any more
    read = np.array(codes, np.int8)
    for offsets, values in memory.read(flips).values():
        read[offsets] = values
    assert all(int(read[c // 8]) >> (c % 8) & 1 != source for c in cells.tolist())


def test_stuck_cells_are_those_of_single_flips_and_of_the_bit_error_rate() -> None:
    """So that the models can be compared on the same cells."""
    a, b, ber = (faults.parse(n) for n in ("stuck0", "single", "ber"))
    for draw in range(5):
        assert (
            a.sample(PARTS, seed=3, draw=draw).tolist()
            == b.sample(PARTS, seed=3, draw=draw).tolist()
        )
        assert (
            a.sample(PARTS, seed=3, draw=draw, rate=0.2).tolist()
            == ber.sample(PARTS, seed=3, draw=draw, rate=0.2).tolist()
        )
