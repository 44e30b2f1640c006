"""The HTML page: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from resq_deploy import metrics
from resq_deploy.records import OUTCOMES
from resq_deploy.report import counts, figures, table
from resq_deploy.report.attacks import Result
from resq_deploy.report.sources import (
    BASELINE,
    CHECKPOINTS,
    DEPLOYED,
    HARDENED,
    LABELS,
    STAGES,
    Campaign,
    Run,
)

CONFIDENCE = 0.95
"""Of intervals where no recipe says otherwise."""
HISTOGRAMS = 5
"""Layers shown next to the histogram over all of them."""

Grid = dict[str, Any]
Figure = dict[str, Any]


# Cells ---------------------------------------------------------------------------------------


def cell_text(value: Any) -> str:
    """Any JSON value for a table cell: short numbers, long lists of numbers as their range."""
    if value is None:
        return table.NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {cell_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        if len(value) > 8 and all(isinstance(v, int | float) for v in value):
            return f"{cell_text(min(value))} to {cell_text(max(value))} ({len(value)} values)"
        return ", ".join(cell_text(v) for v in value)
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name  # folders of the machine are nobody's business
    return str(value)


def grid(rows: Sequence[dict[str, Any]], *, left: int = 1) -> Grid:
    """A table of any records: their keys become columns, in the order of first appearance.

    The first `left` columns are text, aligned left.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [[cell_text(row.get(column)) for column in columns] for row in rows],
        "left": left,
    }


def _figure(svg: str, alt: str, caption: str) -> Figure:
    # Our own SVG: matplotlib escapes the names that are drawn into it.
    return {"svg": Markup(svg), "alt": alt, "caption": caption}  # noqa: S704


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a value that should be a list of them."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


# Campaigns -----------------------------------------------------------------------------------


def _ber_line(label: str, campaign: Campaign, confidence: float, order: int) -> figures.Line | None:
    found = {r: counts.fault_accuracy(t, confidence) for r, t in campaign.by_rate.items() if r > 0}
    if not found:
        return None
    golden = campaign.header.golden
    cells = list(found.values())
    return figures.Line(
        label=f"{label} ({100 * golden.rate:.1f} % without faults)",
        x=list(found),
        y=[c["value"] for c in cells],
        low=[c["low"] for c in cells],
        high=[c["high"] for c in cells],
        order=order,
    )


def _sizes(numbers: Iterable[int]) -> str:
    low, *_, high = sorted([*numbers] * 2)
    return str(low) if low == high else f"{low} to {high}"


def _ber_figure(
    campaigns: dict[str, Campaign], confidence: float, key: str, orders: dict[str, int]
) -> Figure | None:
    found = {
        label: _ber_line(label, c, confidence, orders[label]) for label, c in campaigns.items()
    }
    lines = [line for line in found.values() if line]
    if not lines:
        return None
    used = [campaigns[label] for label, line in found.items() if line]
    patterns = _sizes(len(t) for c in used for t in c.by_rate.values())
    images = _sizes(c.header.n_images for c in used)
    return _figure(
        figures.accuracy_over_ber(lines, key),
        "Line chart of accuracy over bit error rate for " + ", ".join(campaigns),
        f"Mean accuracy of the exported file over the bit error rate in its stored weights; "
        f"bands: {100 * confidence:g} % bootstrap intervals over fault patterns (n = {patterns} "
        f"per rate, {images} images each).",
    )


def _map_figure(campaigns: dict[str, Campaign], key: str) -> Figure | None:
    used = {label: c for label, c in campaigns.items() if c.single}
    if not used:
        return None
    layers = list(dict.fromkeys(row["name"] for c in used.values() for row in c.header.space))
    n_bits = max(8, *(t.site.bit + 1 for c in used.values() for t in c.single if t.site))
    panels = []
    for label, campaign in used.items():
        sdc, total = counts.layer_bits(campaign.single, layers, n_bits)
        title = f"{label} (n = {total.sum()} flips)"
        panels.append(figures.Panel(title=title, sdc=sdc, total=total))
    images = _sizes(c.header.n_images for c in used.values())
    return _figure(
        figures.sdc_maps(panels, layers, key),
        "Heat map of the rate of silent data corruption by layer and bit for " + ", ".join(used),
        f"Single flips that changed the top-1 of at least one of {images} images, by layer and "
        "bit: rate in % and number of flips tried (n). Grey: no flip was drawn there. Cells with "
        "few flips say little; intervals stand in the tables.",
    )


