"""What can go wrong, as a small family of exceptions with one-line messages.

A message says what was given, what was expected, and how to mend it. The command
line prints it and exits with `exit_code`; nothing else in the package exits.
"""

from __future__ import annotations


class ResqError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 2


class InputError(ResqError, ValueError):
    """What the user gave (file, option, recipe field, data) cannot be used."""


class UnsupportedModel(InputError):
    """An ONNX file holds something we refuse to guess about; it is named."""


class Refused(InputError):
    """onnxruntime does not load or run a model; with a fault in it, that is a detected error."""


class HeaderMismatch(InputError):
    """A stored campaign belongs to another model, data set, plan or seed."""


class ExportError(ResqError):
    """An exported file breaks a guarantee (float kernels, parity, weight behind a Clip)."""


class GateFailed(ResqError):
    """A measured figure misses its limit."""

    exit_code = 1


class MissingExtra(InputError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"module {module!r} is not installed; this command needs the extra [{extra}]: "
            f'pip install "resq-deploy[{extra}]"'
        )
