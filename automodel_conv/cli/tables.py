"""The tables that commands print as their reports.

Importing this module does not import torch, which the demo would wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from automodel_conv.cli.demo import RUNS
from automodel_conv.errors import rate_text

if TYPE_CHECKING:
    from automodel_conv.cli.bench import Bench
    from automodel_conv.cli.demo import DemoResult
    from automodel_conv.cli.forecast import Forecast
    from automodel_conv.cli.refit_plan import Divided
    from automodel_conv.cli.remote_bench import RemoteBench
    from automodel_conv.execution.report import LoadReport
    from automodel_conv.execution.report_text import Row
    from automodel_conv.lora.inspecting import AdapterSummary
    from automodel_conv.publishing.convert_report import ConvertReport

# A smaller share of bytes in the page cache counts as none. A share above 1 minus this counts as all.
_NEGLIGIBLE_SHARE = 0.1


def two_columns(caption: str | None = None) -> Table:
    """Return an empty table of labels and values, without a header."""
    table = Table(show_header=False, caption=caption)
    table.add_column()
    table.add_column(justify="right")
    return table


def converted_table(report: ConvertReport, verified: bool) -> Table:
    """Return the table of a conversion."""
    from automodel_conv.publishing.convert_report import converted_rows

    table = two_columns("the output was read back and compared" if verified else None)
    _add_rows(table, converted_rows(report))
    return table


def _add_rows(table: Table, rows: Iterable[Row]) -> None:
    for row in rows:
        table.add_row(row.label, row.value)


def adapter_table(summary: AdapterSummary) -> Table:
    """Return the table of what an adapter changes in its base."""
    caption = f"{summary.modules} modules, form {summary.form}; * is the number of a layer or an expert"
    table = Table(caption=caption)
    table.add_column("weights", overflow="fold")
    for title in ("layers", "experts", "rank", "scale", "effect"):
        table.add_column(title, justify="right")
    for row in summary.rows:
        table.add_row(
            escape(row.name.removesuffix(".weight")),
            _ranges(row.layers, row.base_layers),
            _ranges(row.experts, row.base_experts),
            "-" if row.rank is None else str(row.rank),
            "replaces" if row.scale is None else f"{row.scale:g}",
            row.problem or "yes",
        )
    return table


def _ranges(numbers: Sequence[int], of: int) -> str:
    """Return numbers as ranges, such as "0-3, 7 of 48", or "all 48"; a dash if there are none."""
    if not numbers:
        return "-"
    if len(numbers) == of > 1:
        return f"all {of}"
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number for number in numbers if number + 1 not in numbers]
    ranges = [str(start) if start == stop else f"{start}-{stop}" for start, stop in zip(starts, stops, strict=True)]
    return ", ".join(ranges) + (f" of {of}" if of else "")


def mesh_table(costs: Forecast) -> Table:
    """Return the table of what the ranks of a mesh would hold and read."""
    from automodel_conv.schedule.jobs import GAP_BYTES

    ranks = costs.ranks
    sampled = "" if len(ranks) == costs.world_size else f", {len(ranks)} of them sampled"
    owned = [rank.owned_bytes for rank in ranks]
    caption = (
        f"a summary over {costs.world_size} ranks{sampled}; imbalance: the largest share is "
        f"{max(owned) * len(owned) / max(sum(owned), 1):.3f} of the mean; a rank also reads gaps of at most "
        f"{GAP_BYTES >> 10} KiB between the bytes that it needs"
    )
    table = Table("a rank", "least", "median", "most", caption=caption)
    rows: dict[str, tuple[list[float], Callable[[float], str]]] = {
        "holds": ([float(nbytes) for nbytes in owned], _size),
        "reads": ([float(rank.read_bytes) for rank in ranks], _size),
        "bytes read per byte held": ([rank.read_bytes / max(rank.owned_bytes, 1) for rank in ranks], "{:.3f}".format),
        "read calls": ([float(rank.calls) for rank in ranks], "{:.0f}".format),
        "files": ([float(rank.files) for rank in ranks], "{:.0f}".format),
        "calls per file": ([rank.calls / max(rank.files, 1) for rank in ranks], "{:.1f}".format),
    }
    for name, (values, text) in rows.items():
        table.add_row(name, *map(text, (min(values), median(values), max(values))))
    return table


def _size(nbytes: float) -> str:
    return decimal(round(nbytes))


def divisions_table(parts: Iterable[Divided]) -> Table:
    """Return the table of how an engine divides its tensors."""
    table = Table("an engine holds", caption="modules by the last part of their names; as vLLM divides them")
    table.add_column("of the modules", overflow="fold")
    for title in ("size", "most a rank holds"):
        table.add_column(title, justify="right")
    for part in parts:
        modules = escape(", ".join(part.modules))
        table.add_row(part.division.value, modules, decimal(part.nbytes), decimal(part.most_bytes))
    return table


def report_table(report: LoadReport, tensors: int) -> Table:
    """Return the table of a load."""
    from automodel_conv.execution.report import load_rows

    table = two_columns("plan includes importing transformers, if needed")
    table.add_row("tensors", str(tensors))
    _add_rows(table, load_rows(report))
    return table


def demo_table(result: DemoResult) -> Table:
    """Return the table of the demo, a row for each method."""
    table = Table(
        "loaded with",
        caption=f"seconds: median of {RUNS} loads; memory: peak above the level before a load; "
        "resident memory includes pages of mapped files",
    )
    for title in ("seconds", "speed", "allocated", "resident", "equal bytes"):
        table.add_column(title, justify="right")
    for method, load in result.loads.items():
        table.add_row(
            f"{method} {result.versions[method]}",
            f"{load.seconds:.2f}",
            rate_text(result.file_bytes / 1e9 / load.seconds),
            _memory_text(load.anonymous_bytes),
            _memory_text(load.resident_bytes),
            "" if method == "transformers" else "no" if result.different else "all",
        )
    return table


def _memory_text(nbytes: int | None) -> str:
    return "-" if nbytes is None else decimal(nbytes)


def bench_tables(result: Bench) -> list[Table]:
    """Return the tables of a measurement: its counts, and its speeds by number of threads."""
    from automodel_conv.cli.bench import RUNS as BENCH_RUNS

    counts = two_columns()
    counts.add_row("files, tensors", f"{result.files}, {result.tensors}")
    counts.add_row("bytes that a load reads", decimal(result.nbytes))
    counts.add_row("bytes timed", f"{decimal(result.sample_nbytes)}, {result.sample_targets} targets")
    counts.add_row("transposed, interleaved, cast or decoded", f"{result.scratch_nbytes / result.sample_nbytes:.0%}")
    counts.add_row("seconds to open, to plan", f"{result.open_seconds:.3f}, {result.plan_seconds:.3f}")
    counts.add_row("in the page cache before the first read", _cached_text(result))
    first = rate_text(result.sample_nbytes / 1e9 / result.first_seconds)
    counts.add_row("first read", f"{first}{_origin_text(result.cached)}")
    touched = (
        f"{rate_text(result.touch_gb_per_s)} in huge pages, {rate_text(result.touch_small_gb_per_s)} in small ones"
    )
    counts.add_row("first write to new memory, one thread", touched)
    counts.add_row("setting for huge pages", result.huge_pages or "unknown")
    counts.add_row("pages chosen by loads", str(result.pages))
    size = "huge" if result.roof_has_huge_pages else "small"
    roof_note = f"roof: the bytes are only read into new memory, with pages of the faster size (mostly {size})"
    caption = f"after the first read, so from the page cache; medians of {BENCH_RUNS}; {roof_note}"
    speeds = Table("threads", caption=caption)
    for title in ("roof", "load", "load, seconds", "of the roof"):
        speeds.add_column(title, justify="right")
    for threads, seconds in result.load_seconds.items():
        roof = result.roof_seconds[threads]
        speeds.add_row(
            f"{threads} (default)" if threads == result.default_threads else str(threads),
            rate_text(result.sample_nbytes / 1e9 / roof),
            rate_text(result.sample_nbytes / 1e9 / seconds),
            f"{seconds:.3f}",
            f"{roof / seconds:.2f}",
        )
    return [counts, speeds]


def remote_bench_tables(result: RemoteBench) -> list[Table]:
    """Return the tables of a measurement of files that are not on this machine: counts, and speeds by connections."""
    counts = two_columns()
    counts.add_row("files, tensors", f"{result.files}, {result.tensors}")
    counts.add_row("bytes that a load reads", decimal(result.nbytes))
    counts.add_row("bytes timed in a load", decimal(result.load_bytes))
    counts.add_row("seconds to open, to plan", f"{result.open_seconds:.3f}, {result.plan_seconds:.3f}")
    counts.add_row("wait for an answer", f"{1000 * result.wait_seconds:.1f} ms")
    counts.add_row("requests repeated", str(result.retries))
    speeds = Table("connections", caption="bare: ranges are read and thrown away; a load places their bytes")
    for title in ("bare", "load"):
        speeds.add_column(title, justify="right")
    for connections, rate in result.gb_per_s.items():
        load = rate_text(result.load_gb_per_s) if connections == result.connections else ""
        speeds.add_row(str(connections), rate_text(rate), load)
    return [counts, speeds]


def _cached_text(result: Bench) -> str:
    if result.cached is None:
        return "unknown: this system does not report it"
    if not result.dropped:
        return f"{result.cached:.0%}"
    outcome = "dropped" if result.cached < _NEGLIGIBLE_SHARE else "though the system was asked to drop it"
    return f"{result.cached:.0%}, {outcome}"


def _origin_text(cached: float | None) -> str:
    """Return where bytes were read from, given the share of them in the page cache."""
    if cached is None:
        return ""
    if cached < _NEGLIGIBLE_SHARE:
        return " from the disk"
    return " from the page cache" if cached > 1 - _NEGLIGIBLE_SHARE else " from both"
