"""The measurements as tables: for the terminal, and in Markdown for the pages of docs/."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks import measure, memory
from benchmarks.peers.machines import MACHINES, QUIET
from benchmarks.peers.roofs import LOADS

_TITLES = (
    *("seconds", "s of reading", "GB/s", "times ours", "of the roof", "s of CPU", "allocated", "resident"),
    *("page faults", "bytes read"),
)
_ON_PAGES = ("seconds", "times ours", "of the roof", "allocated", "resident")
"""The columns that pages show. The terminal and the data have all of them."""
Row = Mapping[str, Any]


def _median(row: Row, key: str) -> float:
    return statistics.median(run[key] or 0 for run in row["runs"])


def _place(row: Row) -> tuple[str, ...]:
    """Return the key by which rows are comparable: machine, free memory, page cache."""
    return row["machine"], row["memory"], row["cache"]


def _killed(row: Row) -> bool:
    return any("killed" in run for run in row["runs"])


def groups(result: Mapping[str, Any]) -> Iterator[list[Row]]:
    """Yield the rows of each place and layout, in order.

    On a quiet machine, roofs are a group of their own.
    """
    by_place: dict[tuple[str, ...], list[Row]] = {}
    for row in result["rows"]:
        layout = row["layout"] if row["machine"] == QUIET else ""
        by_place.setdefault((*_place(row), layout), []).append(row)
    yield from by_place.values()


def _cells(row: Row, result: Mapping[str, Any]) -> list[str]:
    if _killed(row):
        return ["killed", *[""] * (len(_TITLES) - 1)]
    nbytes = result["file_bytes"]
    seconds = _median(row, "seconds")
    comparable = [other for other in result["rows"] if _place(other) == _place(row) and not _killed(other)]
    ours = [_median(r, "seconds") for r in comparable if r["method"] == "ours" and r["layout"] == row["layout"]]
    roofs = [_median(r, "seconds") for r in comparable if r["method"] in LOADS]
    read = sum(_median(row, key) for key in ("called_bytes", "mapped_bytes"))
    if row["cache"] == "cold":
        read = _median(row, "disk_bytes")
    reading = [run["read_seconds"] for run in row["runs"] if run.get("read_seconds") is not None]
    return [
        _spread_text([run["seconds"] for run in row["runs"]]),
        _spread_text(reading) if reading else "",
        f"{nbytes / 1e9 / seconds:.2f}",
        f"{seconds / ours[0]:.2f}x" if ours else "",
        f"{min(roofs) / seconds:.2f}" if roofs else "",
        f"{_median(row, 'cpu_seconds'):.2f}",
        f"{_median(row, 'anonymous_bytes') / nbytes:.2f}x",
        f"{_median(row, 'resident_bytes') / nbytes:.2f}x",
        f"{_median(row, 'minor_faults') + _median(row, 'major_faults'):.0f}",
        f"{read / nbytes:.2f}x",
    ]


def _spread_text(seconds: Sequence[float]) -> str:
    """Return the median and the percentiles of several runs, or the seconds of a single one."""
    return measure.spread(seconds).text() if len(seconds) > 1 else f"{seconds[0]:.2f}"


def _heading(rows: Sequence[Row]) -> str:
    row = rows[-1]
    what = f"to `{row['layout']}`" if row["layout"] else "roofs"
    where = f"{what}, {row['cache']} page cache, {memory.MEMORY[row['memory']]}"
    return where if row["machine"] == QUIET else f"{where}, {MACHINES[row['machine']].title}{_free(rows)}"


def _free(rows: Sequence[Row]) -> str:
    """Return a description of the free memory when the runs began."""
    runs = [run for row in rows for run in row["runs"] if run.get("free_bytes")]
    if not runs:
        return ""
    free, huge = (statistics.median(run[key] for run in runs) for key in ("free_bytes", "free_huge_bytes"))
    return f" ({free / 1e9:.1f} GB free, {huge / free:.0%} of it in blocks of 2 MiB or more)"


def _not_made(result: Mapping[str, Any]) -> Iterator[str]:
    for name, why in result["not_made"].items():
        yield f"{MACHINES[name].title}: cannot be set up here ({' '.join(why.split())})"


def terminal(result: Mapping[str, Any]) -> Iterator[Table | str]:
    for rows in groups(result):
        table = Table(title=_heading(rows), title_justify="left")
        table.add_column("method")
        for title in _TITLES:
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(_called(row), *_cells(row, result))
        yield table
    yield from _not_made(result)


def markdown(result: Mapping[str, Any]) -> str:
    """Return a table with a heading for each group of rows, with the columns that pages show."""
    paragraphs = [measure.about(result["environment"])]
    for rows in groups(result):
        lines = [f"| | {' | '.join(_ON_PAGES)} |", "|---" * (len(_ON_PAGES) + 1) + "|"]
        for row in rows:
            by_title = dict(zip(_TITLES, _cells(row, result), strict=True))
            cells = [_called(row), *(by_title[title] for title in _ON_PAGES)]
            if row["method"] == "ours":
                cells = [f"**{cell}**" if cell else cell for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
        heading = _heading(rows)
        paragraphs += [f"**{heading[0].upper()}{heading[1:]}**", "\n".join(lines)]
    paragraphs += [f"*{line}*" for line in _not_made(result)]
    return "\n\n".join(paragraphs) + "\n"


def _called(row: Mapping[str, Any]) -> str:
    return row["title"] if row["version"] is None else f"{row['title']} ({row['version']})"


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that all methods of a layout returned the same tensors, so that their times can be compared.

    Raises:
        RuntimeError: the digests differ.
    """
    by_layout: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["layout"] and not _killed(row):
            name = ", ".join((row["method"], *_place(row)))
            by_layout.setdefault(row["layout"], {})[name] = row["runs"][0]["digest"]
    for digests in by_layout.values():
        measure.check_digests(digests)
