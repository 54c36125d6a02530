"""The value of each choice of the loader: the same load with it, without it, or with another number.

    python -m benchmarks.choices [--group NAME ...] [--layers N] [--size full|small] [--repetitions N]
                                 [--directory DIR] [--json FILE]
    python -m benchmarks.choices --from FILE           the table of docs/performance.md from that JSON

Checkpoint, processes, warm-up and timing are those of ``python -m benchmarks.peers`` with memory made ready. In this
state huge pages are the faster ones on most machines; only the loader requests them. A choice is changed by replacing a
function or a number within the process that loads. Only the size of pages is also a setting (``huge_pages=``). A
difference within the spread does not count.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table

from automodel_conv.execution import copying, new_memory, page_calls
from automodel_conv.execution import host as host_loads
from automodel_conv.files import system
from automodel_conv.kernels import transpose_torch
from automodel_conv.schedule import host as host_schedule
from automodel_conv.schedule import jobs
from benchmarks import measure, options
from benchmarks.peers.worker import Job, variables, work
from benchmarks.shapes import SMALL, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

AS_IT_IS = "as it is"
_TITLES = ("seconds", "times as it is", "s of CPU", "page faults", "allocated")


class Group(NamedTuple):
    """The variants of one kind of load.

    The first is the loader as it is.
    """

    layout: str
    cache: str
    ways: Mapping[str, Callable[[], None]]


def _put(module: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


def _each_tensor_alone() -> None:
    jobs.Reads.calls = lambda reads: (reads.take(slice(n, n + 1)) for n in range(len(reads.file)))  # type: ignore[method-assign]


def _pages(huge: bool, *, made_before: bool = True) -> Callable[[], None]:
    def change() -> None:
        # Fix this size, regardless of the load: it requests huge pages even if the system cannot provide them.
        host_loads.NewMemory = lambda tensors, _: new_memory.NewMemory(tensors, huge)  # type: ignore[assignment,misc]
        if not made_before:
            page_calls.populate_pages = lambda address, nbytes: False

    return change


def _all_pages_first() -> None:
    def populated(tensors: Sequence[torch.Tensor], huge_pages: bool | None) -> new_memory.NewMemory:
        memory = new_memory.NewMemory(tensors, huge_pages)
        memory.populate_all(measure.cores())
        return memory

    host_loads.NewMemory = populated  # type: ignore[assignment,misc]


def _plain_copy() -> None:
    def copy(dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor]) -> None:
        for target, source in zip(dst, src, strict=True):
            target.copy_(source)

    copying.strided_copy_torch = copy


def _advised(advice: int) -> Callable[[], None]:
    def change() -> None:
        plain = system.open_readonly

        def opened(path: str) -> system.File:
            file = plain(path)
            os.posix_fadvise(file.fileno(), 0, 0, advice)
            return file

        system.open_readonly = opened

    return change


def _nothing() -> None:
    pass


def _jobs_of(*mib: int) -> dict[str, Callable[[], None]]:
    return {f"jobs of at most {n} MiB": _put(host_schedule, "bytes_per_job", lambda *_, n=n: n << 20) for n in mib}


GROUPS: Mapping[str, Group] = {
    "concatenated": Group(
        "[E, 2I, H]",
        "warm",
        {
            AS_IT_IS: _nothing,
            "huge pages": _pages(huge=True),
            "small pages": _pages(huge=False),
            "huge pages, populated by page faults": _pages(huge=True, made_before=False),
            "small pages, populated by page faults": _pages(huge=False, made_before=False),
            "all pages populated before reading": _all_pages_first,
            "a call for each tensor": _each_tensor_alone,
            **_jobs_of(1, 32, 128),
        },
    ),
    "transposed": Group(
        "[E, H, 2I]",
        "warm",
        {
            AS_IT_IS: _nothing,
            "huge pages": _pages(huge=True),
            "small pages": _pages(huge=False),
            "copy_ of torch from scratch": _plain_copy,
            "slabs of at most 1 MiB": _put(host_schedule, "_SLAB_BYTES", 1 << 20),
            "slabs of at most 32 MiB": _put(host_schedule, "_SLAB_BYTES", 32 << 20),
            "panels of at most 128 rows": _put(transpose_torch, "_MAX_ROWS", 128),
            "panels of at most 512 rows": _put(transpose_torch, "_MAX_ROWS", 512),
        },
    ),
    "cold": Group(
        "[E, 2I, H]",
        "cold",
        {
            AS_IT_IS: _nothing,
            "sequential-read hint (POSIX_FADV_SEQUENTIAL)": _advised(os.POSIX_FADV_SEQUENTIAL),
            "whole-file prefetch (POSIX_FADV_WILLNEED)": _advised(os.POSIX_FADV_WILLNEED),
            **_jobs_of(1, 32, 128),
        },
    ),
}


def run(names: Sequence[str], layers: int | None, repetitions: int, directory: str | None) -> dict[str, Any]:
    """Return all runs, by group and variant.

    Args:
        layers: number of layers of the experts of Qwen3-30B-A3B; None for a tiny checkpoint.

    Raises:
        RuntimeError: two variants do not produce the same tensors, or a run failed.
    """
    shape = SMALL if layers is None else qwen3_30b(layers)
    with tempfile.TemporaryDirectory(prefix="benchmark-choices-", dir=directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        write_checkpoint(shape, big)
        write_checkpoint(SMALL, warm_up)
        commands, settings = {}, {}
        for name in names:
            for way in GROUPS[name].ways:
                where = {"group": name, "way": way, "big": big, "warm_up": warm_up}
                commands[f"{name}: {way}"] = ["-m", "benchmarks.choices", "--worker", json.dumps(where)]
                settings[f"{name}: {way}"] = variables(GROUPS[name].cache, huge_pages=False)
        results = measure.run_interleaved(commands, repetitions, lambda: None, settings)
        nbytes = measure.file_bytes(big)
    rows = []
    for name in names:
        runs = {way: [one["loads"][0] for one in results[f"{name}: {way}"]] for way in GROUPS[name].ways}
        measure.check_digests({way: way_runs[0]["digest"] for way, way_runs in runs.items()})
        rows += [{"group": name, "way": way, "runs": way_runs} for way, way_runs in runs.items()]
    return {"shape": shape.name, "file_bytes": nbytes, "threads": measure.cores(), "rows": rows}


def load(group: str, way: str, big: str, warm_up: str, repetition: int) -> list[dict[str, Any]]:
    """Apply the change in this process, and then load."""
    GROUPS[group].ways[way]()
    job = Job("ours", [(big, measure.cores())], warm_up, GROUPS[group].layout, GROUPS[group].cache)
    return work(job, repetition)


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as lists of cells, one for each variant.

    A heading is a list of one cell.
    """
    lines: list[list[str]] = []
    for row in result["rows"]:
        if row["way"] == AS_IT_IS:
            as_it_is = statistics.median(run["seconds"] for run in row["runs"])
            lines.append([f"{GROUPS[row['group']].layout}, {GROUPS[row['group']].cache} page cache"])
        medians = {key: statistics.median(run[key] for run in row["runs"]) for key in row["runs"][0] if key != "digest"}
        lines.append(
            [
                row["way"],
                measure.spread([run["seconds"] for run in row["runs"]]).text(),
                f"{medians['seconds'] / as_it_is:.2f}x",
                f"{medians['cpu_seconds']:.2f}",
                f"{medians['minor_faults']:.0f}",
                f"{medians['anonymous_bytes'] / result['file_bytes']:.2f}x",
            ]
        )
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    lines = [f"| | {' | '.join(_TITLES)} |", "|---" * (len(_TITLES) + 1) + "|"]
    for line in cells(result):
        lines.append(f"| {' | '.join(line)} |" if len(line) > 1 else f"| *{line[0]}* |" + " |" * len(_TITLES))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("choices", __doc__, repetitions=5, room="the size of the files")
    parser.add_argument("--group", action="append", choices=GROUPS, help="default: all")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--from", dest="source", metavar="FILE", help="print the table of a result file in Markdown")
    options.add_worker(parser)
    given = parser.parse_args(arguments)
    if given.worker:
        loads = load(**json.loads(given.worker), repetition=given.repetition)
        sys.stdout.write(json.dumps({"loads": loads}) + "\n")
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)) + "\n")
        return
    environment = measure.environment()
    layers = given.layers if given.size == "full" else None
    result = run(given.group or list(GROUPS), layers, given.repetitions, given.directory)
    show_environment(environment)
    table = Table(title=f"{result['shape']}, {result['threads']} threads", title_justify="left")
    for title in ("", *_TITLES):
        table.add_column(title, justify="right" if title else "left")
    for line in cells(result):
        table.add_row(*line)
    show(table)
    measure.write_json(given.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
