"""Benchmark vLLM's load formats on vLLM's own model class: ours, vLLM's default loader, and Run:ai's streamer.

    python -m benchmarks.vllm [--size full|small] [--repetitions N] [--threads N] [--method NAME ...]
                              [--memory ready|as-found ...] [--cache warm|cold ...] [--parallel NAME ...]
                              [--directory DIR] [--json FILE]
    python -m benchmarks.vllm --from FILE              the tables of docs/performance.md from that JSON

It needs vLLM 0.33 (its compiled part may be absent) and runai-model-streamer. The checkpoint has two layers of
Qwen3-30B-A3B in bfloat16, with fewer words: 2.8 GB in four files, a tensor per expert and projection.

Every run is a process of its own. It builds ``Qwen3MoeForCausalLM`` as vLLM does, and times ``load_weights`` of the
load format from call to return: the checkpoint's headers are opened, parameters are filled. vLLM allocates parameters
before and does not touch them, so all methods also pay for new memory. "Process" is the time from the start of the
process to its end, without what only the measurement needs: most of it are imports of vLLM.

Ours runs with the trace that an earlier process kept, as all processes but the first do, and without a kept trace. The
other methods have their defaults, but the same number of threads, and Run:ai's streamer reads through a warm page cache
(``RUNAI_STREAMER_FS_STRATEGY=sync_buffered``). fastsafetensors, as vLLM calls it, needs a GPU. The roofs read the same
bytes with ``preadv`` into new memory, see ``benchmarks/peers/roofs.py``. States of page cache and free memory are those
of ``benchmarks.peers``; while memory is ready, one row shows the default loader with huge pages
(``THP_MEM_ALLOC_ENABLE=1``).

Memory is the peak above the level at the start of the timing, beyond the bytes of the parameters. Allocated is
anonymous memory, resident also counts pages of mapped files.

Ranks: two processes over gloo share the model, by tensor parallelism (TP), or with experts divided (EP), also with a
redundant expert for each rank (EPLB). Read are the bytes of calls (rchar of /proc/self/io, with 1 MB a second of the
measurement itself) and of the pages of mapped files that came into the process (rises of RssFile, with the pages around
a wanted one that the system maps too). Owned are the bytes of the rank's parameters.

In the first round each process computes a digest of its parameters. No figure is printed unless all agree.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from benchmarks import measure, memory, options, sharded
from benchmarks.peers import cache, overlay
from benchmarks.peers.roofs import LOADS, ROOFS
from benchmarks.peers.worker import CACHES
from benchmarks.shapes import QWEN3_30B, SMALL, Shape, write_checkpoint
from benchmarks.show import show, show_environment
from benchmarks.vllm_worker import METHODS, PARALLEL, RANKS, Job, variables, work, work_in_rank

SHAPE = Shape(
    "two layers of Qwen3-30B-A3B",
    f"{QWEN3_30B.source}, with 32,768 words",
    "qwen3_moe",
    {**QWEN3_30B.config, "num_hidden_layers": 2, "vocab_size": 32768},
    keys=2 * (128 * 3 + 9) + 3,
    files=4,
)
SIZES = {"full": SHAPE, "small": SMALL}
_IN_RANKS = ("auto", "ours")
_MODULE = ["-m", "benchmarks.vllm", "--worker"]


def run(
    shape: Shape,
    methods: Sequence[str],
    states: Sequence[str],
    caches: Sequence[str],
    parallels: Sequence[str],
    repetitions: int,
    threads: int,
    directory: str | None,
) -> dict[str, Any]:
    """Return all runs by state and method, and those of ranks.

    Args:
        states: states of free memory.
        caches: states of the page cache.
        parallels: how ranks divide the model.

    Raises:
        RuntimeError: two methods do not produce the same parameters, or a run failed.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-vllm-", dir=directory) as root:
        big = os.path.join(root, "big")
        show(f"  writing {shape.name} to {big}", err=True)
        write_checkpoint(shape, big)
        os.sync()
        job = Job("ours", big, os.path.join(root, "traces"), threads)
        _run(job, 0)  # keeps the trace, and compiles modules
        for state in states:
            for where in caches:
                jobs = {
                    method: replace(job, method=method, cache=where, memory=state)
                    for method in [*(roof for roof in LOADS if where in ROOFS[roof].caches), *methods]
                    if method in ROOFS or not METHODS[method].huge_pages or state == memory.READY
                }
                runs = measure.interleaved(list(jobs), repetitions, lambda method, n, jobs=jobs: _run(jobs[method], n))
                rows += [{"method": m, "cache": where, "memory": state, "runs": runs[m]} for m in jobs]
        ranks = {}
        for parallel in parallels:
            jobs = {method: replace(job, method=method, parallel=parallel) for method in _IN_RANKS}
            ranks[parallel] = {method: _run(jobs[method], 0)["ranks"] for method in jobs}
        file_bytes = measure.file_bytes(big)
    _check(rows, ranks)
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": file_bytes,
        "threads": threads,
        "versions": {method: overlay.version(METHODS[method].package) for method in methods},
        "rows": rows,
        "ranks": ranks,
    }


