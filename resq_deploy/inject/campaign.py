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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics, progress, runtime
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError, Refused, ResqError
from resq_deploy.inject import space
from resq_deploy.inject.fast import Fast, Kept, Network
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.observe import Golden, Observed, observe, refused, trial
from resq_deploy.inject.plans import Plan
from resq_deploy.inject.reload import Reload
from resq_deploy.inject.shared import Handle, Shared
from resq_deploy.records import Count, Trial
from resq_deploy.store import Header, Store, open_or_create

ENGINES = ("fast", "reload")

BLOCK = 256
"""Trials that go through all chunks of images together: the golden run of a chunk is made again
for every block, which costs a few plain runs of its images."""

AHEAD = 4
"""Trials queued for each worker: enough to keep it busy, few enough to end soon."""


class Chunk(NamedTuple):
    """Images [start, stop) of a campaign."""

    start: int
    stop: int


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
    """What is in the fault space (space.TARGETS, space.ACTIVATION)."""
    protection: str = "none"
    """Memory protection, as on the command line."""
    engine: str = "fast"
    """One of ENGINES."""

    def memory(self) -> tuple[space.Discovery, Memory]:
        """The model made ready for faults, and the memory that holds its tensors."""
        found = space.discover(runtime.parse_model(self.model), self.targets)
        return found, Memory.of(found, self.protection)


class Evaluator:
    """Evaluates trials of a job in one process, one chunk of images at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._found, self._memory = job.memory()
        self.network = Network(self._found, job.x) if job.engine == "fast" else None
        """What the fast engine prepared; None with the reload engine."""
        self.chunk: Chunk | None = None
        """Where this process is."""

    def enter(self, chunk: Chunk, kept: Kept | None) -> None:
        """Turn to a chunk of the images; `kept` is its golden run, which only `fast` needs."""
        job, part = self.job, slice(chunk.start, chunk.stop)
        self.chunk = chunk
        self._golden = Golden(output=job.golden[part], y=job.y[part])
        if self.network is not None:
            assert kept is not None
            self._engine: Fast | Reload = Fast(self.network, kept, job.x[part])
        else:
            self._engine = Reload(self._found.model, self._found.space, job.x[part])

    def observe(self, number: int) -> Observed:
        """Corrupt, run, count over the images of the chunk."""
        plan, memory = self.job.plan, self._memory
        cells = plan.cells(number, memory.space, self.job.seed)
        try:
            images, output = self._engine.changed(memory.read(plan.flips(cells, memory)))
        except Refused:
            return refused(self._golden)
        return observe(self._golden, output, images)

    def trial(self, number: int, observed: Observed) -> Trial:
        """The record of a trial whose chunks add up to `observed`."""
        plan, memory = self.job.plan, self._memory
        cells = plan.cells(number, memory.space, self.job.seed)
        site = memory.space.sites(cells)[0] if len(cells) == 1 else None
        return trial(number, plan.rate(number), len(plan.flips(cells, memory)), site, observed)


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


def _work(number: int, chunk: Chunk, handle: Handle | None) -> tuple[int, Observed]:
    assert _evaluator is not None
    if _evaluator.chunk != chunk:
        _evaluator.enter(chunk, None if handle is None else handle.open())
    return number, _evaluator.observe(number)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C here, and for ever in processes started here: the parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


Results = Iterator[list[tuple[int, Observed]]]


class _Serial:
    """Observes trials in this process."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def enter(self, chunk: Chunk, network: Network | None, x: NDArray[Any]) -> None:
        """Make the golden run of a chunk."""
        self._evaluator.enter(chunk, None if network is None else network.keep(x))

    def observe(self, numbers: Sequence[int]) -> Results:
        """Batches as they finish."""
        for number in numbers:
            yield [(number, self._evaluator.observe(number))]

    def close(self) -> None:
        """Nothing to end."""


