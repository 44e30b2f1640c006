"""Figures as SVG text that stands inside an HTML page: the same numbers give the same bytes.

Letters are drawn as outlines (no font is needed), colours are Okabe and Ito's, and every line
has its own marker, so that the figures survive colour blindness and a black-and-white printer.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from resq_deploy.report.table import epsilon_label, rate_label

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "resq-deploy",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "text.parse_math": False,  # a name with a dollar sign is a name
}
COLOURS = ("#333333", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", "-", "--", "-.", ":")
MAP = "YlOrBr"
TOP = 10
"""Layers in the criticality ranking (RESQ, figure 2, shows as many)."""
LONGEST_NAME = 36


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve with its band; y in [0, 1]."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    order: int
    """Place in the cycle of colours and markers."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One layer x bit map: trials with SDC and all trials, both of shape (layers, bits)."""

    title: str
    sdc: NDArray[np.int64]
    total: NDArray[np.int64]


def _draw(width: float, height: float, draw: Callable[[Figure], object], key: str) -> str:
    """An `<svg>` element of `width` x `height` inches; `key` keeps its ids apart from others'."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), key)


def _inline(svg: str, key: str) -> str:
    """Only what HTML needs: no prolog, comments and metadata (with its date); ids of its own.

    It fills the width of the page within limits that keep its letters legible.
    """
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    width = float(box[1].split()[2])
    size = f"min-width: {0.85 * width:.0f}pt; max-width: {1.15 * width:.0f}pt"
    return f'<svg viewBox="{box[1]}" style="{size}" aria-hidden="true">{body.strip()}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_yticks(np.linspace(0, 1, 6), [f"{p}" for p in range(0, 101, 20)])
    axes.set_ylabel(label)
    axes.grid(True)


def _lines(axes: Axes, lines: Sequence[Line]) -> None:
    for line in lines:
        i = line.order % len(COLOURS)
        axes.fill_between(line.x, line.low, line.high, color=COLOURS[i], alpha=0.15, linewidth=0)
        axes.plot(
            line.x,
            line.y,
            DASHES[i],
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=5,
            linewidth=1.6,
            label=line.label,
        )
    axes.legend(loc="lower left", fontsize=9)


def accuracy_over_ber(lines: Sequence[Line], key: str) -> str:
    """Mean accuracy over bit error rate (logarithmic; every tested rate is a tick)."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, lines)
        _percent_axis(axes, "accuracy under faults, %")
        rates = sorted({x for line in lines for x in line.x})
        axes.set_xscale("log")
        axes.set_xticks(rates, [rate_label(rate) for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("bit error rate, probability per stored bit")

    return _draw(7.2, 4.0, draw, key)


def accuracy_over_epsilon(lines: Sequence[Line], key: str) -> str:
    """Accuracy of the exported file over the radius of the attack."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, lines)
        _percent_axis(axes, "accuracy under attack, %")
        radii = sorted({x for line in lines for x in line.x})
        axes.set_xticks(radii, [epsilon_label(e).removesuffix("/255") for e in radii])
        axes.set_xlabel("epsilon, L-infinity radius in 1/255 of the pixel range")

    return _draw(7.2, 4.0, draw, key)


def sdc_maps(panels: Sequence[Panel], layers: Sequence[str], key: str) -> str:
    """Layer x bit maps side by side on one colour scale; each cell says rate and n."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        colours = matplotlib.colormaps[MAP].with_extremes(bad="#f2f2f2")
        for axes, panel in zip(grid, panels, strict=True):
            tested = panel.total > 0
            rate = np.where(tested, panel.sdc / np.maximum(panel.total, 1), np.nan)
            # Bit 7, the sign, stands on the left, as numbers are written.
            image = axes.pcolormesh(
                rate[:, ::-1], cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1
            )
            n_bits = rate.shape[1]
            for row, bit in np.argwhere(tested):
                value, n = rate[row, bit], panel.total[row, bit]
                axes.text(
                    n_bits - bit - 0.5,
                    row + 0.5,
                    f"{100 * value:.0f}\nn={n}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if value > 0.6 else "#222222",
                )
            axes.set_xticks(np.arange(n_bits) + 0.5, [str(b) for b in reversed(range(n_bits))])
            axes.set_yticks(np.arange(len(layers)) + 0.5, [_short(name) for name in layers])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(panel.title)
            axes.set_xlabel(f"bit ({n_bits - 1} = most significant)")
        grid[0].invert_yaxis()
        bar = figure.colorbar(image, ax=list(grid), shrink=0.9, aspect=30, pad=0.02)
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
        bar.set_label("flips with silent data corruption, %")
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set(rasterized=False, edgecolor="face")

    return _draw(2.6 + 4.0 * len(panels), 1.2 + 0.36 * len(layers), draw, key)


def ranking(layers: Sequence[str], scores: Sequence[float], key: str) -> str:
    """The TOP most critical layers, most critical first."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names, values = [_short(name) for name in layers[:TOP]], list(scores[:TOP])
        places = np.arange(len(values))
        axes.barh(places, values, color=COLOURS[3], height=0.7)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.3g}", (value, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlabel("criticality score (moving average of the gradient norm)")

    return _draw(7.2, 1.0 + 0.3 * min(TOP, len(layers)), draw, key)


def codes(histograms: Sequence[tuple[str, Sequence[int], Sequence[int]]], key: str) -> str:
    """Small multiples of (title, counts of the codes -128 to 127 before, and after)."""

    def draw(figure: Figure) -> None:
        columns = min(3, len(histograms))
        rows = math.ceil(len(histograms) / columns)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        edges = np.arange(-128.5, 128.5)
        for axes, (title, before, after) in zip(grid, histograms, strict=False):
            axes.stairs(before, edges, fill=True, color="#bdbdbd", label="before")
            axes.stairs(after, edges, color=COLOURS[3], linewidth=1.0, label="after")
            axes.set_title(_short(title))
            axes.set_xlim(-129, 128)
            axes.set_xticks([-128, -64, 0, 64, 127])
            axes.tick_params(labelsize=8)
            axes.set_ylim(bottom=0)
        for axes in grid[len(histograms) :]:
            axes.set_visible(False)
        grid[0].legend(fontsize=8, loc="upper right")
        figure.supxlabel("integer code of the weight", fontsize=10)
        figure.supylabel("weights", fontsize=10)

    columns = min(3, len(histograms))
    return _draw(1.2 + 2.8 * columns, 0.5 + 2.0 * math.ceil(len(histograms) / columns), draw, key)


def losses(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], key: str) -> str:
    """Training loss over epochs, (stage, epochs, losses); each stage has its own loss and axis."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (title, epochs, values) in zip(grid, curves, strict=True):
            axes.plot(epochs, values, color=COLOURS[3], linewidth=1.6, marker="o", markersize=2.5)
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelsize=8)
            axes.set_xlabel("epoch")
            axes.grid(True)
        grid[0].set_ylabel("loss")

    return _draw(1.0 + 2.1 * len(curves), 2.4, draw, key)
