"""Load one checkpoint into the same final buffers by every method that a user would choose, and compare.

    python -m benchmarks.peers [--layers N] [--size full|small] [--repetitions N] [--threads N] [--method NAME ...]
                               [--memory ready|as-found ...] [--cache warm|cold ...] [--layout LAYOUT ...]
                               [--machine NAME ...] [--directory DIR] [--json FILE]
    python -m benchmarks.peers --from FILE ... [--plot]        the tables of docs/ from such JSON, and the plot

The results are seconds, memory, page faults and bytes. The checkpoint has N layers with the experts of Qwen3-30B-A3B
(128 experts, hidden 2048, intermediate 768; 2 layers are 2.4 GB), random values in bfloat16, a tensor per expert and
projection, two files a layer. It is in a temporary directory that is removed at the end. ``methods.py`` has the
methods, ``roofs.py`` the roofs. Peers are pinned in ``benchmarks/peers.txt`` and installed into ``.venv/peers``.

Every run is a process of its own that first loads a tiny checkpoint in the same way, so that imports and one-time setup
are not timed. The time runs from the call, buffers included, until all bytes are in their final places. "s of reading"
is the time that this package reports for that phase. Methods alternate. The tables have medians and 20th to 80th
percentiles.

Free memory is in one of two states (``benchmarks/memory.py``). "ready": the process touches memory of three times the
size of the files and frees it, last before the timing. "as-found": nothing is touched, and before each run the driver
waits half a minute, in which a virtual machine returns its free memory to the host. The first state shows the cost of
the code, the second what a user's process sees.

While memory is ready, torch is configured to request huge pages (``THP_MEM_ALLOC_ENABLE=1``) in all rows except ours,
which requests them itself, and the row that states otherwise. As found, only the row that states so has this setting.
The number of threads is the same for all methods that have such a setting. On a warm page cache fastsafetensors and
Run:ai's streamer are configured to read through it (``FASTSAFETENSORS_ODIRECT=0``,
``RUNAI_STREAMER_FS_STRATEGY=sync_buffered``); on a cold one they have their defaults. Cold: every file is written back
and dropped from the page cache, which mincore(2) then confirms. Layers below (a host, a controller) may still hold it.

``--machine`` loads in a state that a machine may be in, memory as found, to the first ``--layout``. Without
``--method`` it runs ``from_pretrained`` as it comes and ours, next to the roofs. ``machines.py`` sets up these states.
If a state cannot be set up here, the result has the reason. If a method was killed, the result records that.

Memory is the peak above the level at the start of the timing. Anonymous memory is what was allocated; resident memory
also includes mapped files. Bytes read are those of calls and of mapped pages on a warm cache, those of the disk on a
cold one. In the first round each run computes a digest of its tensors by name, dtype, shape and bytes. No figure is
printed unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, memory
from benchmarks.peers import overlay, tables
from benchmarks.peers.machines import MACHINES, QUIET, Unavailable
from benchmarks.peers.methods import METHODS
from benchmarks.peers.roofs import ROOFS
from benchmarks.peers.running import run_jobs
from benchmarks.peers.worker import CACHES, LAYOUTS, Job, work
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

_ON_A_MACHINE = ("transformers-as-it-comes", "ours")


def jobs_of(
    methods: Sequence[str],
    layouts: Sequence[str],
    caches: Sequence[str],
    state: str,
    big: str,
    warm_up: str,
    threads: int,
) -> dict[str, Job]:
    """Return the jobs of a round: roofs, then every method in each layout, for each state of the page cache.

    Args:
        state: state of free memory.
    """
    jobs = []
    for cache in caches:
        of = {"points": [(big, threads)], "warm_up": warm_up, "cache": cache, "memory": state}
        jobs += [Job(name, layout="", **of) for name, r in ROOFS.items() if cache in r.caches and state in r.memory]
        jobs += [Job(name, layout=layout, **of) for layout in layouts for name in methods]
    return {f"{job.method} {job.layout} {job.cache}": job for job in jobs}


def run(
    shape: Shape,
    machines: Sequence[str],
    states: Sequence[str],
    methods: Sequence[str] | None,
    layouts: Sequence[str],
    caches: Sequence[str],
    repetitions: int,
    threads: int,
    directory: str | None,
) -> dict[str, Any]:
    """Return all runs, by machine, state of free memory and of the page cache, layout and method.

    Args:
        states: states of free memory. On a machine that is not quiet it is as found.
        methods: None for all on a quiet machine, and for the two most informative ones elsewhere.

    Raises:
        RuntimeError: two methods do not produce the same tensors, or a run failed.
    """
    rows: list[dict[str, Any]] = []
    not_made: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-", dir=directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        show(f"  writing {shape.name} to {big}", err=True)
        write_checkpoint(shape, big)
        write_checkpoint(SMALL, warm_up)
        os.sync()
        nbytes = measure.file_bytes(big)
        for name in machines:
            alone = name == QUIET
            on = [cache for cache in caches if cache in MACHINES[name].caches]
            if not on:
                not_made[name] = f"it needs --cache {' or '.join(MACHINES[name].caches)}"
                continue
            wanted = methods or (list(METHODS) if alone else _ON_A_MACHINE)
            with tempfile.TemporaryDirectory(dir=root) as place:
                try:
                    with MACHINES[name].make(big, place, shape is not SMALL) as made:
                        for state in states if alone else (memory.AS_FOUND,):
                            to = layouts if alone else layouts[:1]
                            jobs = jobs_of(wanted, to, on, state, made.directory, warm_up, threads)
                            rows += _rows(name, jobs, run_jobs(jobs, repetitions, made))
                except Unavailable as error:
                    not_made[name] = str(error)
    tables.check(rows)
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": nbytes,
        "threads": threads,
        "rows": rows,
        "not_made": not_made,
    }


def _rows(machine: str, jobs: Mapping[str, Job], runs: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for key, job in jobs.items():
        of_method = METHODS.get(job.method)
        rows.append(
            {
                "method": job.method,
                "title": of_method.title if of_method else ROOFS[job.method].title,
                "version": overlay.version(of_method.package) if of_method else None,
                "machine": machine,
                "memory": job.memory,
                "cache": job.cache,
                "layout": job.layout,
                "runs": runs[key],
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--memory", action="append", choices=memory.MEMORY, help="default: both")
    parser.add_argument("--cache", action="append", choices=CACHES, help="default: both")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="default: both")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="default: quiet")
    parser.add_argument("--directory", help="parent of the temporary directory; it needs the size of the files")
    parser.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    parser.add_argument(
        "--from", dest="sources", nargs="+", metavar="FILE", help="print the tables of result files in Markdown"
    )
    parser.add_argument("--plot", action="store_true", help="with --from: also draw both states of free memory")
    parser.add_argument("--pictures", type=Path, default=measure.PICTURES, help="directory for the plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--repetition", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        loads = work(Job(**json.loads(options.worker)), options.repetition)
        sys.stdout.write(json.dumps({"loads": loads}) + "\n")
        return
    if options.sources:
        results = [measure.read_json(source) for source in options.sources]
        sys.stdout.write("\n".join(tables.markdown(result) for result in results))
        if options.plot:
            _draw(results, options.pictures)
        return
    small = options.size == "small"
    machines = options.machine or [QUIET]
    methods = options.method or (METHODS if QUIET in machines else _ON_A_MACHINE)
    if not all(METHODS[method].installed for method in methods):
        overlay.use()
    environment = measure.environment(touch=not small)
    result = run(
        SMALL if small else qwen3_30b(options.layers),
        machines,
        options.memory or list(memory.MEMORY),
        options.method,
        options.layout or list(LAYOUTS),
        options.cache or list(CACHES),
        options.repetitions,
        options.threads,
        options.directory,
    )
    result = {"environment": environment, **result}
    show_environment(environment)
    for table in tables.terminal(result):
        show(table)
    measure.write_json(options.json, result)


def _draw(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    overlay.use()
    from benchmarks.peers.plots import draw_memory

    for path in draw_memory(results, folder):
        show(str(path), err=True)


if __name__ == "__main__":
    main()
