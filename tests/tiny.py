"""A recipe on real digits that is small enough for tests: every stage, seconds each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "data": {"name": "digits", "augment": "none", "calibration": "tiny"},
    "model": {"net": "resnet8", "width": 0.5},
    "float": {"epochs": 4, "batch": 64, "lr": 0.1},
    "baseline": {"epochs": 1, "batch": 128, "lr": 0.01},
    "attack": {"epochs": 2, "batch": 128, "lr": 0.01, "epsilon": 0.05},
    "fault": {"epochs": 2, "batch": 128, "lr": 0.01, "start_loss": 2.5},
    "adjust": {"epsilon": 0.05, "ratios": [0.8], "patterns": 2, "steps": 1},
    "export": {"parity_images": 100},
    "prove": {
        "images": 60,
        "rates": [1e-3, 1e-2],
        "draws": 3,
        "margin": 0.3,
        "single_images": 10,
        "epsilons": [0.05],
        "steps": 2,
    },
}


def write_recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """models/tiny.toml and calibration/tiny.toml under `folder`; returns the recipe's path.

    `changes` replace fields of sections.
    """
    lines = ['name = "tiny"', "seed = 1"]
    for section, fields in TINY.items():
        lines.append(f"[{section}]")
        for name, value in (fields | changes.get(section, {})).items():
            lines.append(f"{name} = {json.dumps(value)}")
    path = folder / "models" / "tiny.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    (folder / "calibration").mkdir(exist_ok=True)
    (folder / "calibration" / "tiny.toml").write_text('data = "digits"\nimages = 64\n')
    return path
