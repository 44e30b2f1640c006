"""The table of methods as results.py prints it: from the rows that methods.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resq_deploy import artifacts, metrics
from resq_deploy.report import table

ABSENT = "–"
AGAIN = "†"
"""Marks what was measured after a second training."""


def pack(marks: str) -> dict[str, Any]:
    """Which images were right, as counts and as the hex digits of their bits."""
    right = np.array([mark == "1" for mark in marks])
    return {
        "n_correct": int(right.sum()),
        "n": len(right),
        "bits": np.packbits(right).tobytes().hex(),
    }


def unpack(packed: dict[str, Any]) -> NDArray[np.float64]:
    """The inverse of `pack`: 1.0 for every image that was right, else 0.0."""
    raw = np.frombuffer(bytes.fromhex(packed["bits"]), np.uint8)
    return np.unpackbits(raw)[: packed["n"]].astype(np.float64)


def measured(row: dict[str, Any], column: str) -> dict[str, Any]:
    """A column that was added after the fact; empty where it was not."""
    found: dict[str, Any] = row.get("more", {}).get(column, {})
    return found


def samples(row: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """What each column averages: one value per image or per fault pattern, in [0, 1]."""
    found = {"clean": unpack(row["clean"])}
    for label, attack in (
        ("FGSM", measured(row, "fgsm")),
        ("PGD", row["attack"]),
        ("AA", measured(row, "autoattack")),
    ):
        radii = attack.get("radii", [])
        found |= {f"{label} {table.epsilon_label(at['epsilon'])}": unpack(at) for at in radii}
    faults = row["fault"]
    if rare := measured(row, "ber"):
        found[f"BER {rare['rate']:g}"] = np.array(rare["n_correct"]) / faults["n_images"]
    rates = [at["rate"] for at in faults["rates"]]
    faulty = np.array([at["n_correct"] for at in faults["rates"]]) / faults["n_images"]
    found |= {f"BER {rate:g}": values for rate, values in zip(rates, faulty, strict=True)}
    if len(rates) > 1:
        x = np.log10(rates)
        found["area"] = np.trapezoid(faulty, x, axis=0) / (x[-1] - x[0])
    for cell in measured(row, "both").get("cells", []):
        label = f"PGD {table.epsilon_label(cell['epsilon'])}, BER {cell['rate']:g}"
        found[label] = np.array(cell["n_correct"]) / cell["n_images"]
    return found


def over_patterns(column: str) -> bool:
    """Whether a column averages fault patterns, not images."""
    return column.startswith("area") or "BER" in column


def again(row: dict[str, Any], column: str) -> str:
    """The mark of a column of `samples` that was measured after a second training, or nothing."""
    rare = measured(row, "ber")
    if "," in column:
        found = measured(row, "both")
    elif column == f"BER {rare.get('rate', 0):g}":
        found = rare
    else:
        found = measured(row, {"FGSM": "fgsm", "AA": "autoattack"}.get(column.split()[0], ""))
    return AGAIN if "again" in found else ""


def accuracy(column: str, values: NDArray[np.float64] | None) -> str:
    """Mean in percent with its 95 % interval: Wilson over images, bootstrap over patterns."""
    if values is None:
        return ABSENT
    if over_patterns(column):
        found = metrics.bootstrap_mean(values)
    else:
        found = metrics.wilson(int(values.sum()), len(values))
    return table.percent(vars(found))


def difference(values: NDArray[np.float64] | None, base: NDArray[np.float64] | None) -> str:
    """Paired difference in percentage points with its 95 % interval."""
    if values is None or base is None or len(values) != len(base):
        return ABSENT
    found = metrics.bootstrap_mean(100 * (values - base))
    return table.points({"points": found.value, "low": found.low, "high": found.high})


def tail(values: NDArray[np.float64] | None) -> str:
    """5 % quantile and minimum in percent."""
    if values is None:
        return ABSENT
    return f"{100 * np.quantile(values, 0.05):.1f}; {100 * values.min():.1f}"


def chance(found: dict[str, Any]) -> str:
    """Flips to chance level, with interval where every search got there."""
    if not found:
        return ABSENT
    if "refused" in found:
        return "refused"
    flips, mark = found["flips_to_chance"], AGAIN if "again" in found else ""
    if "mean" in flips:
        return f"{flips['mean']:.1f} [{flips['low']:.1f}, {flips['high']:.1f}]{mark}"
    reached = f"{flips['n_reached']} of {flips['n_searches']} got there"
    return f"more than {flips['more_than']} ({reached}){mark}"


def second(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the mark means, where a row has one."""
    notes = [(name, row, more["again"]) for name, row in found.items()
             for more in row.get("more", {}).values() if "again" in more]  # fmt: skip
    if not notes:
        return []
    moved = [100 * (note["n_correct"] / note["n"] - row["clean"]["n_correct"] / row["clean"]["n"])
             for _, row, note in notes]  # fmt: skip
    most = notes[int(np.argmax(np.abs(moved)))][0]
    processors = ", ".join(sorted({note["cpu"] for *_, note in notes}))
    return [
        f"{AGAIN} measured on the row trained once more from the same recipe, on {processors} with "
        f"the code of then: other last bits, and accuracy without faults {min(moved):+.1f} to "
        f"{max(moved):+.1f} points from that of the row (most: `{most}`).",
        "",
    ]


def elsewhere(found: dict[str, dict[str, Any]]) -> list[str]:
    """Which rows were trained and measured on other processors than the first."""
    others: dict[str, list[str]] = {}
    for name, row in found.items():
        if row["cpu"] != found["baseline"]["cpu"]:
            others.setdefault(row["cpu"], []).append(name)
    return [
        line
        for cpu, names in others.items()
        for line in (f"Trained and measured on {cpu}: {', '.join(names)}.", "")
    ]