class _Pool:
    """Observes trials in worker processes, which map one golden run."""

    def __init__(self, job: Job, workers: int) -> None:
        self._workers = workers
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(job,)
        )
        self._shared: Shared | None = None

    def enter(self, chunk: Chunk, network: Network | None, x: NDArray[Any]) -> None:
        """Make the golden run of a chunk, for all workers."""
        self._chunk, self._handle = chunk, None
        if network is not None:
            if self._shared is not None:
                self._shared.close()
            self._shared = Shared()
            kept = network.keep(x, self._shared.allocate)
            self._handle = self._shared.handle(kept)

    def observe(self, numbers: Sequence[int]) -> Results:
        """Batches as they finish; when interrupted, those in flight still come out."""
        todo = iter(numbers)
        running: set[Future[tuple[int, Observed]]] = set()
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with _interrupts_held():
                    for number in islice(todo, self._workers * AHEAD - len(running)):
                        running.add(self._pool.submit(_work, number, self._chunk, self._handle))
                done, running = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt as error:
                interrupted, todo, done = error, iter(()), set()
                running = {future for future in running if not future.cancel()}
            if done:
                try:
                    yield [future.result() for future in done]
                except BrokenProcessPool:
                    raise ResqError(
                        "a worker process died (out of memory?); finished trials are stored: "
                        "continue with --resume and fewer --workers"
                    ) from None
            elif not running:
                break
        if interrupted:
            raise interrupted

    def close(self) -> None:
        """End the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._shared is not None:
            self._shared.close()


def _trials(
    evaluator: Evaluator,
    observer: _Serial | _Pool,
    chunks: Sequence[Chunk],
    stages: Iterator[list[int]],
) -> Iterator[list[Trial]]:
    """The records of trials as they finish; with several chunks, BLOCK trials at a time."""
    job, entered = evaluator.job, None
    for numbers in stages:
        size = BLOCK if len(chunks) > 1 else max(1, len(numbers))
        for block in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            sums: dict[int, Observed] = {}
            for chunk in chunks:
                if entered != chunk:
                    observer.enter(chunk, evaluator.network, job.x[chunk.start : chunk.stop])
                    entered = chunk
                for batch in observer.observe(block):
                    for number, observed in batch:
                        sums[number] = sums.get(number, Observed()) + observed
                    if chunk == chunks[-1]:
                        yield [evaluator.trial(number, sums.pop(number)) for number, _ in batch]


def _chunks(evaluator: Evaluator, workers: int, budget: int | None) -> list[Chunk]:
    """The images in parts whose golden data, and what faults change of them, fit in memory."""
    n, network = len(evaluator.job.x), evaluator.network
    if network is None:
        return [Chunk(0, n)]
    if budget is None:
        budget = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3
    size = budget // max(1, network.bytes_per_image(workers))
    unit = network.group or runtime.CHUNK
    if size < unit:
        raise InputError(
            f"--memory {budget} bytes given; the golden data of {unit} images need "
            f"{unit * network.bytes_per_image(workers)} bytes with {workers} workers: give more, "
            "fewer --workers, or --engine reload"
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
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    show: progress.Progress = progress.silent,
) -> None:
    """Run the trials of `plan` (those with trial % shard[1] == shard[0]) into the store `out`.

    `workers` processes of one thread each share the golden data of the fast engine, which take at
    most `memory` bytes, by default a third of the machine's. KeyboardInterrupt leaves every
    finished trial in the store and is raised again; the same call with `resume` continues. Raises
    InputError for data that do not fit the model, HeaderMismatch when the store holds another
    campaign.
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
    if seed < 0:
        raise InputError(f"--seed must be at least 0, got {seed}")
    session = runtime.session(model)
    golden = runtime.run(session, runtime.adapt(data.x, session))
    n_classes = golden[0].size
    if data.y.max() >= n_classes:
        raise InputError(
            f"{data.name} has labels up to {data.y.max()}, the model has {n_classes} outputs"
        )
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
    chunks = _chunks(evaluator, workers, memory)
    with open_or_create(out, _header(evaluator, data, shard), resume=resume) as store:
        done = store.done()
        total = sum(n % n_shards == index and n not in done for n in plan.trials())
        observer = _Serial(evaluator) if workers == 1 else _Pool(job, workers)
        try:
            batches = _trials(evaluator, observer, chunks, _stages(plan, store, shard))
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


def _golden_repeats(job: Job, found: space.Discovery) -> bool:
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
