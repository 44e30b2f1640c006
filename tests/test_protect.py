"""Memory protections: the contract of reading on each, and what each code promises."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_deploy.errors import InputError
from resq_deploy.inject import protect
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.protect import secded
from resq_deploy.inject.space import Space, Tensor

# name, check bits of 20 int8 codes (20 bytes, three words of 8 bytes)
ALL = [("none", 0), ("parity", 20), ("secded", 24), ("secded:zero", 24), ("top:2", 0)]
NAMES = [name for name, _ in ALL]
CODES = np.random.default_rng(0).integers(-128, 128, 20).astype(np.int8)


def memory(name: str, codes: np.ndarray = CODES, dtype: str = "int8") -> Memory:
    guard = protect.parse(name)
    size = codes.size * (2 if dtype.endswith("int4") else 1)
    tensor = Tensor(name="w", dtype=dtype, shape=(size,), op_type="Conv", node="n", absorbed=False)
    return Memory(
        space=guard.stored(Space(tensors=(tensor,))),
        contents=(codes.view(np.uint8),),
        protection=guard,
    )


def read(mem: Memory, flips: list[int], codes: np.ndarray = CODES) -> np.ndarray:
    """All codes as they are read with some stored bits inverted."""
    found = codes.copy()
    for offsets, values in mem.read(np.array(flips, np.int64)).values():
        assert (found[offsets] != values).all(), "elements that do not differ must be left out"
        found[offsets] = values
    return found


def check_bit(mem: Memory, word: int, bit: int) -> int:
    return int(mem.space.starts[1]) + word * mem.space.tensors[1].width + bit


@pytest.mark.parametrize("name, check_bits", ALL)
class TestContract:
    def test_without_flips_everything_is_read_as_written(self, name: str, check_bits: int) -> None:
        assert memory(name).read(np.empty(0, np.int64)) == {}

    def test_name_is_what_parse_takes(self, name: str, check_bits: int) -> None:
        assert protect.parse(name).name == name

    def test_check_bits_are_in_the_fault_space_behind_the_data(
        self, name: str, check_bits: int
    ) -> None:
        mem = memory(name)
        assert mem.n_bits == 160 + check_bits
        sites = mem.space.sites(np.arange(160, mem.n_bits))
        assert all(site.tensor == "w#check" for site in sites)
        assert [mem.space.flat(site) for site in sites] == list(range(160, mem.n_bits))

    def test_cost_is_stated(self, name: str, check_bits: int) -> None:
        mem = memory(name)
        cost = mem.protection.cost(mem.space)
        assert cost["data_bytes"] == 20
        assert cost["check_bytes"] == -(-check_bits // 8)
        assert cost["overhead"] == cost["check_bytes"] / 20
        assert cost["hardened_bytes"] == (5 if name == "top:2" else 0)

    def test_stored_check_bits_are_those_of_the_contents(self, name: str, check_bits: int) -> None:
        """Changed data with the check bits of the changed data is read as it is."""
        mem, other = memory(name), CODES.copy()
        other[3:7] = ~other[3:7]
        changed = memory(name, other)
        all_bits = np.arange(mem.n_bits)
        flips = np.flatnonzero(mem.bits(all_bits) != changed.bits(all_bits))
        if name != "top:2":  # whose cells do not flip
            assert np.array_equal(read(mem, flips.tolist()), other)

    def test_words_are_read_independently(self, name: str, check_bits: int) -> None:
        mem = memory(name)
        flips = [[3, 5, 7], [64, 65, 66], [130, 131, 133]]  # one group a word of any size
        apart = [mem.read(np.array(group)) for group in flips]
        expected = CODES.copy()
        for change in apart:
            for offsets, values in change.values():
                expected[offsets] = values
        assert np.array_equal(read(mem, [bit for group in flips for bit in group]), expected)


@given(st.data())
@settings(deadline=None)
def test_secded_corrects_any_single_flip_in_every_word(data: st.DataObject) -> None:
    mem = memory("secded")
    flips = []
    for word, n_bytes in enumerate((8, 8, 4)):
        where = data.draw(st.none() | st.integers(0, n_bytes * 8 + 7))
        if where is not None and where < n_bytes * 8:
            flips.append(word * 64 + where)
        elif where is not None:
            flips.append(check_bit(mem, word, where - n_bytes * 8))
    assert np.array_equal(read(mem, flips), CODES)


def test_every_single_flip_of_a_word_is_corrected() -> None:
    mem = memory("secded")
    for bit in range(mem.n_bits):
        assert mem.read(np.array([bit])) == {}


@pytest.mark.parametrize("name", ["secded", "secded:zero"])
def test_every_double_flip_in_a_word_is_detected_and_none_miscorrected(name: str) -> None:
    mem = memory(name)
    bits = [*range(64), *(check_bit(mem, 0, b) for b in range(8))]
    for pair in combinations(bits, 2):
        found = read(mem, list(pair))
        expected = CODES.copy()
        if name == "secded":
            for bit in pair:
                if bit < 64:
                    expected.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        else:
            expected[:8] = 0
        assert np.array_equal(found, expected)


def test_triple_flips_may_be_miscorrected_in_a_fourth_place() -> None:
    """Three columns add up to a fourth one: what the real code does too."""
    mem, wrong, seen = memory("secded"), 0, 0
    for triple in combinations(range(24), 3):
        found = read(mem, list(triple))
        distance = int(np.bitwise_count(found.view(np.uint8) ^ CODES.view(np.uint8)).sum())
        assert distance in (2, 3, 4)  # 4: another data bit went wrong; 3: a check bit, or seen
        wrong, seen = wrong + (distance == 4), seen + (distance == 3)
    assert wrong > 0 and seen > 0


def test_the_code_is_hsiaos() -> None:
    """Distinct columns of odd weight, the least possible, each row with as many ones."""
    columns = [*secded.COLUMNS.tolist(), *(1 << i for i in range(8))]
    assert len(set(columns)) == 72
    weights = sorted(c.bit_count() for c in columns)
    assert weights == [1] * 8 + [3] * 56 + [5] * 8
    assert {sum(c >> row & 1 for c in columns) for row in range(8)} == {27}


@given(st.sets(st.integers(0, 8), min_size=1))
@settings(deadline=None)
def test_parity_zeroes_a_byte_with_an_odd_number_of_flips_and_passes_an_even_one(
    hit: set[int],
) -> None:
    mem = memory("parity")
    byte = 4
    flips = [byte * 8 + b if b < 8 else check_bit(mem, byte, 0) for b in hit]
    expected = CODES.copy()
    if len(hit) % 2:
        expected[byte] = 0
    else:
        for bit in hit - {8}:
            expected.view(np.uint8)[byte] ^= 1 << bit
    assert np.array_equal(read(mem, flips), expected)


def test_parity_zeroes_both_codes_of_a_packed_byte() -> None:
    mem = memory("parity", np.array([0x21, 0x43], np.uint8), dtype="uint4")
    offsets, values = mem.read(np.array([8]))["w"]
    assert (offsets.tolist(), values.tolist()) == ([2, 3], [0, 0])


@given(st.sets(st.integers(0, 159)))
@settings(deadline=None)
def test_top_bits_do_not_flip_and_the_others_do(hit: set[int]) -> None:
    expected = CODES.copy()
    for bit in hit:
        if bit % 8 < 6:
            expected.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert np.array_equal(read(memory("top:2"), list(hit)), expected)


def test_more_immune_bits_than_an_element_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"--protect top:9 given; the elements of w have 8 bits"):
        memory("top:9")
    assert memory("top:8").read(np.arange(160)) == {}


@pytest.mark.parametrize("text", ["", "top", "top:0", "secded:", "secded:one", "parity\n"])
def test_unknown_protections_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is unknown; expected one of none, parity"):
        protect.parse(text)


def test_every_protection_is_tested_and_documented() -> None:
    assert {name.partition(":")[0] for name in NAMES} == {
        name.partition(":")[0] for name in protect.PROTECTIONS
    }
    text = (Path(__file__).parents[1] / "docs/cli.md").read_text(encoding="utf-8")
    for name in protect.PROTECTIONS:
        assert f"| `{name}` |" in text, f"docs/cli.md wants a row for {name}"