def costs(row: dict[str, Any]) -> list[str]:
    """Bytes, time per image, training, flips to chance."""
    took, trained = measured(row, "time"), measured(row, "cost")
    cells = [f"{row['n_bytes']:,}", ABSENT, ABSENT, ABSENT, chance(measured(row, "bfa"))]
    if took:
        ratio = took["ratio"]
        mark = AGAIN if "again" in took else ""
        cells[1] = f"{1e6 * took['seconds']:.0f}{mark}"
        cells[2] = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    if trained:
        cells[3] = f"{trained['epochs']:.1f}" + ", and stage 3" * trained["adjusted"]
    return cells


def grid(body: list[list[Any]], head: list[str]) -> str:
    return str(tabulate(body, head, tablefmt="github", disable_numparse=True))


def section(name: str, found: dict[str, dict[str, Any]]) -> str:
    """The tables of one base recipe, in Markdown."""
    measures = dict.fromkeys(name for row in found.values() for name in row.get("more", {}))
    first = found["baseline"]
    same = ("data_sha256", "measured")
    kept = {n: row for n, row in found.items() if all(row[k] == first[k] for k in same)}
    left = sorted(found.keys() - kept.keys())
    columns = {n: samples(row) for n, row in kept.items()}
    # those of the row that has most: some are measured after the fact
    names, base = list(max(columns.values(), key=len)), columns["baseline"]
    about = [[n, row["about"], " -> ".join(row["stages"]) or "none", row["epochs"]]
             for n, row in kept.items()]  # fmt: skip
    aa = next((len(of[c]) for of in columns.values() for c in of if c.startswith("AA")), None)
    versions = ", ".join(
        f"{k} {first['versions'][k]}" for k in ("torch", "brevitas", "onnxruntime")
    )
    lines = [
        f"## {name}: methods, one by one",
        "",
        f"Exported int8 files in onnxruntime; {len(base['clean'])} test images for clean, "
        f"{first['attack']['radii'][0]['n']} under attack ({first['attack']['what']}, "
        f"white-box on the twin, replayed on the file; FGSM likewise), "
        f"{len(first['fault']['rates'][0]['n_correct'])} fault patterns per rate on "
        f"{first['fault']['n_images']} images; 95 % intervals. `area`: mean over log10 BER, from "
        f"BER {first['fault']['rates'][0]['rate']:g} on. `{ABSENT}`: not measured. {versions}, "
        f"{first['cpu']}.",
        "",
        *([f"AA: AutoAttack (APGD-100, APGD-DLR-100, Square with 1,000 iterations, see "
           f"[attacks.md](attacks.md)) on the first {aa} images; what PGD broke of them is "
           "broken.", ""] if aa else []),
        grid(about, ["row", "what", "stages behind the baseline", "epochs per stage"]),
        "",
    ]  # fmt: skip
    for title, part in (
        ("clean and under attack", [c for c in names if not over_patterns(c)]),
        ("under bit errors", [c for c in names if over_patterns(c) and "," not in c]),
        ("under attack and bit errors", [c for c in names if "," in c]),
    ):
        if not part:
            continue
        shown = {n: of for n, of in columns.items() if any(c in of for c in part)}
        levels = [[n, *(accuracy(c, of.get(c)) + again(kept[n], c) for c in part)]
                  for n, of in shown.items()]  # fmt: skip
        gains = [[n, *(difference(of.get(c), base.get(c)) + again(kept[n], c) for c in part)]
                 for n, of in shown.items() if n != "baseline"]  # fmt: skip
        lines += [
            f"Accuracy {title}, %:",
            "",
            grid(levels, ["row", *part]),
            "",
            "Difference to `baseline` in percentage points, paired:",
            "",
            grid(gains, ["row", *part]),
            "",
        ]
    rates = [c for c in names if c.startswith("BER")]
    lines += [
        "5 % quantile over patterns; worst pattern, %:",
        "",
        grid([[n, *(tail(of.get(c)) + again(kept[n], c) for c in rates)]
              for n, of in columns.items()], ["row", *rates]),
        "",
        "What it costs, and adversarial bits:",
        "",
        grid([[n, *costs(row)] for n, row in kept.items()],
             ["row", "bytes of weights", "µs per image", "relative to `baseline`",
              "training, epochs", "flips to chance"]),
        "",
        "µs per image: processor time, one image a run, one thread. Training: what the stages "
        "behind the baseline cost in processor time, in epochs of plain quantization-aware "
        "training of the same network; stage 3 trains nothing and is not counted. Flips to "
        "chance: [progressive bit search](attacks.md#adversarial-bits), 5 searches, 128 images to "
        "attack with, up to 1,000 others to measure on.",
        "",
        *second(kept),
        *elsewhere(kept),
        *([f"Measured otherwise, and left out: {', '.join(left)}.", ""] if left else []),
        f"Commands: `python benchmarks/methods.py models/{name}.toml {first['command']}`"
        + (f", then `--measure {','.join(measures)}`." if measures else "."),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def sections(stored: Path, order: list[str]) -> list[str]:
    """One for every folder of rows in `stored`, its rows in the order given."""
    parts = []
    for folder in sorted(path for path in stored.glob("*") if path.is_dir()):
        found = {path.stem: artifacts.read_json(path) for path in folder.glob("*.json")}
        known = {name: found[name] for name in order if name in found}
        if "baseline" in known:
            parts.append(section(folder.name, known))
    return parts
