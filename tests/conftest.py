"""Shared artefacts: one tiny run of the whole pipeline for all tests that look at its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from tiny import write_recipe


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of a finished run of the tiny recipe (one worker), the same for all processes."""
    from resq_deploy import pipeline, recipe

    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # every process of pytest-xdist has a folder in it
    folder, done = folder / "tiny", folder / "tiny.done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir(exist_ok=True)  # another process may have failed here: go on
            pipeline.run(recipe.load(write_recipe(folder)), out=folder / "run", workers=1)
            done.touch()
    return folder / "run"
