"""The whole way from a recipe to a report; each stage can also be run alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from resq_deploy import artifacts, data, progress, runtime
from resq_deploy.adjust import adjust
from resq_deploy.attack import attack, marks
from resq_deploy.data import calibration
from resq_deploy.data.base import Dataset, Splits
from resq_deploy.errors import HeaderMismatch
from resq_deploy.export import export
from resq_deploy.inject import inject
from resq_deploy.metrics import top1
from resq_deploy.recipe import Prove, Recipe
from resq_deploy.report import report
from resq_deploy.train import planned, train

COMPARED = ("baseline", "attack", "fault", "adjust")
"""The stages that are exported, proved and compared; the table's rows."""
SINGLE = ("baseline", "adjust")
"""The stages that get a single-flip campaign."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def harden(
    recipe: Recipe, *, out: Path, device: str = "cpu", fresh: bool = False
) -> dict[str, Path]:
    """Train every stage that the recipe asks for, and adjust; the checkpoint of each, by name."""
    found: dict[str, Path] = {}
    last = None
    for stage in planned(recipe):
        last = train(recipe, stage, out=out / stage, start=last, device=device, fresh=fresh)
        found[stage] = last
    assert last is not None
    splits = data.of(recipe.data)
    found["adjust"] = adjust(
        last,
        out=out / "adjust",
        images=calibration.load(recipe.data, splits),
        config=recipe.adjust,
        seed=recipe.seed,
        fresh=fresh,
    )
    return found


def _clean(model: Path, test: Dataset, out: Path) -> None:
    inputs = {"model_sha256": artifacts.sha256(model), "data_sha256": test.sha256}
    if out.is_file() and artifacts.read_json(out).get("inputs") == inputs:
        return
    session = runtime.session(runtime.read_model(model), threads=0)
    right = top1(runtime.run(session, runtime.adapt(test.x, session))) == test.y
    facts = {"n_correct": int(right.sum()), "n_total": len(test), "correct": marks(right)}
    artifacts.write_json(out, {"inputs": inputs, **facts})


def _campaign(store: Path, fresh: bool, **options: Any) -> None:
    """Start or continue a campaign; one that was made from other inputs is replaced."""
    if fresh:
        _remove_store(store)
    store.parent.mkdir(parents=True, exist_ok=True)
    try:
        inject(out=store, resume=store.exists(), **options)
    except HeaderMismatch:
        _remove_store(store)
        inject(out=store, **options)


def _remove_store(store: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        store.with_name(store.name + suffix).unlink(missing_ok=True)


def prove(
    stage: str,
    model: Path,
    twin: Path,
    test: Dataset,
    config: Prove,
    *,
    out: Path,
    seed: int,
    workers: int,
    fresh: bool = False,
) -> None:
    """Measure one exported file: clean accuracy, attacks, BER sweep, single flips."""
    _clean(model, test, out / "clean.json")
    images = test.first(min(config.images, len(test)))
    if fresh:
        (out / "attack.json").unlink(missing_ok=True)
    attack(
        model, twin, images, epsilons=config.epsilons, steps=config.steps,
        restarts=config.restarts, seed=seed, check=False, out=out / "attack.json",
    )  # fmt: skip
    common = {
        "model": model, "seed": seed, "workers": workers, "confidence": config.confidence,
        "show": progress.bar,
    }  # fmt: skip
    _campaign(
        out / "ber.store", fresh, data=images, fault="ber", rates=config.rates,
        draws=config.draws, **common,
    )  # fmt: skip
    if stage in SINGLE:
        few = test.first(min(config.single_images, len(test)))
        _campaign(out / "single.store", fresh, data=few, margin=config.margin, **common)


def _take_over(before: Path, folder: Path, fresh: bool) -> None:
    """Copy what was proved of the same file, unless it is there: `clean.json` comes last."""
    mark = folder / "clean.json"
    if not fresh and mark.is_file() and mark.read_bytes() == (before / mark.name).read_bytes():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    _remove_store(folder / "ber.store")
    for name in ("ber.store", "attack.json", mark.name):
        shutil.copyfile(before / name, folder / name)


def run(
    recipe: Recipe,
    *,
    out: Path,
    device: str = "cpu",
    workers: int | None = None,
    fresh: bool = False,
) -> Path:
    """Data, training, adjusting, export, proof, report; returns the path of the HTML page.

    Whatever exists in `out` and was made from the same inputs is kept; an interrupted run
    continues where it was, and a file that was proved once is not proved again under another
    stage's name. `workers` processes run the campaigns (default: one per core).
    """
    splits: Splits = data.of(recipe.data)
    stages = harden(recipe, out=out, device=device, fresh=fresh)
    artifacts.write_json(out / "recipe.json", recipe.portable())
    proved: dict[str, Path] = {}
    for stage in (s for s in COMPARED if s in stages):
        step(f"export {stage}")
        model = export(
            stages[stage], out=out / "export" / stage, images=splits.test, config=recipe.export
        )
        step(f"prove {stage}")
        folder = out / "prove" / stage
        before = proved.setdefault(artifacts.sha256(model), folder)
        if before != folder:  # as where stage 3 found nothing to change
            _take_over(before, folder, fresh)
        prove(
            stage, model, stages[stage], splits.test, recipe.prove, out=folder,
            seed=recipe.seed, workers=workers or cores(), fresh=fresh and before == folder,
        )  # fmt: skip
    return report([out], out=out / "report.html")


def step(what: str) -> None:
    """A plain line between progress bars."""
    import click

    click.echo(what, err=True)
