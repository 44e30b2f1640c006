"""The campaign store: what goes in comes out, and nothing stored is ever lost."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_deploy import store
from resq_deploy.errors import HeaderMismatch, InputError
from resq_deploy.records import Count, Site, Trial
from resq_deploy.store import Header

HEADER = Header(
    model_sha256="a" * 64,
    data_sha256="b" * 64,
    n_images=10,
    fault="single",
    plan={"kind": "random", "trials": 5},
    seed=3,
    engine="reload",
    reloaded={},
    shard="0/1",
    golden=Count(n_correct=9, n_total=10),
    space=[{"name": "w", "dtype": "int8", "shape": [4], "n_bits": 32}],
    versions={"onnxruntime": "1.31.1", "numpy": "2.0", "python": "3.11"},
    cpu={"machine": "x86_64", "name": "CPU", "vnni": ["avx_vnni"], "x64quantprecision": False},
    warnings=["w"],
)


def trial(number: int, **fields: object) -> Trial:
    values: dict = {
        "trial": number,
        "rate": None,
        "n_flips": 1,
        "site": Site(tensor="w", offset=number, bit=7),
        "n_total": 10,
        "n_correct": 8,
        "n_sdc": 1,
        "n_changed": 2,
    }
    return Trial(**{**values, **fields})


def filled(path: Path, numbers: range, header: Header = HEADER) -> Path:
    with store.create(path, header) as opened:
        opened.add([trial(n) for n in numbers], seconds=1.5)
    return path


counts = st.integers(0, 50)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.lists(
        st.builds(
            lambda t, rate, flips, site, n, parts: Trial(
                trial=t,
                rate=rate,
                n_flips=flips,
                site=site,
                n_total=n,
                n_correct=round(parts[0] * n),
                n_changed=round(max(parts[1:]) * n),
                n_sdc=round(min(parts[1:]) * n),
                n_sdc5=round(min(parts) * n),
                n_nonfinite=round(parts[0] * n),
                margin_lost=parts[0] - 0.5,
                margin_worst=1e30 * parts[1],
                refused=parts[2] > 0.5,
            ),
            st.integers(0, 2**40),
            st.none() | st.floats(0, 1),
            st.integers(0, 2**40),
            st.none() | st.builds(Site, tensor=st.text(), offset=counts, bit=st.integers(0, 7)),
            counts,
            st.tuples(*[st.floats(0, 1)] * 3),
        ),
        unique_by=lambda t: t.trial,
    )
)
def test_records_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Trial]
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    with store.create(path, HEADER) as opened:
        opened.add(rows, seconds=0.25)
    with store.open_store(path) as opened:
        assert opened.header == HEADER
        assert opened.trials() == sorted(rows, key=lambda t: t.trial)
        assert opened.done() == {t.trial for t in rows}
        assert opened.seconds == 0.25


def test_an_existing_store_is_not_overwritten(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", range(3))
    with pytest.raises(InputError, match="--resume"):
        store.open_or_create(path, HEADER, resume=False)
    assert len(store.read([path])[1]) == 3


def test_resume_continues_and_adds_up_the_time(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", range(3))
    with store.open_or_create(path, HEADER, resume=True) as opened:
        assert opened.done() == {0, 1, 2}
        opened.add([trial(3)], seconds=2.0)
    assert store.read([path])[2] == 3.5


def test_resume_without_a_store_begins_one(tmp_path: Path) -> None:
    with store.open_or_create(tmp_path / "s", HEADER, resume=True) as opened:
        assert opened.done() == set()


OTHER = [
    ("model_sha256", {"model_sha256": "c" * 64}, '"aaaa'),
    ("data_sha256", {"data_sha256": "c" * 64}, '"bbbb'),
    ("n_images", {"n_images": 11}, "10 and 11"),
    ("fault", {"fault": "k:2"}, '"single" and "k:2"'),
    ("protection", {"protection": "secded"}, '"none" and "secded"'),
    ("plan", {"plan": {"kind": "random", "trials": 6}}, '"trials":5'),
    ("seed", {"seed": 4}, "3 and 4"),
    ("engine", {"engine": "fast"}, '"reload" and "fast"'),
    ("shard", {"shard": "0/2"}, '"0/1" and "0/2"'),
    ("golden", {"golden": Count(n_correct=8, n_total=10)}, "[9,10] and [8,10]"),
    ("space", {"space": []}, "[]"),
    (
        "versions.onnxruntime",
        {"versions": {**HEADER.versions, "onnxruntime": "1.99"}},
        '"1.31.1" and "1.99"',
    ),
    ("versions.numpy", {"versions": {**HEADER.versions, "numpy": "3"}}, '"2.0" and "3"'),
    ("cpu.vnni", {"cpu": {**HEADER.cpu, "vnni": []}}, "[]"),
]


@pytest.mark.parametrize("field, change, values", OTHER, ids=[row[0] for row in OTHER])
def test_resume_refuses_another_campaign_naming_the_field(
    tmp_path: Path, field: str, change: dict, values: str
) -> None:
    path = filled(tmp_path / "s", range(2))
    with pytest.raises(HeaderMismatch) as caught:
        store.open_or_create(path, replace(HEADER, **change), resume=True)
    assert f" {field} differs" in str(caught.value)
    assert values in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resume_accepts_another_python_and_cpu_name(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", range(2))
    other = replace(
        HEADER,
        versions={**HEADER.versions, "python": "3.12"},
        cpu={**HEADER.cpu, "name": "Other"},
        warnings=[],
    )
    store.open_or_create(path, other, resume=True).__exit__()


def test_shards_merge_into_one_campaign(tmp_path: Path) -> None:
    parts = [
        filled(tmp_path / f"s{i}", range(i, 6, 2), replace(HEADER, shard=f"{i}/2"))
        for i in range(2)
    ]
    assert store.merge(parts, tmp_path / "all") == 6
    header, trials, seconds = store.read([tmp_path / "all"])
    assert (header, [t.trial for t in trials], seconds) == (HEADER, list(range(6)), 3.0)


def test_identical_duplicates_merge_and_others_are_refused(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a", range(3)), filled(tmp_path / "b", range(2, 4))
    assert store.merge([a, b], tmp_path / "all") == 4
    with store.create(tmp_path / "c", HEADER) as opened:
        opened.add([trial(2, n_correct=7)], seconds=0)
    with pytest.raises(InputError, match="trial 2 of .* differs"):
        store.merge([a, tmp_path / "c"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_stores_of_other_campaigns_do_not_merge(tmp_path: Path) -> None:
    a = filled(tmp_path / "a", range(3))
    b = filled(tmp_path / "b", range(3), replace(HEADER, seed=4))
    with pytest.raises(HeaderMismatch, match="seed differs: 3 and 4"):
        store.merge([a, b], tmp_path / "all")


def _refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        store.open_store(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", range(5000))
    whole = path.read_bytes()
    for size in (10, 4096, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        assert str(path) in _refused(path)
    middle = len(whole) // 2 // 4096 * 4096
    path.write_bytes(whole[:middle] + bytes(4096) + whole[middle + 4096 :])
    assert "is damaged" in _refused(path)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "does not exist" in _refused(tmp_path / "none")
    (tmp_path / "text").write_text("trial,tensor\n" * 1000)
    assert "not a database" in _refused(tmp_path / "text")
    (tmp_path / "empty").touch()
    assert "not a campaign store" in _refused(tmp_path / "empty")
    db = sqlite3.connect(tmp_path / "other")
    db.executescript("CREATE TABLE meta (key, value); CREATE TABLE trials (a);")
    db.close()
    assert "not a campaign store" in _refused(tmp_path / "other")


def test_stores_of_an_earlier_format_are_refused_in_one_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", range(2))
    db = sqlite3.connect(path)
    db.execute("UPDATE meta SET value = '\"resq-deploy campaign 1\"' WHERE key = 'format'")
    db.commit()
    db.close()
    line = _refused(path)
    assert "'resq-deploy campaign 1' of an earlier version" in line and "again" in line
    with pytest.raises(HeaderMismatch):  # so that a pipeline replaces it
        store.open_or_create(path, HEADER, resume=True)


def test_a_full_disk_keeps_what_was_stored(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", range(100))
    with store.open_store(path) as opened:
        pages = opened._db.execute("PRAGMA page_count").fetchone()[0]
        opened._db.execute(f"PRAGMA max_page_count = {pages}")  # as if the disk ended here
        with pytest.raises(InputError, match="full"):
            opened.add([trial(n) for n in range(100, 9000)], seconds=1)
    assert [t.trial for t in store.read([path])[1]] == list(range(100))


def test_a_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "s", range(3))
    holder = sqlite3.connect(path)
    holder.execute("BEGIN IMMEDIATE")
    with store.open_store(path) as opened:
        opened._db.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(InputError, match="locked"):
            opened.add([trial(3)], seconds=1)
    holder.close()
    assert len(store.read([path])[1]) == 3


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; create it"):
        store.create(tmp_path / "none" / "s", HEADER)
