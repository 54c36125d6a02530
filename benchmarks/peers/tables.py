"""What was measured, as tables: for the terminal, and in Markdown for the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks import measure

_TITLES = (
    *("seconds", "GB/s", "ours is", "of the roof", "s of CPU", "allocated", "resident", "page faults", "bytes read"),
)


def _median(row: Mapping[str, Any], key: str) -> float:
    return statistics.median(run[key] or 0 for run in row["runs"])


def groups(result: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """The rows of each state of the page cache and each layout, in their order; roofs have no layout."""
    keys = dict.fromkeys((row["cache"], row["layout"]) for row in result["rows"])
    for cache, layout in keys:
        yield cache, layout, [r for r in result["rows"] if (r["cache"], r["layout"]) == (cache, layout)]


def _cells(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    nbytes = result["file_bytes"]
    seconds = _median(row, "seconds")
    alike = [other for other in result["rows"] if other["cache"] == row["cache"]]
    ours = [r for r in alike if r["method"] == "ours" and r["layout"] == row["layout"]]
    roofs = [r for r in alike if r["method"] == "preadv"]
    read = sum(_median(row, key) for key in ("called_bytes", "mapped_bytes"))
    if row["cache"] == "cold":
        read = _median(row, "disk_bytes")
    return [
        measure.spread([run["seconds"] for run in row["runs"]]).text(),
        f"{nbytes / 1e9 / seconds:.2f}",
        f"{seconds / _median(ours[0], 'seconds'):.2f}x" if ours else "",
        f"{_median(roofs[0], 'seconds') / seconds:.2f}" if roofs else "",
        f"{_median(row, 'cpu_seconds'):.2f}",
        f"{_median(row, 'anonymous_bytes') / nbytes:.2f}x",
        f"{_median(row, 'resident_bytes') / nbytes:.2f}x",
        f"{_median(row, 'minor_faults') + _median(row, 'major_faults'):.0f}",
        f"{read / nbytes:.2f}x",
    ]


def _heading(result: Mapping[str, Any], cache: str, layout: str) -> str:
    what = f"to {layout}" if layout else "roofs"
    return f"{what}, {cache} page cache"


def terminal(result: Mapping[str, Any]) -> Iterator[Table]:
    for cache, layout, rows in groups(result):
        table = Table(title=_heading(result, cache, layout), title_justify="left")
        table.add_column("method")
        for title in _TITLES:
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(_called(row), *_cells(row, result))
        yield table


def markdown(result: Mapping[str, Any]) -> str:
    lines = [f"| | {' | '.join(_TITLES)} |", "|---" * (len(_TITLES) + 1) + "|"]
    for cache, layout, rows in groups(result):
        lines.append(f"| *{_heading(result, cache, layout)}* |" + " |" * len(_TITLES))
        for row in rows:
            cells = [_called(row), *_cells(row, result)]
            if row["method"] == "ours":
                cells = [f"**{cell}**" if cell else cell for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _called(row: Mapping[str, Any]) -> str:
    return row["title"] if row["version"] is None else f"{row['title']} ({row['version']})"


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """No number without the same tensors, by layout.

    Raises:
        RuntimeError: not all digests are equal.
    """
    by_layout: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["layout"]:
            by_layout.setdefault(row["layout"], {})[f"{row['method']}, {row['cache']}"] = row["runs"][0]["digest"]
    for found in by_layout.values():
        measure.check_digests(found)
