"""Memory protections: check codes in front of the network, and their policy of reading.

A new one is a module here with a subclass of Protection, and one row in PROTECTIONS.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from resq_deploy.errors import InputError
from resq_deploy.inject.protect.base import Protection
from resq_deploy.inject.protect.parity import Parity
from resq_deploy.inject.protect.secded import Secded
from resq_deploy.inject.protect.top import TopBits

PROTECTIONS: dict[str, Callable[[int], Protection]] = {
    "none": lambda _: Protection(),
    "parity": lambda _: Parity(),
    "secded": lambda _: Secded(),
    "secded:zero": lambda _: Secded(zero=True),
    "top:K": lambda k: TopBits(k=k),
}
"""What the command line calls them; K stands for a number from 1."""

NAMES = f"{', '.join(PROTECTIONS)} (such as top:2)"


def parse(text: str) -> Protection:
    """The protection that the command line calls `text`; InputError lists what there is."""
    for name, make in PROTECTIONS.items():
        kind = name.removesuffix(":K")
        found = re.fullmatch(kind if kind == name else f"{kind}:([1-9][0-9]?)", text)
        if found:
            return make(0 if kind == name else int(found[1]))
    raise InputError(f"protection {text!r} is unknown; expected one of {NAMES}")


__all__ = ["NAMES", "PROTECTIONS", "Protection", "parse"]
