"""The tables of the README from a result file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu.loading import median_load_seconds

_WAYS = ("ours", "ours, addresses known", "stack, cat, transpose", "_foreach_copy_", "copy_ loop")
_WAYS += ("ours, tables too", "torch, by fp32")  # of what is dequantized


def markdown(result: Mapping[str, Any]) -> str:
    """All tables; of a stage that is not in the result, none."""
    parts = [_machine(result)]
    if result.get("kernels"):
        parts.append(_kernels(result["kernels"]))
    if result.get("sweep"):
        parts.append(_sweep(result["sweep"]))
    if result.get("transfers"):
        parts.append(_transfers(result["transfers"]))
    if result.get("loads"):
        parts.append(_loads(result["loads"], result.get("transfers", {})))
    return "\n\n".join(parts) + "\n"


def _machine(result: Mapping[str, Any]) -> str:
    device, found = result["device"], result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
    return f"{device['name']}{memory}; {versions}; {found['cores']} cores; {found['date'][:10]}, {found['commit']}"


def _kernels(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        ["layer", "operation", "`copy_`, GB/s", "ours, ms", "ours, GB/s", *(f"{way}, of `copy_`" for way in _WAYS)]
    ]
    for row in rows:
        ms, nbytes = row["ms"], row["bytes_moved"]
        lines.append(
            [
                f"{row['layer']} (E {row['experts']}, I {row['intermediate']}, H {row['hidden']})",
                row["operation"],
                _rate(nbytes, ms["copy_"]),
                f"{ms['ours']:.3f}" if ms["ours"] else "out of memory",
                _rate(nbytes, ms["ours"]),
                *(f"{ms['copy_'] / ms[way]:.2f}" if ms.get(way) else "" for way in _WAYS),
            ]
        )
    return _table(lines, texts=2)


def _sweep(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [["layer", "operation", "tile", "ours, GB/s", "of `copy_`"]]
    for row in rows:
        ms = row["ms"]
        tile = "x".join(map(str, row["tile"]))
        lines.append(
            [
                row["layer"],
                row["operation"],
                tile,
                _rate(row["bytes_moved"], ms["ours"]),
                f"{ms['copy_'] / ms['ours']:.2f}",
            ]
        )
    return _table(lines, texts=3)


def _transfers(found: Mapping[str, Any]) -> str:
    return (
        f"Pinned memory to the device {found['host_to_device_gb_per_s']:.1f} GB/s; `preadv` into pinned memory "
        f"{found['preadv_gb_per_s']:.1f} GB/s with {found['threads']} threads; first call of a kernel "
        f"{found['compilation']['first_call_s']:.2f} s (an empty cache), the second "
        f"{1e3 * found['compilation']['second_call_s']:.2f} ms."
    )


def _loads(loads: Mapping[str, Any], transfers: Mapping[str, Any]) -> str:
    head = f"{loads['shape']}, {loads['file_bytes'] / 1e9:.2f} GB, warm page cache:"
    lines = [["", "seconds", "GB/s", "peak on the device", "host to device alone, of the reading"]]
    for method, runs in loads["runs"].items():
        taken = median_load_seconds(runs)
        peak = [run["peak_device_bytes"] for run in runs if run["peak_device_bytes"]]
        lines.append(
            [
                method,
                f"{taken:.2f}",
                f"{loads['file_bytes'] / taken / 1e9:.1f}",
                f"{max(peak) / runs[0]['nbytes']:.2f}x" if peak else "",
                _overlap(loads["file_bytes"], runs, transfers),
            ]
        )
    return head + "\n\n" + _table(lines, texts=1)


def _overlap(file_bytes: int, runs: Iterable[Mapping[str, Any]], transfers: Mapping[str, Any]) -> str:
    """Seconds that the bytes take over the bus alone, by those of the load's reading: 1 if all else is hidden."""
    read = sorted(run["detail"]["read"] for run in runs if isinstance(run["detail"], dict))
    if not read or not transfers:
        return ""
    return f"{file_bytes / 1e9 / transfers['host_to_device_gb_per_s'] / read[len(read) // 2]:.2f}"


def _rate(nbytes: int, ms: float | None) -> str:
    return f"{nbytes / ms / 1e6:.0f}" if ms else ""


def _table(lines: list[list[str]], texts: int) -> str:
    head, *body = lines
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
