"""Hardened int8 networks: train, adjust, export, inject, report.

>>> import resq_deploy
>>> resq_deploy.inject(Path("model.onnx"), data, out=Path("a.store"))  # doctest: +SKIP

The functions are imported when first used, so that a machine without PyTorch can `inject`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "harden": ("resq_deploy.pipeline", "harden"),
    "run": ("resq_deploy.pipeline", "run"),
    "export": ("resq_deploy.export", None),
    "inject": ("resq_deploy.inject", None),
    "report": ("resq_deploy.report", None),
}
"""Name -> module, and function in it (None: the module itself is called)."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _PLACES[name]
    found = import_module(module)
    return found if function is None else getattr(found, function)


__all__ = ["export", "harden", "inject", "report", "run"]
