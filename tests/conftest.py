"""Shared artefacts: one tiny run of the whole pipeline for all tests that look at its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_recipe


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the tiny recipe (one worker)."""
    from resq_deploy import pipeline, recipe

    folder = tmp_path_factory.mktemp("tiny")
    out = folder / "run"
    pipeline.run(recipe.load(write_recipe(folder)), out=out, workers=1)
    return out
