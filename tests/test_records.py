"""Records: frozen, checked once when built, rates derived from counts."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_deploy.errors import GateFailed, InputError, MissingExtra, ResqError
from resq_deploy.records import Count, Interval, Site, Trial


def trial(**changes: object) -> Trial:
    values: dict = {
        "trial": 0,
        "rate": None,
        "n_flips": 1,
        "site": Site(tensor="w", offset=3, bit=7),
        "n_total": 10,
        "n_correct": 8,
        "n_sdc": 1,
        "n_changed": 2,
    }
    return Trial(**{**values, **changes})


@pytest.mark.parametrize(
    ("n_changed", "n_sdc", "outcome"),
    [(0, 0, "masked"), (1, 0, "benign"), (1, 1, "sdc"), (10, 9, "sdc")],
)
def test_outcome(n_changed: int, n_sdc: int, outcome: str) -> None:
    assert trial(n_changed=n_changed, n_sdc=n_sdc).outcome == outcome


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trial", -1),
        ("n_flips", -1),
        ("n_correct", -1),
        ("n_correct", 11),  # of 10 images
        ("n_changed", 11),
        ("n_sdc", 3),  # a top-1 cannot change where the output did not: n_changed is 2
        ("n_sdc", -1),
    ],
)
def test_a_trial_that_cannot_be_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"^{field} must lie in .*, got {value}$"):
        trial(**{field: value})


@given(st.integers(0, 10**6), st.data())
def test_rate_is_derived_from_counts(n: int, data) -> None:
    k = data.draw(st.integers(0, n))
    rate = Count(n_correct=k, n_total=n).rate
    assert math.isnan(rate) if n == 0 else rate == k / n


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_a_count_that_cannot_be_is_refused(k: int, n: int) -> None:
    with pytest.raises(InputError, match="must lie in"):
        Count(n_correct=k, n_total=n)


@pytest.mark.parametrize("change", [{"offset": -1}, {"bit": -1}])
def test_a_site_that_cannot_be_is_refused(change: dict) -> None:
    with pytest.raises(InputError, match="must lie in"):
        Site(**{"tensor": "w", "offset": 0, "bit": 0, **change})


def test_sites_sort_by_tensor_offset_bit() -> None:
    sites = [Site(tensor=t, offset=o, bit=b) for t, o, b in [("b", 0, 0), ("a", 2, 1), ("a", 2, 0)]]
    assert [(s.tensor, s.offset, s.bit) for s in sorted(sites)] == [
        ("a", 2, 0),
        ("a", 2, 1),
        ("b", 0, 0),
    ]
    assert len({*sites, Site(tensor="b", offset=0, bit=0)}) == 3


@pytest.mark.parametrize(
    "record",
    [
        trial(),
        Site(tensor="w", offset=0, bit=0),
        Count(n_correct=1, n_total=2),
        Interval(value=0.5, low=0.4, high=0.6, confidence=0.95, n=10),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_are_frozen_keyword_only_and_survive_a_round_trip(record) -> None:
    first = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, first, 0)
    with pytest.raises(TypeError):
        type(record)(*dataclasses.asdict(record).values())
    again = pickle.loads(pickle.dumps(record))  # how they travel to workers
    assert again == record and hash(again) == hash(record)


def test_errors_carry_their_exit_code_and_the_pip_line() -> None:
    error = MissingExtra("torch", "train")
    assert isinstance(error, ResqError) and error.exit_code == 2
    assert 'pip install "resq-deploy[train]"' in str(error) and "\n" not in str(error)
    assert GateFailed("x").exit_code == 1