def _rate_text(k: int, n: int, confidence: float) -> str:
    return table.percent(vars(metrics.wilson(k, n, confidence)))


def _outcome_grid(campaigns: dict[str, Campaign], confidence: float) -> Grid:
    rows = []
    for label, campaign in campaigns.items():
        found = counts.outcomes(campaign.trials, confidence)
        accuracy = counts.fault_accuracy(campaign.trials, confidence)
        row = {"file": label, "trials": found["n_trials"], "images": campaign.header.n_images}
        for name in OUTCOMES:
            title = f"{'SDC' if name == 'sdc' else name}, %"
            row[title] = f"{found[name]['n']}: {table.percent(found[name])}"
        if not campaign.by_rate:  # over all rates of a sweep together it would mean nothing
            row["mean accuracy, %"] = table.percent(accuracy)
        row["worst accuracy, %"] = f"{100 * accuracy['worst']:.1f}"
        rows.append(row)
    return grid(rows)


def _by(campaigns: dict[str, Campaign], what: str, confidence: float) -> Grid:
    """SDC rate by `layer` or by `bit`, one column per file."""
    groups: dict[Any, dict[str, list[bool]]] = {}
    order = [row["name"] for c in campaigns.values() for row in c.header.space]
    for label, campaign in campaigns.items():
        for t in campaign.single:
            assert t.site is not None
            place = t.site.tensor if what == "layer" else t.site.bit
            groups.setdefault(place, {}).setdefault(label, []).append(t.outcome == "sdc")
    ordered = sorted(groups, key=order.index) if what == "layer" else sorted(groups, reverse=True)
    return grid(
        [
            {
                what: place,
                **{
                    f"SDC rate of {label}, %": f"{_rate_text(sum(hit), len(hit), confidence)}, "
                    f"n = {len(hit)}"
                    if (hit := groups[place].get(label))
                    else None
                    for label in campaigns
                },
            }
            for place in ordered
        ]
    )


def _rate_grid(campaign: Campaign, confidence: float) -> Grid:
    rows = []
    for rate, trials in campaign.by_rate.items():
        cell = counts.fault_accuracy(trials, confidence)
        rows.append(
            {
                "bit error rate": table.rate_label(rate),
                "patterns": len(trials),
                "mean flips": f"{cell['mean_flips']:.1f}",
                "accuracy, %": table.percent(cell),
                "5 % quantile, %": f"{100 * cell['q05']:.1f}",
                "worst, %": f"{100 * cell['worst']:.1f}",
            }
        )
    return grid(rows)


def _campaign_grid(campaigns: Sequence[Campaign]) -> Grid:
    return grid(
        [
            {
                "store": c.name,
                "fault": c.header.fault,
                "plan": {k: v for k, v in c.header.plan.items() if k != "sites" and v is not None},
                "trials": len(c.trials),
                "images": c.header.n_images,
                "seed": c.header.seed,
                "engine": c.header.engine,
                "shard": c.header.shard,
                "seconds": round(c.seconds, 1),
                "model SHA-256": c.header.model_sha256,
                "data SHA-256": c.header.data_sha256,
            }
            for c in campaigns
        ],
        left=3,
    )


# A run ---------------------------------------------------------------------------------------


def _epsilon_figure(run: Run) -> Figure | None:
    lines, sizes = [], []
    for order, (name, stage) in enumerate(run.stages.items()):
        if stage.attack is None:
            continue
        attacked = sorted(stage.attack.epsilons, key=lambda e: e.epsilon)
        cells = [
            counts.accuracy(c, run.confidence)
            for c in (stage.attack.clean.deployed, *(e.deployed for e in attacked))
        ]
        sizes.append(stage.attack.n_total)
        lines.append(
            figures.Line(
                label=LABELS[name],
                x=[0.0, *(e.epsilon for e in attacked)],
                y=[c["value"] for c in cells],
                low=[c["low"] for c in cells],
                high=[c["high"] for c in cells],
                order=order,
            )
        )
    if not lines:
        return None
    return _figure(
        figures.accuracy_over_epsilon(lines, "eps"),
        "Line chart of accuracy over the radius of the attack for every stage",
        f"Accuracy of the exported file under PGD made on its Brevitas twin; bands: "
        f"{100 * run.confidence:g} % Wilson intervals over images (n = {_sizes(sizes)}).",
    )


