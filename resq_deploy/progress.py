"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output stays the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0


class Bar(Protocol):
    """What the body of `with bar(...)` gets."""

    def update(self, n: int = 1) -> object:
        """`n` more of the total are done."""


class Progress(Protocol):
    """`bar` or `silent`: how a stage is told whether to show its progress."""

    def __call__(self, total: int, what: str) -> AbstractContextManager[Bar]:
        """Follow `total` pieces of work named `what` ("trials", "epochs")."""


class _Lines:
    """One line every few seconds and one at the end: fit for a log file."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self.start = self.last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self.last = now
        rate = self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        line = f"{self.done}/{self.total} {self.what}, {rate:.3g}/s, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


class _Silent:
    def update(self, n: int = 1) -> None:
        """Nothing to show."""


@contextmanager
def bar(total: int, what: str) -> Iterator[Bar]:
    """Show progress on standard error; call `.update()` for every finished piece."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit="", dynamic_ncols=True) as shown:
            yield shown
    else:
        yield _Lines(total, what)


@contextmanager
def silent(total: int, what: str) -> Iterator[Bar]:
    """Show nothing: the default of library calls."""
    yield _Silent()
