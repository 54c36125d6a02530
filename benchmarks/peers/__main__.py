"""The same checkpoint to the same final buffers, by everything a user would pick: seconds, memory, faults, bytes.

    python -m benchmarks.peers [--layers N] [--size full|small] [--repetitions N] [--threads N] [--method NAME ...]
                               [--cache warm|cold ...] [--directory DIR] [--json FILE]
    python -m benchmarks.peers --from FILE             the README's table from that JSON

The checkpoint has N layers with the experts of Qwen3-30B-A3B (128 experts, hidden 2048, intermediate 768; 2 layers are
2.4 GB), random numbers in bfloat16, a tensor per expert and projection, two files a layer. It lies in a temporary
directory that is removed at the end. What each method does is said in ``methods.py``, what the roofs are in
``roofs.py``; peers are pinned in ``benchmarks/peers.txt`` and installed into ``.venv/peers``.

Every run is a process of its own that first loads a tiny checkpoint in the same way: imports and what is made once are
not timed. Last before the timing it touches memory of three times the size of the files and gives it back: on a virtual
machine the first touch of memory that the host had taken is many times slower than the reading. Timed is from
the call, buffers included, until all bytes are in their final places. Methods take turns; medians and 20th to 80th
percentiles are told.

The same for all: ``THP_MEM_ALLOC_ENABLE=1``, so that torch advises its large allocations to use huge pages, and buffers
given to peers are advised too, except in the row that says so; the number of threads, where one can choose it. On a
warm page cache fastsafetensors and Run:ai's streamer are told to read through it (``FASTSAFETENSORS_ODIRECT=0``,
``RUNAI_STREAMER_FS_STRATEGY=sync_buffered``), on a cold one they have their defaults. Cold: every file is written back
and dropped from the page cache, which mincore(2) then confirms; what is below (a host, a controller) may still hold it.

Memory is the peak above the level at the start of the timing: anonymous memory is what was allocated, resident memory
has mapped files besides. Bytes read are those of calls and of mapped pages on a warm cache, those of the disk on a cold
one. In the first round each run computes a digest of its tensors by name, dtype, shape and bytes; no number is told
unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
from benchmarks.peers import overlay, tables
from benchmarks.peers.methods import METHODS
from benchmarks.peers.roofs import ROOFS
from benchmarks.peers.worker import CACHES, LAYOUTS, Job, variables, work
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment


def jobs_of(methods: Sequence[str], caches: Sequence[str], big: str, warm_up: str, threads: int) -> list[Job]:
    """What is run in a round: roofs, then every method in both layouts, for each state of the page cache."""
    jobs = []
    for cache in caches:
        of = {"points": [(big, threads)], "warm_up": warm_up, "cache": cache}
        jobs += [Job(name, layout="", **of) for name, roof in ROOFS.items() if cache in roof.caches]
        jobs += [Job(name, layout=layout, **of) for layout in LAYOUTS for name in methods]
    return jobs


def _huge_pages(name: str) -> bool:
    return name in ROOFS or METHODS[name].huge_pages


def run(
    shape: Shape, methods: Sequence[str], caches: Sequence[str], repetitions: int, threads: int, directory: str | None
) -> dict[str, Any]:
    """All runs, by method, layout and state of the page cache.

    Raises:
        RuntimeError: two methods do not make the same tensors, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-", dir=directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        show(f"  writing {shape.name} to {big}", err=True)
        write_checkpoint(shape, big)
        write_checkpoint(SMALL, warm_up)
        jobs = {f"{j.method} {j.layout} {j.cache}": j for j in jobs_of(methods, caches, big, warm_up, threads)}
        found = measure.run_interleaved(
            {key: ["-m", "benchmarks.peers", "--worker", json.dumps(job.as_dict())] for key, job in jobs.items()},
            repetitions,
            lambda: None,
            {key: variables(job.cache, _huge_pages(job.method)) for key, job in jobs.items()},
        )
        nbytes = measure.file_bytes(big)
    rows = []
    for key, job in jobs.items():
        of_method = METHODS.get(job.method)
        rows.append(
            {
                "method": job.method,
                "title": of_method.title if of_method else ROOFS[job.method].title,
                "version": overlay.version(of_method.package) if of_method else None,
                "layout": job.layout,
                "cache": job.cache,
                "runs": [one["loads"][0] for one in found[key]],
            }
        )
    tables.check(rows)
    return {"shape": shape.name, "source": shape.source, "file_bytes": nbytes, "threads": threads, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--cache", action="append", choices=CACHES, help="default: both")
    parser.add_argument("--directory", help="where a temporary directory is made; it needs the size of the files")
    parser.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    parser.add_argument("--from", dest="source", metavar="FILE", help="print the table of such a file in Markdown")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--repetition", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        loads = work(Job(**json.loads(options.worker)), options.repetition)
        sys.stdout.write(json.dumps({"loads": loads}) + "\n")
        return
    if options.source:
        sys.stdout.write(tables.markdown(measure.read_json(options.source)))
        return
    methods = options.method or list(METHODS)
    if not all(METHODS[method].installed for method in methods):
        overlay.use()
    environment = measure.environment()
    shape = SMALL if options.size == "small" else qwen3_30b(options.layers)
    caches = options.cache or list(CACHES)
    result = run(shape, methods, caches, options.repetitions, options.threads, options.directory)
    show_environment(environment)
    for table in tables.terminal(result):
        show(table)
    measure.write_json(options.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