def _twin_grid(run: Run) -> Grid:
    """Twin and exported file side by side: how well the attack transfers."""
    rows = []
    for name, stage in run.stages.items():
        if stage.attack is None:
            continue
        attacked = sorted(stage.attack.epsilons, key=lambda e: e.epsilon)
        clean = stage.attack.clean
        pairs = [("0", clean.twin, clean.deployed)]
        pairs += [(table.epsilon_label(e.epsilon), e.twin, e.deployed) for e in attacked]
        rows += [
            {
                "stage": LABELS[name],
                "epsilon": epsilon,
                "twin, %": table.percent(counts.accuracy(twin, run.confidence)),
                "exported file, %": table.percent(counts.accuracy(deployed, run.confidence)),
                "images": deployed.n_total,
                "PGD steps": stage.attack.steps,
                "restarts": stage.attack.restarts,
            }
            for epsilon, twin, deployed in pairs
        ]
    return grid(rows)


def _ranking(run: Run) -> tuple[Figure | None, Grid]:
    found = _objects(run.checkpoints.get("fault", {}).get("criticality"))
    if not found:
        return None, grid([])
    layers = [str(row.get("layer")) for row in found]
    scores = [float(row.get("score") or 0) for row in found]
    return (
        _figure(
            figures.ranking(layers, scores, "rank"),
            "Bar chart of the most critical layers: " + ", ".join(layers[: figures.TOP]),
            f"The {min(figures.TOP, len(layers))} most critical of {len(layers)} layers in stage "
            "2: moving average of the gradient norm, divided by the square root of the layer's "
            "size. No unit; only the order matters.",
        ),
        grid(found),
    )


def _code_counts(run: Run) -> dict[str, tuple[list[int], list[int]]]:
    """Per layer the 256 counts of the codes -128 to 127, before and after stage 3."""
    found = run.checkpoints.get(HARDENED, {}).get("codes")
    layers = found.items() if isinstance(found, dict) else ()
    return {
        name: (both["before"], both["after"])
        for name, both in layers
        if isinstance(both, dict)
        and all(len(both.get(when) or ()) == 256 for when in ("before", "after"))
    }


def _codes_figure(run: Run) -> Figure | None:
    layers = _code_counts(run)
    if not layers:
        return None
    overall = [np.sum([both[i] for both in layers.values()], axis=0).tolist() for i in (0, 1)]
    changed = [name for name, (before, after) in layers.items() if before != after]
    shown = [*changed, *(name for name in layers if name not in changed)][:HISTOGRAMS]
    histograms = [(f"all {len(layers)} layers", overall[0], overall[1])]
    histograms += [(name, *layers[name]) for name in shown]
    return _figure(
        figures.codes(histograms, "codes"),
        "Histograms of integer weight codes before and after stage 3",
        f"Integer codes of the {sum(overall[0]):,} weights before (grey) and after (blue) stage 3; "
        f"{len(changed)} of {len(layers)} layers changed, and are shown first.",
    )


def _loss_figure(run: Run) -> Figure | None:
    curves = []
    for name in CHECKPOINTS:
        history = _objects(run.checkpoints.get(name, {}).get("history"))
        pairs = [(h["epoch"], h["loss"]) for h in history if "epoch" in h and "loss" in h]
        if pairs:
            epochs, values = zip(*pairs, strict=True)
            curves.append((LABELS.get(name, name), epochs, values))
    if not curves:
        return None
    return _figure(
        figures.losses(curves, "loss"),
        "Line charts of the training loss over epochs, one per stage",
        "Training loss over epochs. Every stage minimises a loss of its own (stage 1 adds attacked "
        "images, stage 2 bit errors): heights do not compare across charts.",
    )


