"""Memory protections: check codes in front of the network, and their policy of reading."""

from __future__ import annotations

from resq_deploy.errors import InputError
from resq_deploy.inject.protect.base import Protection

NAMES = "none"


def parse(text: str) -> Protection:
    """The protection that the command line calls `text`; InputError lists what there is."""
    if text == "none":
        return Protection()
    raise InputError(f"protection {text!r} is unknown; expected {NAMES}")


__all__ = ["NAMES", "Protection", "parse"]
