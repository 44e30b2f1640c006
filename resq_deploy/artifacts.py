"""Artefacts: a file plus a JSON sidecar with the digests of everything it came from.

A stage whose inputs have the same digest as those in the sidecar is not run again. Files
appear under their name only when complete (written beside, then renamed).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from resq_deploy.errors import InputError

LIBRARIES = ("resq-deploy", "numpy", "torch", "brevitas", "onnx", "onnxruntime", "qonnx")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that can move a number."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(path: Path, save: Callable[[Path], object]) -> Path:
    """Call `save` on a temporary name beside `path`, then rename: no partial file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write readable JSON (sorted keys), complete or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"
    return write(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_folder(out: Path, files: Mapping[str, bytes]) -> Path:
    """Make `out` a folder of exactly these files; on any failure it stays what it was."""
    staged, before = (
        out.with_name(f".{out.name}.{os.getpid()}.{state}") for state in ("partial", "before")
    )
    try:
        for name, content in files.items():
            write(staged / name, partial(Path.write_bytes, data=content))
        if out.exists():
            out.rename(before)
        staged.rename(out)
    finally:
        if before.exists() and not out.exists():
            before.rename(out)
        for folder in (staged, before):
            shutil.rmtree(folder, ignore_errors=True)
    return out


def read_json(path: Path) -> Any:
    """Read JSON; InputError in one line when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None


def sidecar(path: Path) -> Path:
    """The sidecar's path: FILE.safetensors -> FILE.json."""
    return path.with_suffix(".json")


def is_current(path: Path, inputs: dict[str, Any]) -> bool:
    """Does `path` exist, unchanged, and was it made from exactly these inputs?"""
    if not (path.is_file() and sidecar(path).is_file()):
        return False
    try:
        made = read_json(sidecar(path))
    except InputError:
        return False
    return bool(made.get("inputs") == json.loads(json.dumps(inputs, default=str))) and (
        made.get("sha256") == sha256(path)
    )


def seal(path: Path, inputs: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Write the sidecar of a finished artefact: inputs, digest, versions and `facts`."""
    content = {"inputs": inputs, "sha256": sha256(path), "versions": versions(), **facts}
    write_json(sidecar(path), content)
    return content
