"""The stage table: what each stage bought, on the exported files, with n and intervals.

One dictionary of counts and numbers (`build`), written as JSON, Markdown and terminal text.
Accuracies are rates in [0, 1] in the dictionary and percent in print; differences are
percentage points everywhere. Nothing depends on the time or the place of the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from resq_deploy import artifacts, metrics
from resq_deploy.records import Trial
from resq_deploy.report import counts
from resq_deploy.report.sources import (
    BASELINE,
    HARDENED,
    LABELS,
    STAGES,
    Attack,
    Campaign,
    Clean,
    Run,
    marks,
)

FORMAT = "resq-deploy table 1"
NONE = "–"

# What the project wants, in percentage points: the figures that RESQ (arXiv 2603.15413) reports.
FAULT_LOSS, FAULT_WANTED = 15.0, 12.5
ATTACK_LOSS, ATTACK_WANTED = 30.0, 10.4
CLEAN_WANTED = -2.0

Cell = dict[str, Any]


# Words ---------------------------------------------------------------------------------------


def rate_label(rate: float) -> str:
    """A bit error rate as m e x.

    >>> rate_label(0.00001), rate_label(0.003), rate_label(0.0)
    ('1e-5', '3e-3', '0')
    """
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate else "0"


def epsilon_label(epsilon: float) -> str:
    """An L-infinity radius as k/255.

    >>> epsilon_label(8 / 255), epsilon_label(0.1)
    ('8/255', '25.5/255')
    """
    return f"{epsilon * 255:.4g}/255"


def percent(cell: Cell | None, *, separator: str = " ") -> str:
    """Value and interval of a cell in percent; a dash for none."""
    if cell is None:
        return NONE
    value, low, high = (100 * cell[key] for key in ("value", "low", "high"))
    return f"{value:.1f}{separator}[{low:.1f}, {high:.1f}]"


def points(cell: Cell | None, *, separator: str = " ") -> str:
    """Value and interval of a gain in percentage points; a dash for none."""
    if cell is None:
        return NONE
    return f"{cell['points']:+.1f}{separator}[{cell['low']:+.1f}, {cell['high']:+.1f}]"


def size_label(cell: Cell) -> str:
    """What stands behind a cell: images, or patterns and images."""
    if "n_patterns" in cell:
        return f"{cell['n_patterns']} patterns x {cell['n_images']} images"
    return f"{cell['n_total']} images"


def row_size(row: dict[str, Any]) -> str:
    """What stands behind a row; where the stages differ, one after the other."""
    sizes = dict.fromkeys(size_label(c) for c in row["stages"].values() if c is not None)
    return " / ".join(sizes) or NONE


# Gains ---------------------------------------------------------------------------------------


def _paired(difference: Sequence[int], n: int, unit: str, confidence: float) -> Cell:
    """Mean of differences of correct counts, each out of `n` images, as percentage points."""
    found = metrics.bootstrap_mean(100 * np.array(difference) / n, confidence)
    return {
        "points": 100 * sum(difference) / (n * len(difference)),
        "low": found.low,
        "high": found.high,
        "n": len(difference),
        "unit": unit,
        "paired": True,
    }


def _clean_gain(a: Clean, b: Clean, confidence: float) -> Cell:
    """Paired over images where both files mark them; else Newcombe's interval from the counts.

    Newcombe, "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 17 (1998), method 10; too wide for two networks on the same images.
    """
    if a.correct is not None and b.correct is not None and a.n_total == b.n_total:
        difference = marks(b.correct) - marks(a.correct)
        return _paired(difference.tolist(), 1, "images", confidence)
    x, y = (metrics.wilson(c.n_correct, c.n_total, confidence) for c in (a, b))
    mean = y.value - x.value
    return {
        "points": 100 * mean,
        "low": 100 * (mean - math.hypot(y.value - y.low, x.high - x.value)),
        "high": 100 * (mean + math.hypot(y.high - y.value, x.value - x.low)),
        "n": min(a.n_total, b.n_total),
        "unit": "images",
        "paired": False,
    }


def _unlike(a: Campaign, b: Campaign) -> str | None:
    """The first header field that keeps two campaigns from having the same faults and images."""
    left, right = a.header, b.header
    for name in ("data_sha256", "n_images", "fault", "plan", "seed"):
        if getattr(left, name) != getattr(right, name):
            return name
    sizes = [[(row.get("shape"), row["n_bits"]) for row in h.space] for h in (left, right)]
    return None if sizes[0] == sizes[1] else "space"


def _pairs(a: Sequence[Trial], b: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    numbered = {t.trial: t for t in b}
    return [(t, numbered[t.trial]) for t in a if t.trial in numbered]


# Areas ---------------------------------------------------------------------------------------


def areas(campaign: Campaign) -> dict[int, float]:
    """Per draw, the area under accuracy over log10 BER divided by the range: a mean in [0, 1].

    Trapezoidal. Draw d is the d-th pattern of every rate (trial % draws); draws that lack a
    rate are left out, so are rates of 0. Empty with fewer than two rates, or no sweep.
    """
    draws = campaign.header.plan.get("draws")
    rates = {r: ts for r, ts in campaign.by_rate.items() if r > 0}
    if not draws or len(rates) < 2:
        return {}
    by_draw = [{t.trial % draws: t.n_correct / t.n_total for t in ts} for ts in rates.values()]
    x = np.log10(np.array(list(rates)))
    whole = sorted(set.intersection(*(set(found) for found in by_draw)))
    return {
        d: float(np.trapezoid([found[d] for found in by_draw], x) / (x[-1] - x[0])) for d in whole
    }


def _area(found: dict[int, float], n_images: int, confidence: float) -> Cell | None:
    if not found:
        return None
    mean = metrics.bootstrap_mean(np.array(list(found.values())), confidence)
    return {
        "n_patterns": len(found),
        "n_images": n_images,
        "value": mean.value,
        "low": mean.low,
        "high": mean.high,
    }


def _area_gain(a: dict[int, float], b: dict[int, float], confidence: float) -> Cell | None:
    common = [d for d in a if d in b]
    if not common:
        return None
    found = metrics.bootstrap_mean(100 * np.array([b[d] - a[d] for d in common]), confidence)
    return {
        "points": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "unit": "patterns",
        "paired": True,
    }


# Rows ----------------------------------------------------------------------------------------


def _clean_row(run: Run) -> dict[str, Any]:
    found = {name: stage.clean for name, stage in run.stages.items()}
    a, b = found[BASELINE], found[HARDENED]
    return {
        "measure": "clean",
        "label": "clean",
        "stages": {
            name: counts.accuracy(c.count, run.confidence) if c else None
            for name, c in found.items()
        },
        "gain": _clean_gain(a, b, run.confidence) if a and b else None,
    }


def _attack_rows(run: Run, warnings: list[str]) -> list[dict[str, Any]]:
    found = {name: stage.attack for name, stage in run.stages.items()}
    a, b = found[BASELINE], found[HARDENED]
    if a and b and (unlike := _unlike_attacks(a, b)):
        warnings.append(f"attacks on baseline and hardened differ in {unlike}: no paired gain")
        a = b = None
    rows = []
    tested = {
        name: {e.epsilon: e for e in attack.epsilons} if attack else {}
        for name, attack in found.items()
    }
    for epsilon in sorted({epsilon for radii in tested.values() for epsilon in radii}):
        at = {name: radii.get(epsilon) for name, radii in tested.items()}
        left, right = (at[BASELINE], at[HARDENED]) if a and b else (None, None)
        gain = None
        if left and right:
            difference = marks(right.correct) - marks(left.correct)
            gain = _paired(difference.tolist(), 1, "images", run.confidence)
        rows.append(
            {
                "measure": "adversarial",
                "label": f"adversarial, epsilon {epsilon_label(epsilon)}",
                "epsilon": epsilon,
                "stages": {
                    name: {
                        **counts.accuracy(e.deployed, run.confidence),
                        "twin": counts.accuracy(e.twin, run.confidence),
                    }
                    if e
                    else None
                    for name, e in at.items()
                },
                "gain": gain,
            }
        )
    return rows


def _unlike_attacks(a: Attack, b: Attack) -> str | None:
    names = ("n_total", "steps", "restarts")
    return next((name for name in names if getattr(a, name) != getattr(b, name)), None)


def _fault_rows(run: Run, warnings: list[str]) -> list[dict[str, Any]]:
    found = {name: stage.ber for name, stage in run.stages.items()}
    by_rate = {name: c.by_rate if c else {} for name, c in found.items()}
    a, b = found[BASELINE], found[HARDENED]
    if a and b and (unlike := _unlike(a, b)):
        warnings.append(f"BER sweeps of baseline and hardened differ in {unlike}: no paired gain")
        a = b = None
    rows: list[dict[str, Any]] = []
    if any(found.values()):
        golden = {name: c.header.golden if c else None for name, c in found.items()}
        rows.append(
            {
                "measure": "golden",
                "label": "fault, none",
                "stages": {
                    name: counts.accuracy(c, run.confidence) if c else None
                    for name, c in golden.items()
                },
                "gain": None,  # a store keeps no marks per image
            }
        )
    for rate in sorted({rate for rates in by_rate.values() for rate in rates}):
        at = {name: rates.get(rate) for name, rates in by_rate.items()}
        pairs = _pairs(at[BASELINE] or (), at[HARDENED] or ()) if a and b else []
        difference = [y.n_correct - x.n_correct for x, y in pairs]
        rows.append(
            {
                "measure": "fault",
                "label": f"fault, BER {rate_label(rate)}",
                "rate": rate,
                "stages": {
                    name: counts.fault_accuracy(trials, run.confidence) if trials else None
                    for name, trials in at.items()
                },
                "gain": _paired(difference, pairs[0][0].n_total, "patterns", run.confidence)
                if pairs
                else None,
            }
        )
    area = {name: areas(c) if c else {} for name, c in found.items()}
    if any(area.values()):
        rows.append(
            {
                "measure": "area",
                "label": "fault, mean over log BER",
                "stages": {
                    name: _area(area[name], c.header.n_images, run.confidence) if c else None
                    for name, c in found.items()
                },
                "gain": _area_gain(area[BASELINE], area[HARDENED], run.confidence)
                if a and b
                else None,
            }
        )
    return rows


# Verdict -------------------------------------------------------------------------------------


def _at_least(value: float, limit: float) -> bool:
    """value >= limit for percentage points made from counts: exactly the limit is enough."""
    return round(value, 9) >= limit


def _wish(wanted: float) -> str:
    return f"{wanted:+g} points" if wanted > 0 else f"at most {-wanted:g} points lost"


def _judged(gain: Cell, wanted: float, where: str) -> dict[str, Any]:
    status = "reached" if _at_least(gain["points"], wanted) else "not reached"
    kind = f"paired over {gain['n']} {gain['unit']}" if gain["paired"] else "not paired"
    return {
        "status": status,
        "gain": gain,
        "wanted": wanted,
        "wish": _wish(wanted),
        "text": f"{points(gain)} points ({kind}) {where}; wanted {_wish(wanted)}: {status}",
    }


def _undecided(wanted: float, why: str) -> dict[str, Any]:
    return {
        "status": "not decided",
        "gain": None,
        "wanted": wanted,
        "wish": _wish(wanted),
        "text": f"{why}; wanted {_wish(wanted)}: not decided",
    }


def _at_first_loss(
    rows: Sequence[dict[str, Any]], key: str, before: float | None, lost: float, wanted: float
) -> dict[str, Any]:
    """The gain in the mildest row where the baseline has lost `lost` points.

    `before` is the baseline's accuracy on the same images without faults and attacks.
    """
    what, label = ("BER", rate_label) if key == "rate" else ("epsilon", epsilon_label)
    tested = [row for row in rows if row["stages"][BASELINE] is not None]
    if before is None or not tested:
        return _undecided(wanted, f"the baseline was not tested at any {what}")
    losses = [100 * (before - row["stages"][BASELINE]["value"]) for row in tested]
    for row, loss in zip(tested, losses, strict=True):
        if _at_least(loss, lost):
            where = f"at {what} {label(row[key])}, where the baseline has lost {loss:.1f} points"
            if row["gain"] is None:
                return _undecided(wanted, f"no paired gain {where}") | {key: row[key]}
            return _judged(row["gain"], wanted, where) | {key: row[key]}
    return _undecided(
        wanted,
        f"no tested {what} costs the baseline {lost:g} points (at most {max(losses):.1f})",
    )


def _verdict(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    baseline = run.stages[BASELINE]
    golden = baseline.ber.header.golden.rate if baseline.ber else None
    clean = baseline.attack.clean.deployed.rate if baseline.attack else None
    faults = [row for row in rows if row["measure"] == "fault"]
    attacks = [row for row in rows if row["measure"] == "adversarial"]
    gain = rows[0]["gain"]
    return {
        "fault": _at_first_loss(faults, "rate", golden, FAULT_LOSS, FAULT_WANTED),
        "attack": _at_first_loss(attacks, "epsilon", clean, ATTACK_LOSS, ATTACK_WANTED),
        "clean": _judged(gain, CLEAN_WANTED, "on clean images")
        if gain
        else _undecided(CLEAN_WANTED, "clean accuracy of baseline or hardened network is missing"),
    }


# The table -----------------------------------------------------------------------------------


def _campaigns(run: Run) -> list[Campaign]:
    return [c for stage in run.stages.values() for c in (stage.ber, stage.single) if c]


def _same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def build(run: Run) -> dict[str, Any]:
    """The table in plain JSON values.

    `rows`: one per measure (clean; adversarial by epsilon; fault by rate; area), each with a cell
    per stage (None where missing) and the `gain`, hardened minus baseline. `verdict`: whether
    the wanted gains are there. `missing`, `warnings`: lines for the reader.
    """
    warnings = list(run.warnings)
    rows = [_clean_row(run), *_attack_rows(run, warnings), *_fault_rows(run, warnings)]
    headers = [c.header for c in _campaigns(run)]
    for name in ("cpu", "versions"):
        if not _same([getattr(header, name) for header in headers]):
            warnings.append(f"campaigns ran with different {name}; the first is shown")
    return {
        "format": FORMAT,
        "name": run.name,
        "seed": run.recipe.get("seed"),
        "confidence": run.confidence,
        "stages": list(STAGES),
        "rows": rows,
        "verdict": _verdict(run, rows),
        "versions": headers[0].versions if headers else {},
        "cpu": headers[0].cpu if headers else {},
        "missing": run.missing,
        "warnings": warnings,
    }


# Print ---------------------------------------------------------------------------------------


def cpu_line(cpu: dict[str, Any]) -> str:
    """The hardware in words."""
    if not cpu:
        return "unknown"
    vnni = ", ".join(cpu.get("vnni") or ()) or "none"
    return f"{cpu.get('name', 'unknown')} ({cpu.get('machine', 'unknown')}), VNNI: {vnni}"


def notes(table: dict[str, Any]) -> list[str]:
    """What stands under the table: how to read it, and on what it was measured."""
    level = f"{100 * table['confidence']:g} %"
    versions = ", ".join(f"{name} {number}" for name, number in sorted(table["versions"].items()))
    return [
        f"Exported int8 files in onnxruntime; accuracy in % with {level} intervals: Wilson over "
        "images (clean, adversarial, no faults), bootstrap over fault patterns (fault). n: images, "
        "or fault patterns x images.",
        "Gain: +adjust minus baseline in percentage points, paired on the same images and the "
        "same fault patterns" + _unpaired(table) + ".",
        f"Seed {table['seed']}; versions: {versions or 'unknown'}.",
        f"Hardware: {cpu_line(table['cpu'])}.",
    ]


def _unpaired(table: dict[str, Any]) -> str:
    labels = [r["label"] for r in table["rows"] if r["gain"] and not r["gain"]["paired"]]
    return f" (not paired: {', '.join(labels)})" if labels else ""


def _grid(table: dict[str, Any], separator: str) -> list[list[str]]:
    return [
        [
            row["label"],
            *(percent(row["stages"][name], separator=separator) for name in STAGES),
            points(row["gain"], separator=separator),
            row_size(row),
        ]
        for row in table["rows"]
    ]


def tail_grid(table: dict[str, Any]) -> list[list[str]]:
    """5 % quantile and worst pattern per rate."""
    return [
        [
            f"BER {rate_label(row['rate'])}",
            *(
                f"{100 * cell['q05']:.1f} / {100 * cell['worst']:.1f}" if cell else NONE
                for cell in (row["stages"][name] for name in STAGES)
            ),
            row_size(row),
        ]
        for row in table["rows"]
        if row["measure"] == "fault"
    ]


HEAD = ["", *(LABELS[name] for name in STAGES)]
TITLES = {"fault": "Faults", "attack": "Attacks", "clean": "Clean accuracy"}


def _columns(columns: Sequence[str], form: str, rows: Sequence[Sequence[str]]) -> str:
    align = ("left", *("right" for _ in columns[1:]))
    return tabulate(rows, headers=columns, tablefmt=form, colalign=align, disable_numparse=True)


def _safe(text: str) -> str:
    """Text from files for Markdown: no markup, no table columns, one line."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.replace("|", "\\|").replace("`", "'").split())


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    parts = [
        f"# {_safe(table['name'])}: what each stage bought",
        "\n".join(f"- {TITLES[k]}: {v['text']}." for k, v in table["verdict"].items()),
        _columns([*HEAD, "gain, points", "n"], "pipe", _grid(table, " ")),
    ]
    if tail := tail_grid(table):
        parts += ["5 % quantile / worst fault pattern, %:", _columns([*HEAD, "n"], "pipe", tail)]
    parts.append("  \n".join(_safe(line) for line in notes(table)))
    for title, key in (("Missing", "missing"), ("Warnings", "warnings")):
        if table[key]:
            parts.append(f"{title}:\n\n" + "\n".join(f"- {_safe(line)}" for line in table[key]))
    return "\n\n".join(parts) + "\n"


def text(table: dict[str, Any]) -> str:
    """The table for a terminal, at most 100 columns for usual sizes: intervals stand below."""
    lines = [_columns([*HEAD, "gain, points", "n"], "simple", _wrapped(_grid(table, "\n"))), ""]
    lines += [f"{TITLES[key]}: {found['text']}" for key, found in table["verdict"].items()]
    lines += ["", *notes(table)]
    lines += [f"missing: {line}" for line in table["missing"]]
    lines += [f"warning: {line}" for line in table["warnings"]]
    return "\n".join(lines)


def _wrapped(rows: list[list[str]]) -> list[list[str]]:
    """Labels and sizes on two lines, like the intervals, and short."""
    return [
        [
            label.replace(", ", ",\n").replace("epsilon", "eps").replace("mean over", "mean"),
            *cells,
            size.replace(" x ", "\nx ").removesuffix(" images"),
        ]
        for label, *cells, size in rows
    ]


def write(table: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write `table.json` and `table.md` into `folder`: the same table gives the same bytes."""
    made = markdown(table)
    return (
        artifacts.write_json(folder / "table.json", table),
        artifacts.write(folder / "table.md", lambda p: p.write_text(made, encoding="utf-8")),
    )
