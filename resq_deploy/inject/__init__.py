"""Stage 4: flip bits in the weights of a deployed ONNX file and count what happens.

Works on files that are not ours, with numpy, onnx and onnxruntime alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resq_deploy import memory_map, metrics, progress, runtime
from resq_deploy.callable_module import make_callable
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject import campaign, discovery, plans, space
from resq_deploy.inject.compare import compare
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.rows import write_csv, write_parquet, write_sites
from resq_deploy.inject.summary import check_options, results
from resq_deploy.inject.verify import verify
from resq_deploy.memory_map import MemoryMap


def inject(
    model: Path,
    data: Dataset,
    *,
    out: Path,
    fault: str | None = None,
    targets: Sequence[str] = space.TARGETS[:1],
    protection: str = "none",
    trials: int | None = None,
    margin: float | None = None,
    confidence: float = 0.95,
    per_layer: bool = False,
    per_layer_bit: bool = False,
    exhaustive: bool = False,
    sites: Path | None = None,
    image: Path | None = None,
    map_file: Path | None = None,
    rates: Sequence[float] = (),
    draws: int | None = None,
    until_width: float | None = None,
    interval: metrics.Method = "wilson",
    raw_fit: float | None = None,
    engine: str = "fast",
    memory: int | None = None,
    seed: int = 0,
    workers: int = 1,
    scheduler: str | None = None,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    show: progress.Progress = progress.silent,
) -> dict[str, Any]:
    """Run a fault campaign on an ONNX file into the store `out`; returns its summary.

    The options are those of `resq-deploy inject` (see `plans.make` for which go together);
    `confidence` is that of the sample size and of every interval. `map_file` is the memory map of
    the model, and `image` a dump of the array that it describes, of which every byte is taken: then
    `targets` are those of the map. The summary is that of `summary.results`. KeyboardInterrupt
    leaves every finished trial in the store; the same call with `resume` continues it.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie in (0, 1), got {confidence}")
    raw = runtime.read_model(model)
    mapped = None
    if map_file is not None:
        mapped = memory_map.read(map_file, model_sha256=hashlib.sha256(raw).hexdigest())
    if image is not None:
        targets = _image_targets(mapped, targets, protection)
    found = discovery.discover(runtime.parse_model(raw), targets)
    stored = Memory.of(found, protection)
    plan = plans.make(
        stored.space,
        fault=fault,
        trials=trials,
        margin=margin,
        confidence=confidence,
        per_layer=per_layer,
        per_layer_bit=per_layer_bit,
        exhaustive=exhaustive,
        sites=sites,
        rates=rates,
        draws=draws,
        until_width=until_width,
        image=plans.read_image(image, mapped, stored) if image and mapped else None,
    )
    check_options(interval, raw_fit, plan.fault)
    campaign.run(
        raw,
        data,
        plan,
        out=out,
        targets=targets,
        protection=protection,
        engine=engine,
        memory=memory,
        seed=seed,
        workers=workers,
        scheduler=scheduler,
        shard=shard,
        resume=resume,
        show=show,
    )
    return results(
        [out], confidence=confidence, interval=interval, raw_fit=raw_fit, map_file=map_file
    )


def _image_targets(
    mapped: MemoryMap | None, targets: Sequence[str], protection: str
) -> tuple[str, ...]:
    """What a dump holds; InputError for options that contradict it."""
    if mapped is None:
        raise InputError("--image given without --map; add the memory_map.json of the model")
    if protection != "none":
        raise InputError(
            f"--protect {protection} with --image given; a dump is what is read, behind any "
            "protection: leave --protect out"
        )
    if tuple(targets) != space.TARGETS[:1] and set(targets) != set(mapped.targets):
        raise InputError(
            f"--target {','.join(targets)} with --image given; the dump holds "
            f"{','.join(mapped.targets)}: leave --target out"
        )
    return mapped.targets


make_callable(__name__, inject)

__all__ = ["compare", "inject", "results", "verify", "write_csv", "write_parquet", "write_sites"]
