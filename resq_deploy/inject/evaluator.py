"""What one process does for a campaign: corrupt, run, count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resq_deploy import runtime
from resq_deploy.errors import Refused
from resq_deploy.inject import discovery, space
from resq_deploy.inject.fast import Fast
from resq_deploy.inject.memory import Memory
from resq_deploy.inject.network import Kept, Network
from resq_deploy.inject.observe import Golden, Observed, Struck, observe, refused
from resq_deploy.inject.plans import Plan
from resq_deploy.inject.reload import Reload

MANY = 64
"""Bit errors to be expected in a trial from which on it runs the whole network, and needs no golden
data: they strike the first layers."""


class Chunk(NamedTuple):
    """Images [start, stop) of a campaign."""

    start: int
    stop: int
    golden: bool = True
    """Do its trials need golden data?"""


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

    def memory(self) -> tuple[discovery.Discovery, Memory]:
        """The model made ready for faults, and the memory that holds its tensors."""
        found = discovery.discover(runtime.parse_model(self.model), self.targets)
        return found, Memory.of(found, self.protection)


class Evaluator:
    """Evaluates trials of a job in one process, one chunk of images at a time."""

    def __init__(self, job: Job, network: Network | None = None) -> None:
        """`network` is the job's, prepared by another process; it is made when missing."""
        self.job = job
        self._found, self._memory = job.memory()
        if network is None and job.engine == "fast":
            network = Network(self._found, job.x)
        self.network = network
        """What the fast engine prepared; None with the reload engine."""
        self._engine: Fast | Reload | None = None
        self.chunk: Chunk | None = None
        """Where this process is."""

    def enter(self, chunk: Chunk, kept: Kept | None = None) -> None:
        """Turn to a chunk of the images; `kept` is its golden run, which is made when missing."""
        job, part = self.job, slice(chunk.start, chunk.stop)
        self.chunk = chunk
        self._engine = None  # gives the memory of the last chunk back first
        self._golden = Golden(output=job.golden[part], y=job.y[part])
        if self.network is not None:
            if not chunk.golden:
                kept = self.network.keep_nothing(job.golden[part])
            kept = kept or self.network.keep(job.x[part])
            self._engine = Fast(self.network, kept, job.x[part])
        else:
            self._engine = Reload(self._found.model, self._found.space, job.x[part])

    def needs_golden(self, number: int) -> bool:
        """Is a trial about so few faults that golden data help?"""
        rate = self.job.plan.rate(number)
        return self.network is not None and (
            rate is None or rate * self._memory.space.n_bits < MANY
        )

    def observe(self, number: int) -> tuple[Struck, Observed]:
        """Corrupt, run, count over the images of the chunk."""
        assert self._engine is not None, "no chunk was entered"
        plan, memory = self.job.plan, self._memory
        cells = plan.cells(number, memory.space, self.job.seed)
        flips = plan.flips(cells, memory)
        site = memory.space.sites(cells)[0] if len(cells) == 1 else None
        struck = Struck(plan.rate(number), len(flips), site)
        try:
            images, output = self._engine.changed(memory.read(flips))
        except Refused:
            return struck, refused(self._golden)
        return struck, observe(self._golden, output, images)
