"""Hardened int8 networks: train, adjust, export, inject, report.

>>> import resq_deploy
>>> resq_deploy.inject(Path("model.onnx"), data, out=Path("a.store"))  # doctest: +SKIP

The functions are imported when first used, so that a machine without PyTorch can `inject`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "harden": "resq_deploy.pipeline",
    "run": "resq_deploy.pipeline",
    "export": "resq_deploy.export",
    "inject": "resq_deploy.inject",
    "report": "resq_deploy.report",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


__all__ = ["export", "harden", "inject", "report", "run"]  # noqa: F822 (see __getattr__)
