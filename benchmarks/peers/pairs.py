"""The value of the loader's own choice of page size: pairs of loads, with the default and with small pages only.

    python -m benchmarks.peers.pairs [--pairs N] [--layers N] [--size full|small] [--against NAME] [--threads N]
                                     [--directory DIR] [--json FILE]
    python -m benchmarks.peers.pairs --from FILE       the lines again from that JSON

Checkpoint, processes and timing are those of ``python -m benchmarks.peers``: memory as found, warm page cache,
``[E, 2I, H]``. The two loads of a pair run one after the other, and their order alternates. The result has the ratio of
the pairs: the median, the 20th to 80th percentile, and the worst.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import measure, memory
from benchmarks.peers.machines import State
from benchmarks.peers.methods import METHODS
from benchmarks.peers.running import run_jobs
from benchmarks.peers.worker import Job
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show


def run(shape: Shape, against: str, pairs: int, threads: int, directory: str | None) -> dict[str, Any]:
    """Run all pairs.

    Raises:
        RuntimeError: the two do not produce the same tensors, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-pairs-", dir=directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        show(f"  writing {shape.name} to {big}", err=True)
        write_checkpoint(shape, big)
        write_checkpoint(SMALL, warm_up)
        os.sync()
        jobs = {name: Job(name, [(big, threads)], warm_up, memory=memory.AS_FOUND) for name in ("ours", against)}
        runs = run_jobs(jobs, pairs, State(big))
        nbytes = measure.file_bytes(big)
    measure.check_digests({name: results[0]["digest"] for name, results in runs.items()})
    return {"shape": shape.name, "file_bytes": nbytes, "threads": threads, "against": against, "runs": runs}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    ours, other = result["runs"]["ours"], result["runs"][result["against"]]
    yield measure.about(result["environment"])
    for name, method_runs in result["runs"].items():
        seconds = {key: measure.spread([run[key] for run in method_runs]).text() for key in ("seconds", "read_seconds")}
        yield f"{METHODS[name].title}: {seconds['seconds']} s, {seconds['read_seconds']} of them reading"
    for key, what in (("seconds", "whole load"), ("read_seconds", "reading")):
        ratios = [one[key] / two[key] for one, two in zip(ours, other, strict=True)]
        yield f"{what}, {len(ratios)} pairs: {measure.spread(ratios).text()}x, at worst {max(ratios):.2f}x"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--against", choices=("ours-small", "ours-huge"), default="ours-small")
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--directory", help="parent of the temporary directory; it needs the size of the files")
    parser.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    parser.add_argument("--from", dest="source", metavar="FILE", help="print the lines of a result file")
    options = parser.parse_args(arguments)
    if options.source:
        result = measure.read_json(options.source)
    else:
        small = options.size == "small"
        environment = measure.environment(touch=not small)
        shape = SMALL if small else qwen3_30b(options.layers)
        results = run(shape, options.against, options.pairs, options.threads, options.directory)
        result = {"environment": environment, **results}
    for line in lines(result):
        show(line)
    measure.write_json(options.json, result)


if __name__ == "__main__":
    main()
