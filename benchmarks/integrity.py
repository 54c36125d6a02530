"""The cost of certainty: loads that verify checksums first, and plans with a proof of their coverage.

    python -m benchmarks.integrity [--layers N] [--size full|small] [--repetitions N] [--directory DIR] [--json FILE]

``verify=True`` reads all tensors once more, before anything is written. The load has layers of Qwen3-30B-A3B's experts,
from a warm page cache. The proof that each element is written exactly once is part of every plan. The plan has
DeepSeek-V3's 45,395 tensors; it runs with the proof and with a function that does nothing instead. All runs are in this
process and alternate. The table has medians and 20th to 80th percentiles.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from rich.table import Table

import automodel_conv as amc
from automodel_conv.cli.measuring import ready_memory
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning import plan as planning
from benchmarks import measure, options
from benchmarks.shapes import DEEPSEEK_V3, SMALL, meta_model, qwen3_30b, write_checkpoint, write_sparse_checkpoint
from benchmarks.show import show, show_environment


def _write_checksums(checkpoint: Checkpoint) -> None:
    from automodel_conv.execution.checksums import checksums_of, checksums_text
    from automodel_conv.files.shards import CHECKSUMS_NAME

    with open(os.path.join(checkpoint.directory, CHECKSUMS_NAME), "wb") as file:
        file.write(checksums_text(checksums_of(checkpoint, measure.cores())))


def run(layers: int | None, repetitions: int, directory: str | None) -> dict[str, Any]:
    """Return lists of seconds, by method.

    Args:
        layers: number of layers; None for a tiny checkpoint, and a plan of it.
    """
    shape, planned = (SMALL, SMALL) if layers is None else (qwen3_30b(layers), DEEPSEEK_V3)
    with tempfile.TemporaryDirectory(prefix="benchmark-integrity-", dir=directory) as root:
        big, headers = os.path.join(root, "big"), os.path.join(root, "headers")
        write_checkpoint(shape, big)
        write_sparse_checkpoint(planned, headers)
        nbytes = measure.file_bytes(big)
        _write_checksums(amc.open_checkpoint(big))
        model, checkpoint = meta_model(planned), amc.open_checkpoint(headers)

        def plan_unproved() -> None:
            with mock.patch.object(planning, "prove"):
                amc.compile_plan(checkpoint, model)

        ways: dict[str, Callable[[], object]] = {
            "load": lambda: amc.load_state_dict(big),
            "load, checksums verified": lambda: amc.load_state_dict(big, verify=True),
            "plan": lambda: amc.compile_plan(checkpoint, model),
            "plan, not proved": plan_unproved,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways.values():
            way()
        for repetition in range(repetitions):
            for way in measure.shuffled(list(ways), repetition):
                ready_memory(3 * nbytes // 2)
                start = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - start)
    return {"shape": shape.name, "file_bytes": nbytes, "planned": planned.name, "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("integrity", __doc__, repetitions=5, room="the size of the files")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    given = parser.parse_args(arguments)
    environment = measure.environment()
    result = run(given.layers if given.size == "full" else None, given.repetitions, given.directory)
    show_environment(environment)
    table = Table(title=f"{result['shape']}; plans of {result['planned']}", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for way, seconds in result["seconds"].items():
        table.add_row(way, measure.spread(seconds).text(digits=3))
    show(table)
    measure.write_json(given.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