def _run(job: Job, repetition: int) -> dict[str, Any]:
    """Perform a job in a new process."""
    if job.cache == "cold":  # before the wait, because this also frees memory
        cache.evict(job.directory)
    if job.parallel is None:
        memory.wait(job.memory)
    job = replace(job, with_digest=repetition == 0)
    start = time.perf_counter()
    result = measure.run_worker([*_MODULE, job.to_json()], repetition, variables=variables(job))
    seconds = time.perf_counter() - start
    return result | {"process_seconds": seconds - result.pop("beside_seconds", 0.0)}


def _check(rows: Sequence[Mapping[str, Any]], ranks: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all methods fill the parameters with the same bytes, and that ours does so by a kept trace.

    Raises:
        RuntimeError: two methods differ, or ours has traced vLLM's code.
    """
    if any(run["traces"] for row in rows if row["method"] == "ours" for run in row["runs"]):
        raise RuntimeError("no trace was kept for the next process")
    of_rows = {" ".join(row[k] for k in ("method", "cache", "memory")): row["runs"][0].get("digest") for row in rows}
    measure.check_digests({name: digest for name, digest in of_rows.items() if digest is not None})
    for methods in ranks.values():
        measure.check_digests({method: [rank["digest"] for rank in of] for method, of in methods.items()})


_TITLES = (
    *("seconds", "times ours", "of the roof", "s of CPU", "process, s", "allocated MB", "resident MB"),
    "page faults",
)
_ON_PAGES = ("seconds", "times ours", "of the roof", "allocated MB", "resident MB")
"""The columns that pages show. The terminal and the data have all of them."""


def _median(row: Mapping[str, Any], key: str) -> float:
    return statistics.median(run[key] or 0 for run in row["runs"])


def _cells(row: Mapping[str, Any], group: Sequence[Mapping[str, Any]], file_bytes: int) -> list[str]:
    seconds = {other["method"]: _median(other, "seconds") for other in group}
    mine = seconds[row["method"]]
    owned = row["runs"][0].get("owned_bytes", file_bytes)
    faults = _median(row, "minor_faults") + _median(row, "major_faults")
    return [
        measure.spread([run["seconds"] for run in row["runs"]]).text(),
        f"{mine / seconds['ours']:.2f}x" if "ours" in seconds and row["method"] not in LOADS else "",
        f"{min(seconds[roof] for roof in LOADS) / mine:.2f}",
        f"{_median(row, 'cpu_seconds'):.2f}",
        f"{_median(row, 'process_seconds'):.1f}" if row["method"] not in LOADS else "",
        *(f"{max(0.0, _median(row, f'{kind}_bytes') - owned) / 1e6:.0f}" for kind in ("anonymous", "resident")),
        f"{faults:.0f}",
    ]


def _groups(result: Mapping[str, Any]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the rows of each state."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["cache"], row["memory"]), []).append(row)
    yield from groups.values()


def _heading(group: Sequence[Mapping[str, Any]]) -> str:
    return f"{group[0]['cache'].capitalize()} page cache, {memory.MEMORY[group[0]['memory']]}"


def _called(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if row["method"] in ROOFS:
        return ROOFS[row["method"]].title
    version = result["versions"][row["method"]]
    return f"{METHODS[row['method']].title}{f' ({version})' if version else ''}"


_RANK_TITLES = ("owned MB", *(f"{METHODS[method].title}: read" for method in _IN_RANKS))


def _rank_cells(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    most = {
        method: max(ranks, key=lambda rank: _read_bytes(rank) / rank["owned_bytes"])
        for method, ranks in methods.items()
    }
    read = [
        f"{_read_bytes(rank) / 1e6:.0f} MB, {_read_bytes(rank) / rank['owned_bytes']:.3f}x" for rank in most.values()
    ]
    return [f"{most['ours']['owned_bytes'] / 1e6:.0f}", *read]


def _read_bytes(rank: Mapping[str, Any]) -> int:
    return rank.get("counted_bytes") or (rank["called_bytes"] or 0) + (rank["mapped_bytes"] or 0)


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables for a terminal."""
    for group in _groups(result):
        table = Table(title=f"{result['shape']}: {result['file_bytes'] / 1e9:.2f} GB. {_heading(group)}")
        table.add_column("method")
        for title in _TITLES:
            table.add_column(title, justify="right")
        for row in group:
            table.add_row(_called(row, result), *_cells(row, group, result["file_bytes"]))
        yield table
    table = Table(title=f"{RANKS} ranks: the one with the most bytes read for its bytes")
    table.add_column("divided by")
    for title in _RANK_TITLES:
        table.add_column(title, justify="right")
    for parallel, methods in result["ranks"].items():
        table.add_row(parallel, *_rank_cells(methods))
    yield table


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables with the columns that pages show, and a heading for each."""
    paragraphs = [measure.about(result["environment"])]
    for group in _groups(result):
        lines = [f"| | {' | '.join(_ON_PAGES)} |", "|---" * (len(_ON_PAGES) + 1) + "|"]
        for row in group:
            by_title = dict(zip(_TITLES, _cells(row, group, result["file_bytes"]), strict=True))
            cells = [_called(row, result), *(by_title[title] for title in _ON_PAGES)]
            if row["method"] == "ours":
                cells = [f"**{cell}**" for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
        paragraphs += [f"**{_heading(group)}**", "\n".join(lines)]
    lines = [f"| | {' | '.join(_RANK_TITLES)} |", "|---" * (len(_RANK_TITLES) + 1) + "|"]
    lines += [f"| {' | '.join([parallel, *_rank_cells(methods)])} |" for parallel, methods in result["ranks"].items()]
    return "\n\n".join([*paragraphs, f"**{RANKS} ranks**", "\n".join(lines)]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("vllm", __doc__, repetitions=5, room="the size of the files")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--memory", action="append", choices=memory.MEMORY, help="default: both")
    parser.add_argument("--cache", action="append", choices=CACHES, help="default: both")
    parser.add_argument("--parallel", action="append", choices=PARALLEL, help="default: all")
    parser.add_argument("--from", dest="source", metavar="FILE", help="print the tables of a result file in Markdown")
    options.add_worker(parser)
    given = parser.parse_args(arguments)
    if given.worker:
        job = Job(**json.loads(given.worker))
        result = work(job) if job.parallel is None else {"ranks": sharded.divided(lambda: work_in_rank(job), RANKS)}
        sys.stdout.write(f"\n{json.dumps(result)}\n")
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)))
        return
    environment = measure.environment(touch=given.size == "full")
    result = run(
        SIZES[given.size],
        given.method or list(METHODS),
        given.memory or list(memory.MEMORY),
        given.cache or list(CACHES),
        given.parallel or list(PARALLEL),
        given.repetitions,
        given.threads,
        given.directory,
    )
    result = {"environment": environment, **result}
    show_environment(environment)
    for table in tables(result):
        show(table)
    measure.write_json(given.json, result)


if __name__ == "__main__":
    main()