def _decisions(run: Run) -> tuple[Grid, list[str]]:
    made = run.checkpoints.get(HARDENED, {})
    found = _objects(made.get("decisions"))
    lines = []
    if found:
        alone = sum(row.get("ratio") == 1.0 for row in found)
        what = "groups of channels" if "channels" in found[0] else "layers"
        lines.append(f"{len(found) - alone} of {len(found)} {what} clipped, {alone} left alone.")
    if isinstance(correction := made.get("bias_correction"), dict):
        lines.append(f"Bias correction: {_kept(correction)}.")
    if isinstance(check := made.get("held_out"), dict) and isinstance(check.get("change"), dict):
        change = check["change"]
        lines.append(
            "On images and fault patterns that the search did not see, the objective changed by "
            f"{change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}] (paired over "
            f"{change['n']} patterns): {_kept(check)}"
            + ("." if check.get("kept") else "; the weights are those of stage 2.")
        )
    return grid(found), lines


def _kept(step: dict[str, Any]) -> str:
    return "kept" if step.get("kept") else "not kept"


def _manifests(run: Run) -> dict[str, dict[str, Any]]:
    return {name: stage.manifest for name, stage in run.stages.items() if stage.manifest}


def _files_grid(run: Run) -> Grid:
    return grid(
        [
            {"stage": LABELS[name], "file": file, "SHA-256": digest}
            for name, manifest in _manifests(run).items()
            for file, digest in sorted((manifest.get("files") or {}).items())
        ],
        left=3,
    )


def _kernels_grid(run: Run) -> Grid:
    keys = ("kernels", "weights", "opset", "ir_version")
    return grid(
        [
            {"stage": LABELS[name], **{key: m[key] for key in keys if key in m}}
            for name, m in _manifests(run).items()
        ],
        left=3,
    )


