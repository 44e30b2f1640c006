"""Fault models: which stored bits a trial strikes.

A new one is a module here with a class that has `sample`, and one row in MODELS.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from resq_deploy.errors import InputError
from resq_deploy.inject.faults.adjacent import Adjacent
from resq_deploy.inject.faults.asymmetric import Asymmetric
from resq_deploy.inject.faults.base import Fault, Numbered, order
from resq_deploy.inject.faults.ber import BitErrorRate
from resq_deploy.inject.faults.burst import Burst
from resq_deploy.inject.faults.byte import RandomByte
from resq_deploy.inject.faults.k_flips import KFlips
from resq_deploy.inject.faults.single import SingleFlip
from resq_deploy.inject.faults.stuck import StuckAt

MODELS: dict[str, Callable[[int], Fault]] = {
    "single": lambda _: SingleFlip(),
    "k:K": lambda k: KFlips(k=k),
    "ber": lambda _: BitErrorRate(),
    "adjacent:N": lambda n: Adjacent(n=n),
    "burst:N": lambda n: Burst(n=n),
    "stuck0": lambda _: StuckAt(value=0),
    "stuck1": lambda _: StuckAt(value=1),
    "0to1": lambda _: Asymmetric(source=0),
    "1to0": lambda _: Asymmetric(source=1),
    "byte": lambda _: RandomByte(),
}
"""What the command line calls them; a letter behind the colon stands for a number from 1."""

NAMES = f"{', '.join(MODELS)} (such as k:3)"


def parse(text: str) -> Fault:
    """The fault model that the command line calls `text`; InputError lists what there is."""
    for name, make in MODELS.items():
        kind, _, letter = name.partition(":")
        found = re.fullmatch(f"{kind}:([1-9][0-9]{{0,8}})" if letter else kind, text)
        if found:
            return make(int(found[1]) if letter else 0)
    raise InputError(f"fault model {text!r} is unknown; expected one of {NAMES}")


__all__ = ["MODELS", "NAMES", "BitErrorRate", "Fault", "Numbered", "SingleFlip", "order", "parse"]
