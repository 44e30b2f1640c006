"""Sites as byte addresses in `weights.bin`, and what a dump of it changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resq_deploy import memory_map
from resq_deploy.inject import plans
from resq_deploy.inject.plans import Image
from resq_deploy.inject.space import Space
from resq_deploy.memory_map import MemoryMap
from resq_deploy.records import Site, Trial
from resq_deploy.store import Header


def read_map(path: Path | None, header: Header) -> MemoryMap | None:
    """The memory map of a campaign's model; None without one. InputError for another model's."""
    return None if path is None else memory_map.read(path, model_sha256=header.model_sha256)


def address(mapped: MemoryMap, site: Site) -> dict[str, int | None]:
    """`address` (byte in `weights.bin`) and `address_bit` (0 = least significant bit of that byte);
    both None for what the array does not hold, such as check bits."""
    place = mapped.place(site)
    return dict(zip(("address", "address_bit"), place or (None, None), strict=True))


def report(
    header: Header, trials: Sequence[Trial], mapped: MemoryMap | None
) -> dict[str, list[dict[str, Any]] | None]:
    """`sites`: the trials that struck one bit, with its address; None without a map.

    `image`: tensors in which the dump differs from the file; None where no dump was given.
    """
    sites = None
    if mapped is not None:
        sites = [
            {"trial": t.trial, **vars(t.site), **address(mapped, t.site), "outcome": t.outcome}
            for t in trials
            if t.site is not None
        ]
    space = Space.from_json(header.space)
    plan = plans.restore(header.plan, header.fault, space)
    return {"sites": sites, "image": plan.differences(space) if isinstance(plan, Image) else None}
