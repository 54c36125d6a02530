"""Plots, light and dark: sweeps, and loads in both states of free memory; medians, 20th to 80th percentiles.

Their backgrounds are transparent.
"""

from __future__ import annotations

import bisect
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import measure, memory
from benchmarks.peers.machines import QUIET
from benchmarks.peers.methods import METHODS
from benchmarks.peers.roofs import LOADS

matplotlib.use("svg")
from matplotlib import pyplot, ticker

matplotlib.rcParams["svg.hashsalt"] = "automodel_conv"  # the same data draw the same bytes

THEMES = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6edf3", "#4a525c")}
"""Ink and lines, readable on the pages of GitHub and of the documentation."""

# Okabe and Ito's colors, which color-blind readers can distinguish; ours is the most prominent.
_STYLES = {
    "transformers": ("#e69f00", "o"),
    "safetensors-copy": ("#56b4e9", "s"),
    "dcp": ("#cc79a7", "^"),
    "ours": ("#009e73", "D"),
}
_OTHER = ("#999999", "v")
_TICKS = [digit * 10.0**exponent for exponent in range(-6, 6) for digit in (1, 2, 5)]
"""Candidate ticks of an axis of seconds."""


def draw(path: Path, title: str, folder: Path) -> list[Path]:
    """Write two SVG files, light and dark, for a CSV file of ``sweep``."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["seconds"]]
    drawn = []
    for theme, (ink, grid) in THEMES.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        for method in dict.fromkeys(line["method"] for line in lines):
            of_method = [line for line in lines if line["method"] == method]
            xs = sorted({int(line["x"]) for line in of_method})
            spreads = [measure.spread([float(r["seconds"]) for r in of_method if int(r["x"]) == x]) for x in xs]
            colour, marker = _STYLES.get(method, _OTHER)
            label = f"{METHODS[method].title} ({of_method[0]['version']})"
            axes.plot(xs, [s.median for s in spreads], color=colour, marker=marker, markersize=5, label=label)
            axes.fill_between(
                xs, [s.p20 for s in spreads], [s.p80 for s in spreads], color=colour, alpha=0.25, linewidth=0
            )
        every = sorted({int(line["x"]) for line in lines})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(every, [_short(x) for x in every])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_ylim(*_ticked(axes.yaxis, *axes.dataLim.intervaly))
        axes.set_xlabel(title, color=ink)
        axes.set_ylabel("seconds", color=ink)
        _coloured(axes, ink, grid)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=ink, fontsize=8)
        drawn.append(_saved(figure, folder / f"{path.stem}-{theme}.svg"))
    return drawn


def draw_memory(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write two SVG files with a panel per state of free memory and a line per method, from a warm page cache.

    Args:
        results: results of ``python -m benchmarks.peers``. Rows of other machines, of layouts other than the first, and
            of killed runs are left out.

    Raises:
        ValueError: no row is left.
    """
    rows = [
        row
        for result in results
        for row in result["rows"]
        if (row["machine"], row["cache"]) == (QUIET, "warm") and all("seconds" in run for run in row["runs"])
    ]
    layout = next((row["layout"] for row in rows if row["layout"]), None)
    if layout is None:
        raise ValueError("there are no loads on a quiet machine from a warm page cache to draw")
    spreads = {
        (row["memory"], row["method"]): measure.spread([run["seconds"] for run in row["runs"]])
        for row in rows
        if row["layout"] == layout or row["method"] in LOADS
    }
    titles = {row["method"]: row["title"] for row in rows if (row["memory"], row["method"]) in spreads}
    lines = [method for method in METHODS if method in titles]
    panels = [state for state in memory.MEMORY if any(of == state for of, _ in spreads)]
    drawn = []
    for theme, (ink, grid) in THEMES.items():
        figure, axes_grid = pyplot.subplots(
            *(1, len(panels)),
            figsize=(9.6, 0.9 + 0.3 * len(lines)),
            layout="constrained",
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for state, axes in zip(panels, axes_grid[0], strict=True):
            for place, method in enumerate(reversed(lines)):
                if spread := spreads.get((state, method)):
                    colour, marker = _STYLES.get(method, _OTHER)
                    axes.hlines(place, spread.p20, spread.p80, color=colour, linewidth=4, alpha=0.4)
                    axes.plot([spread.median], [place], color=colour, marker=marker, markersize=6)
            for method, style in zip(LOADS, ("--", ":"), strict=True):
                if roof := spreads.get((state, method)):
                    label = titles[method] if state == panels[-1] else None
                    axes.axvline(roof.median, color=ink, linestyle=style, linewidth=1, label=label)
            axes.set_title(memory.MEMORY[state], color=ink, fontsize=10)
            axes.set_xscale("log")
            axes.set_yticks(range(len(lines)), [titles[method] for method in reversed(lines)], fontsize=8)
            axes.set_xlabel(f"seconds, to {layout}", color=ink, fontsize=8)
            _coloured(axes, ink, grid)
        low, high = min(spread.p20 for spread in spreads.values()), max(spread.p80 for spread in spreads.values())
        for axes in axes_grid[0]:
            axes.set_xlim(*_ticked(axes.xaxis, low, high))
        figure.legend(loc="outside upper right", ncols=2, frameon=False, labelcolor=ink, fontsize=8)
        drawn.append(_saved(figure, folder / f"memory-{theme}.svg"))
    return drawn


def _ticked(axis: Any, low: float, high: float) -> tuple[float, float]:
    """Give a logarithmic axis of seconds ticks at 1, 2 and 5.

    Return the ticks around the data.
    """
    first, last = bisect.bisect_right(_TICKS, low) - 1, bisect.bisect_left(_TICKS, high)
    axis.set_ticks(_TICKS[first : last + 1])
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    return _TICKS[first], _TICKS[last]


def _coloured(axes: Any, ink: str, grid: str) -> None:
    axes.tick_params(colors=ink, which="both")
    axes.grid(color=grid, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(grid)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _short(count: int) -> str:
    """Return a count, or bytes, in a few characters."""
    for unit, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if count >= size and not count % size:
            return f"{count // size}{unit}"
    return f"{count:,}"
