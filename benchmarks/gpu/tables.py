"""The tables of a record for docs/performance.md, and the report of failures, cells that were left out, and times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu import record

_WAYS = ("ours", "ours, addresses known", "stack, cat, transpose", "_foreach_copy_", "copy_ loop")
_WAYS += ("ours, tables too", "torch, by fp32")  # of quantized cases
_MOST_PROBLEMS = 50
_MOST_CHARACTERS = 600
_TO_DEVICE = "to the device, at once"

Row = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of all stages in the result.

    A row that is wrong has no figure in them.
    """
    rows = result["rows"]
    parts = [_machine(result), _tests(rows.get("tests", []))]
    parts += [
        show(rows[stage])
        for stage, show in (("kernels", _kernels), ("sweep", _sweep), ("transfers", _transfers))
        if rows.get(stage)
    ]
    if rows.get("loads"):
        parts.append(_loads(rows))
    if rows.get("round trip"):
        parts.append(_round_trip(rows["round trip"]))
    return "\n\n".join(filter(None, parts)) + "\n"


def ending(result: Mapping[str, Any]) -> str:
    """Return the end of the output: all failures, all cells left out for lack of time, and the time of each stage."""
    wrong, left = record.problems(result), list(record.left_out(result))
    lines = [f"Wrong: {len(wrong) or 'nothing'}"]
    lines += [f"- {_cut(text)}" for text in wrong[:_MOST_PROBLEMS]]
    if len(wrong) > _MOST_PROBLEMS:
        lines.append(f"- and {len(wrong) - _MOST_PROBLEMS} more in {record.NAME}")
    lines.append(f"Left out for want of time: {len(left) or 'nothing'}")
    lines += [f"- {text}" for text in left[:_MOST_PROBLEMS]]
    if len(left) > _MOST_PROBLEMS:
        lines.append(f"- and {len(left) - _MOST_PROBLEMS} more in {record.NAME}")
    taken = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["stages_s"].items())
    return "\n".join([*lines, f"Took: {taken}"]) + "\n"


def row_line(stage: str, row: Row) -> str:
    """Return a row as one line, for the progress output."""
    parts = [f"    {row['cell']}"]
    if "ms" in row:
        parts.append(
            ", ".join(f"{way} {ms:.3f}" if ms else f"{way} no memory" for way, ms in row["ms"].items()) + " ms"
        )
    for key in ("seconds", "gb_per_s", "first_s", "skipped"):
        if key in row:
            value = row[key]
            parts.append(f"{key} {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
    wrong = record.problems({"errors": {}, "rows": {stage: [row]}})
    return ": ".join(parts) + "".join(f"\n    WRONG: {_cut(text)}" for text in wrong)


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= _MOST_CHARACTERS
        else f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
    )


def _machine(result: Mapping[str, Any]) -> str:
    rows = {row["cell"]: row.get("found") for row in result["rows"].get("environment", [])}
    device, context = rows.get("device"), rows.get("environment")
    if not device or not context:
        return "no environment"
    commits = [run["commit"] for run in result["runs"] if run.get("commit")]
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
    commit = commits[-1] if commits else context["commit"]
    return f"{device['name']}{memory}; {versions}; {context['cores']} cores; {context['date'][:10]}, {commit}"


def _tests(rows: Iterable[Row]) -> str:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for row in rows:
        counts["failed" if row.get("error") else "skipped" if "skipped" in row else "passed"] += 1
    parts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"Tests: {parts}." if parts else ""


def _kernels(rows: Iterable[Row]) -> str:
    lines = [
        ["layer", "operation", "`copy_`, GB/s", "ours, ms", "ours, GB/s", *(f"{way}, of `copy_`" for way in _WAYS)]
    ]
    for row in rows:
        if "ms" not in row:
            continue
        ms, nbytes = row["ms"], row["bytes_moved"]
        lines.append(
            [
                f"{row['layer']} (E {row['experts']}, I {row['intermediate']}, H {row['hidden']})",
                row["operation"],
                _rate(nbytes, ms.get("copy_")),
                f"{ms['ours']:.3f}" if ms.get("ours") else _why_none(row, "ours"),
                _rate(nbytes, ms.get("ours")),
                *(_ratio(ms.get("copy_"), ms.get(way)) or _why_none(row, way) for way in _WAYS),
            ]
        )
    return _table(lines, texts=2)


def _why_none(row: Row, way: str) -> str:
    for kind in ("wrong", "failed"):
        if way in row.get(kind, {}):
            return kind
    return "out of memory" if way in row["ms"] and row["ms"][way] is None else ""


