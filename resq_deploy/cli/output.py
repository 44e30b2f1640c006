"""What commands print and write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click


def emit_json(value: Any, file: Path | None) -> None:
    """Write `value` to `--json FILE`, whole or not at all; nothing when no file was given."""
    if file is not None:
        write_text(json.dumps(value, indent=2) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def table(rows: Sequence[Sequence[Any]], headers: Iterable[str]) -> None:
    """Print a table."""
    from tabulate import tabulate

    click.echo(tabulate(rows, headers=list(headers), disable_numparse=True))


def warn(messages: Iterable[str]) -> None:
    """Print warnings to standard error, one line each."""
    for message in messages:
        click.echo(f"resq-deploy: warning: {message}", err=True)


def percent(interval: dict[str, Any], value: str = "mean") -> str:
    """`88.31 % [88.22, 88.39]` of an interval of rates in [0, 1]."""
    numbers = [100 * interval[key] for key in (value, "low", "high")]
    return "{:.2f} % [{:.2f}, {:.2f}]".format(*numbers)