def _flat(value: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    rows = []
    for key, part in value.items():
        if isinstance(part, dict):
            rows += _flat(part, f"{prefix}{key}.")
        else:
            rows.append({"field": f"{prefix}{key}", "value": part})
    return rows


def _version_grid(run: Run) -> Grid:
    made = {f"{name}/checkpoint": c.get("versions") for name, c in run.checkpoints.items()} | {
        f"export/{name}": m.get("versions") for name, m in _manifests(run).items()
    }
    made |= {
        c.name: c.header.versions
        for stage in run.stages.values()
        for c in (stage.ber, stage.single)
        if c
    }
    return grid([{"artefact": n, **v} for n, v in made.items() if isinstance(v, dict)])


def _commands(run: Run) -> list[str]:
    """The command that repeats the run, and one per campaign."""
    out = f"runs/{run.name}"
    commands = [["run", f"models/{run.name}.toml", "--out", out]]
    data = cell_text((run.recipe.get("data") or {}).get("name"))
    for name, stage in run.stages.items():
        for campaign in (stage.ber, stage.single):
            if campaign is None:
                continue
            header, plan = campaign.header, campaign.header.plan
            command = ["inject", f"{out}/export/{name}/{DEPLOYED}", "--data", data]
            command += ["--images", str(header.n_images), "--fault", header.fault]
            if plan.get("kind") == "sweep":
                rates = ",".join(repr(rate) for rate in plan["rates"])  # exactly
                command += ["--rates", rates, "--draws", str(plan["draws"])]
            elif plan.get("margin"):
                command += ["--margin", f"{plan['margin']:g}"]
                command += ["--confidence", f"{plan['confidence']:g}"]
            elif plan.get("kind") == "exhaustive":
                command += ["--exhaustive"]
            elif plan.get("kind") == "random":
                command += ["--trials", str(plan["trials"])]
            else:
                continue  # a list of sites lies outside of the run
            command += ["--seed", str(header.seed), "--out", f"{out}/{campaign.name}"]
            commands.append(command)
    return [shlex.join(["resq-deploy", *command]) for command in commands]


def run_page(run: Run, made: dict[str, Any]) -> str:
    """The page of a run directory; `made` is its table (table.build)."""
    ber = {LABELS[name]: stage.ber for name, stage in run.stages.items() if stage.ber}
    singles = {LABELS[name]: stage.single for name, stage in run.stages.items() if stage.single}
    ends = {k: c for k, c in singles.items() if k in (LABELS[BASELINE], LABELS[HARDENED])}
    orders = {LABELS[name]: i for i, name in enumerate(STAGES)}
    ranking_figure, ranking_grid = _ranking(run)
    decisions, decision_lines = _decisions(run)
    campaigns = [c for s in run.stages.values() for c in (s.ber, s.single) if c]
    return _render(
        "run.html.j2",
        title=f"{run.name}: hardened against bit flips and attacks",
        table=made,
        titles=table.TITLES,
        labels=LABELS,
        rows=[
            {
                "label": row["label"],
                "cells": [_parts(row["stages"][name], table.percent) for name in STAGES],
                "gain": _parts(row["gain"], table.points),
                "n": table.row_size(row),
            }
            for row in made["rows"]
        ],
        notes=table.notes(made),
        tail={
            "columns": [*table.HEAD, "n"],
            "rows": table.tail_grid(made),
            "left": 1,
        },
        ber=_ber_figure(ber, run.confidence, "ber", orders),
        epsilon=_epsilon_figure(run),
        twins=_twin_grid(run),
        maps=_map_figure(ends, "map"),
        outcomes=_outcome_grid(singles, run.confidence),
        layers=_by(singles, "layer", run.confidence),
        bits=_by(singles, "bit", run.confidence),
        ranking=ranking_figure,
        ranking_grid=ranking_grid,
        codes=_codes_figure(run),
        losses=_loss_figure(run),
        decisions=decisions,
        decision_lines=decision_lines,
        parity=grid(
            [
                {"stage": LABELS[name], **row}
                for name, m in _manifests(run).items()
                for row in _objects(m.get("parity"))
            ],
            left=3,
        ),
        files=_files_grid(run),
        kernels=_kernels_grid(run),
        campaigns=_campaign_grid(campaigns),
        recipe=grid(_flat(run.recipe), left=2),
        versions=_version_grid(run),
        cpu=table.cpu_line(made["cpu"]),
        commands=_commands(run),
    )


def _parts(cell: dict[str, Any] | None, words: Any) -> dict[str, str]:
    """Value and interval of a cell, apart, so that the page can set the interval smaller."""
    value, _, interval = words(cell).partition(" ")
    return {"value": value, "interval": interval}


# Stores --------------------------------------------------------------------------------------


def stores_page(campaigns: Sequence[Campaign], attacked: Sequence[Result] = ()) -> str:
    """The page of campaign stores and of results of attacks."""
    together = {c.name: c for c in campaigns}
    orders = {name: i for i, name in enumerate(together)}
    swept = {name: c for name, c in together.items() if c.by_rate}
    sections = []
    for i, campaign in enumerate(campaigns):
        one = {campaign.name: campaign}
        golden = counts.accuracy(campaign.header.golden, CONFIDENCE)
        sections.append(
            {
                "name": campaign.name,
                "golden": f"{table.percent(golden)} % ({table.size_label(golden)})",
                "outcomes": _outcome_grid(one, CONFIDENCE),
                "rates": _rate_grid(campaign, CONFIDENCE),
                "maps": _map_figure(one, f"map{i}"),
                "layers": _by(one, "layer", CONFIDENCE),
                "bits": _by(one, "bit", CONFIDENCE),
                "cpu": table.cpu_line(campaign.header.cpu),
                "versions": cell_text(dict(sorted(campaign.header.versions.items()))),
                "warnings": campaign.header.warnings,
            }
        )
    return _render(
        "stores.html.j2",
        title=", ".join([*together, *(result.name for result in attacked)]),
        ber=_ber_figure(swept, CONFIDENCE, "ber", orders),
        sections=sections,
        attacked=[
            {
                "name": result.name,
                "lines": result.lines,
                "tables": {title: grid(rows) for title, rows in result.tables.items() if rows},
            }
            for result in attacked
        ],
        campaigns=_campaign_grid(campaigns),
        confidence=CONFIDENCE,
    )


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values) + "\n"
