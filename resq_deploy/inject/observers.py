"""Where the trials of a campaign are observed: in this process, in others, on other machines."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from resq_deploy import runtime
from resq_deploy.errors import InputError, MissingExtra, ResqError
from resq_deploy.inject.evaluator import Chunk, Evaluator, Job
from resq_deploy.inject.network import Network
from resq_deploy.inject.observe import Observed, Struck
from resq_deploy.inject.shared import Shared

AHEAD = 4
"""Tasks queued for each worker: enough to keep it busy, few enough to end soon."""

TASK_S = 0.05
"""Seconds that a task of several trials is to take: handing it over costs half a millisecond."""

CONNECT_S = 10
"""Seconds to wait for a Dask scheduler."""

Result = tuple[int, Struck, Observed]
Results = Iterator[list[Result]]


class Done(NamedTuple):
    """What a worker gives back for a task."""

    results: list[Result]
    seconds: float


class Serial:
    """Observes trials in this process."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def enter(self, chunk: Chunk) -> None:
        """Make the golden run of a chunk."""
        self._evaluator.enter(chunk)

    def observe(self, numbers: Sequence[int]) -> Results:
        """Batches as they finish."""
        for number in numbers:
            yield [(number, *self._evaluator.observe(number))]

    def close(self) -> None:
        """Nothing to end."""


