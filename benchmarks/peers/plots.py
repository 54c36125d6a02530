"""Sweeps as plots, on light and on dark: medians as lines, the 20th to 80th percentiles as bands."""

from __future__ import annotations

import bisect
import csv
from pathlib import Path

import matplotlib

from benchmarks import measure
from benchmarks.peers.methods import METHODS

matplotlib.use("svg")
from matplotlib import pyplot, ticker

THEMES = {"light": ("#ffffff", "#24292f", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#30363d")}
"""Background, ink and lines: those of pages that GitHub shows."""

# Okabe and Ito's colours, which all can tell apart; ours is the one that stands out.
_STYLES = {
    "transformers": ("#e69f00", "o"),
    "safetensors-copy": ("#56b4e9", "s"),
    "dcp": ("#cc79a7", "^"),
    "ours": ("#009e73", "D"),
}
_OTHER = ("#999999", "v")
_TICKS = [digit * 10.0**exponent for exponent in range(-6, 6) for digit in (1, 2, 5)]
"""Of seconds."""


def draw(path: Path, title: str, folder: Path) -> list[Path]:
    """Two SVG files beside each other for a CSV file of ``sweep``."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["seconds"]]
    drawn = []
    for theme, (back, ink, grid) in THEMES.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 4.0), facecolor=back, layout="constrained")
        axes.set_facecolor(back)
        for method in dict.fromkeys(line["method"] for line in lines):
            of_method = [line for line in lines if line["method"] == method]
            xs = sorted({int(line["x"]) for line in of_method})
            found = [measure.spread([float(r["seconds"]) for r in of_method if int(r["x"]) == x]) for x in xs]
            colour, marker = _STYLES.get(method, _OTHER)
            label = f"{METHODS[method].title} ({of_method[0]['version']})"
            axes.plot(xs, [s.median for s in found], color=colour, marker=marker, markersize=5, label=label)
            axes.fill_between(xs, [s.p20 for s in found], [s.p80 for s in found], color=colour, alpha=0.25, linewidth=0)
        every = sorted({int(line["x"]) for line in lines})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(every, [_short(x) for x in every])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        low, high = axes.dataLim.intervaly
        first, last = bisect.bisect_right(_TICKS, low) - 1, bisect.bisect_left(_TICKS, high)
        axes.set_ylim(_TICKS[first], _TICKS[last])
        axes.set_yticks(_TICKS[first : last + 1])
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.set_xlabel(title, color=ink)
        axes.set_ylabel("seconds", color=ink)
        axes.tick_params(colors=ink, which="both")
        axes.grid(color=grid, linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_color(grid)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=ink, fontsize=8)
        drawn.append(folder / f"{path.stem}-{theme}.svg")
        figure.savefig(drawn[-1], facecolor=back, metadata={"Date": None})
        pyplot.close(figure)
    return drawn


def _short(count: int) -> str:
    """A count, or bytes, in a few characters."""
    for unit, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if count >= size and not count % size:
            return f"{count // size}{unit}"
    return f"{count:,}"
