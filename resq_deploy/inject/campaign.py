"""Run a plan: golden run first, then every trial that the store does not have yet.

What a trial yields depends on its number only, so one process, many, shards and resumed
campaigns fill the same store.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics, progress, runtime
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError, Refused, ResqError
from resq_deploy.inject import space
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.observe import Golden, observe, refused, trial
from resq_deploy.inject.plans import Plan
from resq_deploy.inject.reload import Reload
from resq_deploy.records import Count, Trial
from resq_deploy.store import Header, Store, open_or_create

AHEAD = 4
"""Trials queued for each worker: enough to keep it busy, few enough to end soon."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs to evaluate trials of one campaign."""

    model: bytes
    """The ONNX file."""
    x: NDArray[Any]
    """Images (N, ...) as the data set has them."""
    y: NDArray[np.int64]
    golden: NDArray[Any]
    """Output (N, ...) of the file without faults."""
    plan: Plan
    seed: int
    targets: tuple[str, ...] = space.TARGETS[:1]
    """What of the file is in the fault space (space.TARGETS)."""
    protection: str = "none"
    """Memory protection, as on the command line."""

    def memory(self) -> tuple[space.Discovery, Memory]:
        """The model made ready for faults, and the memory that holds its tensors."""
        found = space.discover(runtime.parse_model(self.model), self.targets)
        return found, Memory.of(found, self.protection)


class Evaluator:
    """Evaluates single trials of a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        found, self._memory = job.memory()
        self._engine = Reload(found.model, found.space, job.x)
        self._golden = Golden(output=job.golden, y=job.y)

    def golden_repeats(self) -> bool:
        """Does the engine without faults give the golden run again, bit for bit?"""
        return not metrics.changed(self._job.golden, self._engine.run({})).any()

    def trial(self, number: int) -> Trial:
        """Corrupt, run, count."""
        plan, memory = self._job.plan, self._memory
        cells = plan.cells(number, memory.space, self._job.seed)
        flips = plan.flips(cells, memory)
        try:
            observed = observe(self._golden, self._engine.run(memory.read(flips)))
        except Refused:
            observed = refused(self._golden)
        site = memory.space.sites(cells)[0] if len(cells) == 1 else None
        return trial(number, plan.rate(number), len(flips), site, observed)


_evaluator: Evaluator | None = None  # of this worker process


def _start_worker(job: Job) -> None:
    global _evaluator
    _evaluator = Evaluator(job)
    # A killed campaign must not leave workers behind that wait for work for ever.
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int) -> Trial:
    assert _evaluator is not None
    return _evaluator.trial(number)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C here, and for ever in processes started here: the parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stages(plan: Plan, store: Store, shard: tuple[int, int]) -> Iterator[list[int]]:
    """Numbers still to run, between the looks of the plan, until it has seen enough.

    A stage begins when every trial of those before it is in the store: what a look sees does
    not depend on the number of workers or on interruptions.
    """
    index, n_shards = shard
    done, numbers, start = store.done(), plan.trials(), 0
    for end in plan.looks():
        if start and plan.enough(store.trials()[:start]):
            return
        yield [n for n in numbers[start:end] if n % n_shards == index and n not in done]
        start = end


def _serial(job: Job, stages: Iterator[list[int]]) -> Iterator[list[Trial]]:
    evaluator = Evaluator(job)
    for numbers in stages:
        for number in numbers:
            yield [evaluator.trial(number)]


def _parallel(job: Job, stages: Iterator[list[int]], workers: int) -> Iterator[list[Trial]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    try:
        for numbers in stages:
            yield from _batches(pool, numbers, workers)
    except BrokenProcessPool:
        raise ResqError(
            "a worker process died (out of memory?); finished trials are stored: continue with "
            "--resume and fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(
    pool: ProcessPoolExecutor, numbers: Sequence[int], workers: int
) -> Iterator[list[Trial]]:
    """Batches of trials as they finish; when interrupted, those in flight still come out."""
    todo = iter(numbers)
    running: set[Future[Trial]] = set()
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            with _interrupts_held():
                for number in islice(todo, workers * AHEAD - len(running)):
                    running.add(pool.submit(_work, number))
            done, running = wait(running, return_when=FIRST_COMPLETED)
        except KeyboardInterrupt as error:
            interrupted, todo, done = error, iter(()), set()
            running = {future for future in running if not future.cancel()}
        if done:
            yield [future.result() for future in done]
        elif not running:
            break
    if interrupted:
        raise interrupted


def run(
    model: bytes,
    data: Dataset,
    plan: Plan,
    *,
    out: Path,
    targets: Sequence[str] = space.TARGETS[:1],
    protection: str = "none",
    seed: int = 0,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    show: progress.Progress = progress.silent,
) -> None:
    """Run the trials of `plan` (those with trial % shard[1] == shard[0]) into the store `out`.

    `workers` processes of one thread each. KeyboardInterrupt leaves every finished trial in the
    store and is raised again; the same call with `resume` continues. Raises InputError for data
    that do not fit the model, HeaderMismatch when the store holds another campaign.
    """
    index, n_shards = shard
    if not 0 <= index < n_shards:
        raise InputError(f"--shard {index}/{n_shards} given; expected I/N with 0 <= I < N")
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}")
    if seed < 0:
        raise InputError(f"--seed must be at least 0, got {seed}")
    session = runtime.session(model)
    golden = runtime.run(session, runtime.adapt(data.x, session))
    n_classes = golden[0].size
    if data.y.max() >= n_classes:
        raise InputError(
            f"{data.name} has labels up to {data.y.max()}, the model has {n_classes} outputs"
        )
    job = Job(
        model=model,
        x=data.x,
        y=data.y,
        golden=golden,
        plan=plan,
        seed=seed,
        targets=tuple(targets),
        protection=protection,
    )
    with open_or_create(out, _header(job, data, shard), resume=resume) as store:
        done = store.done()
        total = sum(n % n_shards == index and n not in done for n in plan.trials())
        stages = _stages(plan, store, shard)
        batches = _serial(job, stages) if workers == 1 else _parallel(job, stages, workers)
        _collect(store, batches, total, show)


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


def _header(job: Job, data: Dataset, shard: tuple[int, int]) -> Header:
    found, memory = job.memory()
    cpu = runtime.cpu_features()
    warnings = found.warnings + runtime.cpu_warnings(cpu)
    if not Evaluator(job).golden_repeats():
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
        engine="reload",
        shard=f"{shard[0]}/{shard[1]}",
        golden=Count(n_correct=int((metrics.top1(job.golden) == data.y).sum()), n_total=len(data)),
        protection=job.protection,
        space=memory.space.to_json(),
        versions=runtime.versions(),
        cpu=cpu,
        warnings=warnings,
    )
