"""Encodings: how the int8 codes of a weight are stored in as many bytes, with room for protection.

A code of 8 bits of which one is given up can tell, or even undo, a flip of the others, at no extra
memory. A new encoding is a module here with a subclass of Encoding, and a row in ENCODINGS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from resq_deploy.encoding.base import Encoding
from resq_deploy.encoding.cosq import WORDS as COSQ_WORDS
from resq_deploy.encoding.cosq import Cosq
from resq_deploy.encoding.guard import Guard
from resq_deploy.encoding.hamming import Hamming
from resq_deploy.encoding.parity import EvenParity
from resq_deploy.encoding.saf import TAUS, Saf
from resq_deploy.encoding.secded import InPlaceSecded
from resq_deploy.encoding.table import POLICIES, ByByte, Checked
from resq_deploy.errors import InputError

ENCODINGS: dict[str, Callable[[], Encoding]] = {
    "plain": Encoding,
    **{f"guard:{policy}": partial(Guard, policy=policy) for policy in POLICIES},
    **{f"parity:{policy}": partial(EvenParity, policy=policy) for policy in POLICIES},
    "hamming": Hamming,
    **{f"cosq:{rate}": partial(Cosq, rate=rate) for rate in COSQ_WORDS},
    "secded": InPlaceSecded,
    "secded:zero": partial(InPlaceSecded, zero=True),
    **{f"saf:{tau}": partial(Saf, tau=tau) for tau in TAUS},
}
"""By the name that recipes and the command line use."""


def parse(name: str) -> Encoding:
    """The encoding called `name`; InputError lists what there is."""
    if name not in ENCODINGS:
        raise InputError(f"encoding {name!r} is unknown; expected one of {', '.join(ENCODINGS)}")
    return ENCODINGS[name]()


__all__ = [
    "ENCODINGS",
    "POLICIES",
    "ByByte",
    "Checked",
    "Cosq",
    "Encoding",
    "EvenParity",
    "Guard",
    "Hamming",
    "InPlaceSecded",
    "Saf",
    "parse",
]
