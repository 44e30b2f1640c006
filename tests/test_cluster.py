"""Campaigns on a Dask cluster: the same store as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from test_campaign import DATA, trials

import models
from resq_deploy.errors import InputError, ResqError
from resq_deploy.inject import campaign, inject, observers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "model.onnx"
    path.write_bytes(models.quantized("qdq-channel"))
    return path


LOCAL: Any = {"threads_per_worker": 1, "processes": True, "dashboard_address": "127.0.0.1:0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with LocalCluster(n_workers=2, **LOCAL) as found:
        yield found


@pytest.mark.parametrize("engine", campaign.ENGINES)
def test_a_cluster_fills_the_same_store(
    model: Path, cluster: Any, tmp_path: Path, engine: str
) -> None:
    options = {"trials": 13, "seed": 3, "engine": engine}
    alone = inject(model, DATA, out=tmp_path / "alone", **options)
    spread = inject(
        model, DATA, out=tmp_path / "spread", scheduler=cluster.scheduler_address, **options
    )
    assert trials(tmp_path / "spread") == trials(tmp_path / "alone")
    assert spread["outcomes"] == alone["outcomes"]


def test_both_workers_run_trials(model: Path, cluster: Any, tmp_path: Path) -> None:
    inject(model, DATA, out=tmp_path / "s", trials=9, scheduler=cluster.scheduler_address)
    with Client(cluster.scheduler_address) as client:
        chunks = client.run(lambda: observers._evaluator and tuple(observers._evaluator.chunk))
    assert set(chunks.values()) == {(0, len(DATA.x), True)}
    assert len(chunks) == 2


def test_other_versions_on_a_worker_are_refused(
    model: Path, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = observers._facts() | {"onnxruntime": "0.1"}
    monkeypatch.setattr(observers, "_facts", lambda: facts)
    with pytest.raises(InputError, match=r"worker has onnxruntime .*, this machine has 0\.1"):
        inject(model, DATA, out=tmp_path / "s", trials=5, scheduler=cluster.scheduler_address)


def test_a_cluster_that_dies_leaves_what_was_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalCluster(n_workers=1, **LOCAL) as dying:
        observe = observers.Cluster.observe

        def cut(self: Any, numbers: Any) -> Iterator:
            for i, batch in enumerate(observe(self, numbers)):
                yield batch
                if i == 0:
                    dying.close()

        monkeypatch.setattr(observers.Cluster, "observe", cut)
        with pytest.raises(ResqError, match="cluster was lost.*--resume"):
            inject(model, DATA, out=tmp_path / "s", trials=40, scheduler=dying.scheduler_address)
    monkeypatch.undo()
    kept = trials(tmp_path / "s")
    assert 0 < len(kept) < 40
    inject(model, DATA, out=tmp_path / "s", trials=40, resume=True)
    inject(model, DATA, out=tmp_path / "whole", trials=40)
    assert trials(tmp_path / "s") == trials(tmp_path / "whole")


def test_no_scheduler_and_workers_of_many_threads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "CONNECT_S", 0.2)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(InputError, match=f"--scheduler {address} given; no Dask scheduler"):
            inject(model, DATA, out=tmp_path / "s", trials=3, scheduler=address)
    monkeypatch.undo()
    with (
        LocalCluster(n_workers=1, **LOCAL | {"threads_per_worker": 2}) as wide,
        pytest.raises(
            InputError, match=r"1 workers with \[2\] threads each; expected .*--nthreads"
        ),
    ):
        inject(model, DATA, out=tmp_path / "s", trials=3, scheduler=wide.scheduler_address)
    assert not (tmp_path / "s").exists(), "what was refused leaves no store"
