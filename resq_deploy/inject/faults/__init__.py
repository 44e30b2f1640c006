"""Fault models: which bits of the fault space a trial flips.

A new one is a module here with a class that has `sample`, and one row in `parse`.
"""

from __future__ import annotations

from resq_deploy.errors import InputError
from resq_deploy.inject.faults.base import Fault
from resq_deploy.inject.faults.ber import BitErrorRate
from resq_deploy.inject.faults.k_flips import KFlips
from resq_deploy.inject.faults.single import SingleFlip

NAMES = "single, k:K (such as k:3) or ber"


def parse(text: str) -> Fault:
    """The fault model that the command line calls `text`; InputError lists what there is."""
    kind, _, argument = text.partition(":")
    if text == "single":
        return SingleFlip()
    if text == "ber":
        return BitErrorRate()
    if kind == "k" and argument.isdecimal() and int(argument) > 0:
        return KFlips(k=int(argument))
    raise InputError(f"fault model {text!r} is unknown; expected {NAMES}")


__all__ = ["NAMES", "BitErrorRate", "Fault", "KFlips", "SingleFlip", "parse"]
