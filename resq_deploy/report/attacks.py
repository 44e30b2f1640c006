"""What `attack --json` and `bfa --json` wrote, as records for the tables of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resq_deploy import metrics
from resq_deploy.artifacts import read_json
from resq_deploy.errors import InputError
from resq_deploy.report import table

Records = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file."""

    name: str
    lines: list[str]
    """Sentences above the tables."""
    tables: dict[str, Records]
    """By heading."""


def _share(count: dict[str, int], confidence: float) -> str:
    found = metrics.wilson(count["n_correct"], count["n_total"], confidence)
    return f"{table.percent(vars(found))} ({count['n_correct']}/{count['n_total']})"


def _level(confidence: float) -> str:
    return f"{100 * confidence:g} % intervals."


def _mean(row: dict[str, Any]) -> str:
    return table.percent({"value": row["mean"], "low": row["low"], "high": row["high"]})


def _attack(name: str, found: dict[str, Any]) -> Result:
    clean, confidence = found["clean"], found["inputs"]["confidence"]
    groups = [(a["label"], a["epsilons"]) for a in found["attacks"].values()]
    groups.append(("worst of each image", found["worst"]))
    tables: dict[str, Records] = {
        "Attacks": [
            {"attack": "none", "epsilon": "0",
             "exported file, %": _share(clean["deployed"], confidence),
             "twin, %": _share(clean["twin"], confidence)},
            *({
                "attack": label,
                "epsilon": table.epsilon_label(row["epsilon"]),
                "exported file, %": _share(row["deployed"], confidence),
                "twin, %": _share(row["twin"], confidence) if "twin" in row else None,
            } for label, rows in groups for row in rows),
        ],
        "Signs of masked gradients": [
            {
                "check": row["check"],
                "epsilon": table.epsilon_label(row["epsilon"]),
                **{f"{side}, correct": f"{row[side]['attack']}: {row[side]['n_correct']}"
                   if side in row else None for side in ("weaker", "stronger")},
                "images": row["n_total"],
                "p": row.get("p_value"),
                "verdict": row["verdict"],
            }
            for row in found.get("sanity", [])
        ],
        "Attack and fault together": [
            {
                "epsilon": table.epsilon_label(row["epsilon"]),
                "bit error rate": table.rate_label(row["rate"]) if row["rate"] else "0",
                "images": row["n_images"],
                "patterns": row["n_patterns"],
                "accuracy, %": _mean(row),
                "worst, %": f"{100 * row['worst']:.1f}",
            }
            for row in found.get("matrix", [])
        ],
    }  # fmt: skip
    line = (
        f"Attacks on the input, {found['n_total']} images. Model {found['model_sha256'][:12]}, "
        f"twin {found['twin_sha256'][:12]}. {_level(confidence)}"
    )
    return Result(name=name, lines=[line, *found["warnings"]], tables=tables)


def _bits(name: str, found: dict[str, Any]) -> Result:
    n, reached, confidence = found["n_images"], found["flips_to_chance"], found["confidence"]
    flips = (
        f"{reached['mean']:.1f} [{reached['low']:.1f}, {reached['high']:.1f}]"
        if "mean" in reached
        else f"more than {reached['more_than']}"
    )
    lines = [
        f"Adversarial bits: progressive bit search with {found['batch']} images, measured on {n} "
        f"others. Model {found['model_sha256'][:12]}. {_level(confidence)}",
        f"Without flips {_share(found['clean'], confidence)} %; chance is at most "
        f"{100 * found['limit']:.1f} %. Flips to chance: {flips}, reached in "
        f"{reached['n_reached']} of {reached['n_searches']} searches.",
    ]
    if found["random"] is not None:
        accuracy = _mean(found["random"]["fault_accuracy"])
        lines.append(f"{found['random']['n_flips']} random flips: {accuracy} %.")
    searches = [
        {
            "search": number,
            "flips": len(made["flips"]),
            "to chance": made["flips_to_chance"],
            "exported file, %": _share({"n_correct": (made["flips"] or [found["clean"]])[-1]
                                        ["n_correct"], "n_total": n}, confidence),
            "first flips": ", ".join(f"{row['tensor']}[{row['offset']}] bit {row['bit']}"
                                     for row in made["flips"][:3]),
        }
        for number, made in enumerate(found["searches"])
    ]  # fmt: skip
    return Result(name=name, lines=lines, tables={"Searches": searches})


def read(path: Path, name: str) -> Result:
    """A result of `attack` or `bfa`; InputError when it is neither."""
    found = read_json(path)
    try:
        return _bits(name, found) if "searches" in found else _attack(name, found)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is not what `resq-deploy attack --json` or `bfa --json` writes "
            f"({type(error).__name__}: {error}); campaigns are given as stores"
        ) from None