class _Remote:
    """Observes trials by an executor."""

    lost = ""
    """What to say when a worker died."""
    deaths: tuple[type[BaseException], ...] = ()
    """How the executor says that one did."""

    def __init__(self, executor: Executor, workers: int) -> None:
        self._pool: Any = executor
        self._workers = workers
        self._size = 1
        """Trials of a task."""

    def _task(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What a worker calls with trial numbers and further arguments; it returns a Done."""
        raise NotImplementedError

    def _died(self) -> ResqError:
        return ResqError(f"{self.lost}; finished trials are stored: continue with --resume")

    def observe(self, numbers: Sequence[int]) -> Results:
        """Batches as they finish; when interrupted, those in flight still come out."""
        todo = iter(numbers)
        running: set[Future[Done]] = set()
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with _interrupts_held():
                    while len(running) < self._workers * AHEAD:
                        if not (some := list(islice(todo, self._size))):
                            break
                        work, arguments = self._task()
                        running.add(self._pool.submit(work, some, *arguments))
                done, running = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt as error:
                interrupted, todo, done = error, iter(()), set()
                running = {future for future in running if not future.cancel()}
            except self.deaths:
                raise self._died() from None
            if done:
                try:
                    found = [future.result() for future in done]
                except self.deaths:
                    raise self._died() from None
                most = max(task.seconds / len(task.results) for task in found)
                self._size = max(1, int(min(2 * self._size, TASK_S / max(most, 1e-9))))
                yield [result for task in found for result in task.results]
            elif not running:
                break
        if interrupted:
            raise interrupted


class _Post:
    """A value in a file of memory, for processes that know where it is.

    What every task needs need not go with each. And a process that dies while it starts, such as
    one whose main module cannot be imported, leaves the parent waiting for ever behind an
    argument that is longer than a pipe holds.
    """

    def __init__(self, value: Any) -> None:
        self._file = os.fdopen(os.memfd_create("post"), "wb")
        pickle.dump(value, self._file)
        self._file.flush()
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def close(self) -> None:
        """Those who opened it keep it."""
        self._file.close()


def _posted(path: str) -> Any:
    """What was posted there."""
    with open(path, "rb") as file:
        return pickle.load(file)  # noqa: S301, what the parent wrote


class Processes(_Remote):
    """Observes trials in worker processes, which map one golden run."""

    lost = (
        "a worker process died (out of memory? give fewer --workers; in a script of your own, call "
        'inject under `if __name__ == "__main__":`)'
    )
    deaths = (BrokenProcessPool,)

    def __init__(self, job: Job, network: Network | None, workers: int) -> None:
        """`network` is the job's for the fast engine: workers need not prepare it again."""
        self._prepared = _Post((job, network))
        context = multiprocessing.get_context("spawn")
        super().__init__(
            ProcessPoolExecutor(
                workers, context, initializer=_start, initargs=(self._prepared.path,)
            ),
            workers,
        )
        self._job, self._network = job, network
        self._shared: Shared | None = None
        self._golden: _Post | None = None
        with _interrupts_held():
            for _ in range(workers):  # they start while the first golden run is made
                self._pool.submit(int)

    def enter(self, chunk: Chunk) -> None:
        """Make the golden run of a chunk, for all workers."""
        self._chunk = chunk
        self._leave()
        if self._network is not None and chunk.golden:
            self._shared = Shared()
            kept = self._network.keep(self._job.x[chunk.start : chunk.stop], self._shared.allocate)
            self._golden = _Post(self._shared.handle(kept))

    def _leave(self) -> None:
        """Give the golden run of the chunk back."""
        for held in (self._shared, self._golden):
            if held is not None:
                held.close()
        self._shared = self._golden = None

    def _task(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _work, (self._chunk, None if self._golden is None else self._golden.path)

    def close(self) -> None:
        """End the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._prepared.close()
        self._leave()


class Cluster(_Remote):
    """Observes trials on the workers of a Dask cluster; each makes golden runs of its own."""

    lost = "the Dask cluster was lost or a worker died again and again (out of memory?)"

    def __init__(self, job: Job, address: str) -> None:
        """Raises MissingExtra, InputError when no scheduler answers at `address`."""
        try:
            from distributed import Client, KilledWorker
        except ImportError:
            raise MissingExtra("distributed", "dask") from None
        self.deaths = (CancelledError, OSError, KilledWorker)
        try:
            self._client: Any = Client(address, timeout=CONNECT_S)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--scheduler {address} given; no Dask scheduler answers there ({error}); expected "
                "an address such as tcp://host:8786, as `dask scheduler` prints it"
            ) from None
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        if not workers or any(worker["nthreads"] != 1 for worker in workers):
            threads = sorted({worker["nthreads"] for worker in workers})
            self._client.close()
            raise InputError(
                f"--scheduler {address} given; it has {len(workers)} workers with {threads} threads"
                " each; expected workers of one thread: dask worker --nthreads 1 --nworkers N"
            )
        super().__init__(self._client.get_executor(pure=False), len(workers))
        self.memory = min(w["memory_limit"] or 2**62 for w in workers) // 3
        """Bytes that golden data may take on every worker, when nothing else is said."""
        self._key = hashlib.sha256(pickle.dumps(job)).hexdigest()
        self._job = self._client.scatter(job, broadcast=True, hash=False)
        self._facts = _facts()

    def enter(self, chunk: Chunk) -> None:
        """Workers make the golden run of a chunk with their first trial of it."""
        self._chunk = chunk

    def _task(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _work_alone, (self._chunk, self._key, self._job, self._facts)

    def close(self) -> None:
        """Leave the cluster."""
        self._client.close()


def _facts() -> dict[str, Any]:
    """What must be the same wherever trials of one campaign run."""
    return {**runtime.versions(), "VNNI": ", ".join(runtime.cpu_features()["vnni"]) or "none"}


_evaluator: Evaluator | None = None  # of this worker process
_key = ""  # the job that it is for, on a cluster


def _start(path: str) -> None:
    global _evaluator
    _evaluator = Evaluator(*_posted(path))
    # A killed campaign must not leave workers behind that wait for work for ever.
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(numbers: Sequence[int], chunk: Chunk, golden: str | None) -> Done:
    assert _evaluator is not None
    if _evaluator.chunk != chunk:
        _evaluator.enter(chunk, None if golden is None else _posted(golden).open())
    return _done(_evaluator, numbers)


def _work_alone(
    numbers: Sequence[int], chunk: Chunk, key: str, job: Job, facts: dict[str, Any]
) -> Done:
    global _evaluator, _key
    if key != _key:
        mine = _facts()
        for name, value in facts.items():
            if mine.get(name) != value:
                raise InputError(
                    f"a Dask worker has {name} {mine.get(name)}, this machine has {value}; results "
                    "are only the same with the same: start workers in the same environment"
                )
        _evaluator, _key = Evaluator(job), key
    assert _evaluator is not None
    if _evaluator.chunk != chunk:
        _evaluator.enter(chunk)
    return _done(_evaluator, numbers)


def _done(evaluator: Evaluator, numbers: Sequence[int]) -> Done:
    start = time.monotonic()
    results = [(number, *evaluator.observe(number)) for number in numbers]
    return Done(results, time.monotonic() - start)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C here, and for ever in processes started here: the parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