def _sweep(rows: Iterable[Row]) -> str:
    """Return the table of the sweep, the fastest of each operation first."""
    sound = [row for row in rows if "ms" in row]
    places = list(dict.fromkeys((row["layer"], row["operation"]) for row in sound))
    sound.sort(key=lambda row: (places.index((row["layer"], row["operation"])), row["ms"].get("ours") or float("inf")))
    lines = [["layer", "operation", "candidate", "ours, GB/s", "of `copy_`"]]
    for row in sound:
        ms = row["ms"]
        rate = _rate(row["bytes_moved"], ms.get("ours")) or _why_none(row, "ours")
        place = [row["layer"], row["operation"], row["candidate"]]
        lines.append([*place, rate, _ratio(ms.get("copy_"), ms.get("ours"))])
    return _table(lines, texts=3)


def _transfers(rows: Iterable[Row]) -> str:
    lines = [["", "GB/s", "first, ms", "again, ms"]]
    for row in rows:
        if "gb_per_s" in row:
            lines.append([row["cell"], f"{row['gb_per_s']:.1f}", "", ""])
        elif "first_s" in row:
            lines.append([row["cell"], "", f"{1e3 * row['first_s']:.2f}", f"{1e3 * row['again_s']:.2f}"])
    return _table(lines, texts=1)


def _loads(rows: Mapping[str, list[Row]]) -> str:
    written = {row["cell"]: row for row in rows.get("checkpoints", []) if "file_bytes" in row}
    bus = {row["cell"]: row.get("gb_per_s") for row in rows.get("transfers", [])}.get(_TO_DEVICE)
    sizes = "; ".join(f"{name}: {row['shape']}, {row['file_bytes'] / 1e9:.2f} GB" for name, row in written.items())
    head = [
        "",
        "checkpoint",
        "seconds",
        "again",
        "GB/s",
        "pinning, s",
        "peak on the device",
        "bus alone, of the reading",
    ]
    lines = [head]
    sound = [row for row in rows["loads"] if not record.is_wrong(row) and row["checkpoint"] in written]
    for row in sound:
        nbytes = written[row["checkpoint"]]["file_bytes"]
        peak, pinned = row["peak_device_bytes"], row["pinned_s"]
        again = min(row["again_s"], default=None)
        lines.append(
            [
                row["cell"],
                row["checkpoint"],
                f"{row['seconds']:.2f}",
                f"{again:.2f}" if again else "",
                f"{nbytes / row['seconds'] / 1e9:.1f}",
                f"{pinned:.3f}" if pinned else "",
                f"{peak / row['nbytes']:.2f}x" if peak else "",
                f"{nbytes / 1e9 / bus / row['detail']['read']:.2f}" if bus and "read" in row["detail"] else "",
            ]
        )
    return f"Warm page cache. {sizes}\n\n{_table(lines, texts=2)}" + _slope(sound, written)


def _slope(rows: Iterable[Row], written: Mapping[str, Row]) -> str:
    """Return the time per further byte, without a load's fixed cost, from a short and a long checkpoint."""
    by_name = {row["cell"]: row for row in rows}
    lines = []
    for name in ("ours", "ours, nemo"):
        short, long = by_name.get(name), by_name.get(f"{name}, long")
        if not short or not long:
            continue
        seconds = [statistics.median([row["seconds"], *row["again_s"]]) for row in (short, long)]
        nbytes = [written[row["checkpoint"]]["file_bytes"] for row in (short, long)]
        if seconds[1] > seconds[0]:
            slope = (nbytes[1] - nbytes[0]) / (seconds[1] - seconds[0]) / 1e9
            fixed = seconds[0] - nbytes[0] / slope / 1e9
            lines.append(
                f"{name}: {slope:.1f} GB/s from {nbytes[0] / 1e9:.2f} to {nbytes[1] / 1e9:.2f} GB, and {fixed:.3f} s"
            )
    return "".join(f"\n\nSlope of {line}." for line in lines)


def _round_trip(rows: Iterable[Row]) -> str:
    return "\n".join(
        f"{row['cell']}: {row['seconds']:.2f} s"
        + (f", {row['nbytes'] / row['seconds'] / 1e9:.1f} GB/s" if "nbytes" in row else "")
        + (f"; its threads waited {row['sync_s']:.2f} s for the disk" if "sync_s" in row else "")
        for row in rows
        if "seconds" in row
    )


def _rate(nbytes: int, ms: float | None) -> str:
    return f"{nbytes / ms / 1e6:.0f}" if ms else ""


def _ratio(roof: float | None, ms: float | None) -> str:
    return f"{roof / ms:.2f}" if roof and ms else ""


def _table(lines: list[list[str]], texts: int) -> str:
    head, *body = lines
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
