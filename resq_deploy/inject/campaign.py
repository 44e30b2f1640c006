"""Run a plan: golden run first, then every trial that the store does not have yet.

What a trial yields depends on its number only, so one process, many, shards and resumed
campaigns fill the same store.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from resq_deploy import metrics, progress, runtime
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject import discovery, space
from resq_deploy.inject.evaluator import Chunk, Evaluator, Job
from resq_deploy.inject.observe import Observed, trial
from resq_deploy.inject.observers import Cluster, Processes, Serial
from resq_deploy.inject.plans import Plan
from resq_deploy.inject.reload import Reload
from resq_deploy.records import Count, Trial
from resq_deploy.store import Header, Store, open_or_create

ENGINES = ("fast", "reload")

BLOCK = 256
"""Trials that go through all chunks of images together: the golden run of a chunk is made again
for every block, which costs a few plain runs of its images."""


def _stages(plan: Plan, store: Store, shard: tuple[int, int]) -> Iterator[list[int]]:
    """Numbers still to run, stage by stage, until the plan has seen enough.

    A stage begins when every trial of those before it is in the store: what the plan decides
    does not depend on the number of workers or on interruptions.
    """
    index, n_shards = shard
    done = store.done()
    for number in range(plan.n_stages):
        numbers = plan.stage(number, store.trials() if number else [])
        if not numbers:
            return
        yield [n for n in numbers if n % n_shards == index and n not in done]


def _blocks(
    evaluator: Evaluator, chunks: Sequence[Chunk], stages: Iterator[list[int]]
) -> Iterator[tuple[Sequence[Chunk], list[int]]]:
    """Trials that run together, and the images in parts: all at once where no golden data are
    needed; else in `chunks`, and where these are several, BLOCK trials at a time."""
    everything = [Chunk(0, len(evaluator.job.x), golden=False)]
    for numbers in stages:
        few = [number for number in numbers if evaluator.needs_golden(number)]
        many = [number for number in numbers if not evaluator.needs_golden(number)]
        size = BLOCK if len(chunks) > 1 else max(1, len(few))
        yield everything, many
        for start in range(0, len(few), size):
            yield chunks, few[start : start + size]


def _trials(
    observer: Serial | Processes | Cluster, blocks: Iterator[tuple[Sequence[Chunk], list[int]]]
) -> Iterator[list[Trial]]:
    """The records of trials as they finish."""
    entered: Chunk | None = None
    for chunks, block in blocks:
        sums: dict[int, Observed] = {}
        for chunk in chunks if block else ():
            if entered != chunk:
                observer.enter(chunk)
                entered = chunk
            for batch in observer.observe(block):
                for number, _, observed in batch:
                    sums[number] = sums.get(number, Observed()) + observed
                if chunk == chunks[-1]:
                    yield [trial(number, struck, sums.pop(number)) for number, struck, _ in batch]


def _observer(
    evaluator: Evaluator, workers: int, scheduler: str | None
) -> Serial | Processes | Cluster:
    if scheduler is not None:
        return Cluster(evaluator.job, scheduler)
    if workers > 1:
        return Processes(evaluator.job, evaluator.network, workers)
    return Serial(evaluator)


WORKER = 256 * 2**20
"""Bytes of a worker process beside the images and golden data; 200 MiB were measured."""


def held() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _chunks(evaluator: Evaluator, workers: int, budget: int | None) -> list[Chunk]:
    """The images in parts whose golden data, and what faults change of them, fit in memory.

    A given `budget` is for the processes as well; without one, golden data get a third of the
    machine's memory.
    """
    n, network = len(evaluator.job.x), evaluator.network
    if network is None or not any(map(evaluator.needs_golden, evaluator.job.plan.trials())):
        return [Chunk(0, n)]
    processes = held() + (workers * (WORKER + evaluator.job.x.nbytes) if workers > 1 else 0)
    if budget is None:
        budget = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3 + processes
    each = max(1, network.bytes_per_image(workers))
    size = (budget - processes) // each
    unit = network.group or runtime.CHUNK
    if size < unit:
        raise InputError(
            f"--memory {budget} bytes given; the golden data of {unit} images, beside processes of "
            f"{processes} bytes, need {processes + unit * each} bytes with {workers} workers: give "
            "more, fewer --workers, or --engine reload"
        )
    size = min(n, size // unit * unit)
    # chunks of about one size: the last one is not much smaller
    size = -(-n // -(-n // size) // unit) * unit
    return [Chunk(start, min(n, start + size)) for start in range(0, n, size)]


def run(
    model: bytes,
    data: Dataset,
    plan: Plan,
    *,
    out: Path,
    targets: Sequence[str] = space.TARGETS[:1],
    protection: str = "none",
    engine: str = "fast",
    memory: int | None = None,
    seed: int = 0,
    workers: int = 1,
    scheduler: str | None = None,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    show: progress.Progress = progress.silent,
) -> None:
    """Run the trials of `plan` (those with trial % shard[1] == shard[0]) into the store `out`.

    `workers` processes of one thread each share the golden data of the fast engine. Processes and
    golden data take at most `memory` bytes (what onnxruntime makes of the model not counted); by
    default golden data take at most a third of the machine's. With `scheduler`, the address of a
    Dask scheduler, its workers do the work, and each has golden data of its own.
    KeyboardInterrupt leaves every finished trial in the store and is raised again; the same call
    with `resume` continues. Raises InputError for data that do not fit the model, HeaderMismatch
    when the store holds another campaign.
    """
    index, n_shards = shard
    if not 0 <= index < n_shards:
        raise InputError(f"--shard {index}/{n_shards} given; expected I/N with 0 <= I < N")
    if n_shards > 1 and plan.n_stages > 1:
        raise InputError(
            f"--shard {index}/{n_shards} given with --until-width; shards do not see each other's "
            "trials: use --workers"
        )
    if plan.model.reads and space.ACTIVATION in targets:
        raise InputError(
            f"--fault {plan.fault} with --target {space.ACTIVATION} given; what a value between "
            "kernels holds depends on the image: give a fault that flips, such as single or ber"
        )
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}")
    if scheduler is not None and workers > 1:
        raise InputError(
            f"--workers {workers} given with --scheduler; the cluster has workers of its own: "
            "leave --workers out"
        )
    if seed < 0:
        raise InputError(f"--seed must be at least 0, got {seed}")
    session = runtime.session(model)
    golden = runtime.run(session, data.x)
    data.check_labels(golden[0].size)
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} does not exist; expected {', '.join(ENGINES)}")
    job = Job(
        model=model,
        x=data.x,
        y=data.y,
        golden=golden,
        plan=plan,
        seed=seed,
        targets=tuple(targets),
        protection=protection,
        engine=engine,
    )
    evaluator = Evaluator(job)
    observer = _observer(evaluator, workers, scheduler)
    try:
        if memory is None and isinstance(observer, Cluster):
            memory = observer.memory
        chunks = _chunks(evaluator, workers, memory)
        with open_or_create(out, _header(evaluator, data, shard), resume=resume) as store:
            done = store.done()
            total = sum(n % n_shards == index and n not in done for n in plan.trials())
            blocks = _blocks(evaluator, chunks, _stages(plan, store, shard))
            batches = _trials(observer, blocks)
            _collect(store, batches, total, show)
    finally:
        observer.close()


def _collect(
    store: Store, batches: Iterator[list[Trial]], total: int, show: progress.Progress
) -> None:
    last = time.monotonic()
    with show(total, "trials") as bar:
        for trials in batches:
            now = time.monotonic()
            store.add(trials, seconds=now - last)
            last = now
            bar.update(len(trials))


def _golden_repeats(job: Job, found: discovery.Discovery) -> bool:
    """Does the reload engine without faults give the golden run of some images again?"""
    few = job.x[: 2 * runtime.CHUNK]
    again = Reload(found.model, found.space, few).run({})
    return not metrics.changed(job.golden[: len(few)], again).any()


def _header(evaluator: Evaluator, data: Dataset, shard: tuple[int, int]) -> Header:
    job = evaluator.job
    found, memory = job.memory()
    cpu = runtime.cpu_features()
    warnings = found.warnings + runtime.cpu_warnings(cpu)
    if not _golden_repeats(job, found):
        warnings.append(
            "two runs without faults differ: the kernels do not repeat bit for bit, so `masked` "
            "is counted too low"
        )
    return Header(
        model_sha256=hashlib.sha256(job.model).hexdigest(),
        data_sha256=data.sha256,
        n_images=len(data),
        fault=job.plan.fault,
        plan=job.plan.describe(),
        seed=job.seed,
        engine=job.engine,
        reloaded={} if evaluator.network is None else evaluator.network.reloaded,
        shard=f"{shard[0]}/{shard[1]}",
        golden=Count(n_correct=int((metrics.top1(job.golden) == data.y).sum()), n_total=len(data)),
        protection=job.protection,
        space=memory.space.to_json(),
        versions=runtime.versions(),
        cpu=cpu,
        warnings=warnings,
    )
