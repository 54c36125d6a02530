"""Benchmark ``from_pretrained`` with and without the hook: seconds, peak memory, and time until the first parameter.

    python -m benchmarks.from_pretrained [--layers N] [--size full|small] [--repetitions N] [--directory DIR]
                                         [--json FILE]

The checkpoint is that of ``benchmarks.peers``: N layers with the experts of Qwen3-30B-A3B, in the page cache. Every
run is a process of its own that first loads a tiny checkpoint in the same way. Memory is the peak above the level at
the start of the timing. Tensors that transformers does not convert stay mapped to the files and are resident, not
anonymous. In the first round the tensors of both are compared by a digest. No figure is printed unless they agree.

The time until the first parameter is measured on headers of the shape of DeepSeek-V3 (45,395 tensors, in sparse files
without data): from the call until transformers converts a tensor, or the hook is about to execute its plan.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from rich.table import Table

import automodel_conv as amc
from automodel_conv.cli.measuring import PeakMemory, ready_memory
from automodel_conv.integrations import hooked_load
from benchmarks import measure, options
from benchmarks.shapes import DEEPSEEK_V3, SMALL, qwen3_30b, write_checkpoint, write_sparse_checkpoint
from benchmarks.show import show, show_environment

METHODS = {"transformers": nullcontext, "with the hook": amc.accelerate_transformers}


class _Reached(Exception):
    """Raised when the first parameter is about to be created."""


def work(method: str, directory: str, warm_up: str, repetition: int) -> dict[str, Any]:
    """Perform one load in this process."""
    from transformers import AutoModelForCausalLM

    _quiet()
    with METHODS[method]():
        AutoModelForCausalLM.from_pretrained(warm_up)
        ready_memory(3 * sum(file.stat().st_size for file in os.scandir(directory)) // 2)
        with PeakMemory() as peak:
            start = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(directory)
            seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "anonymous_bytes": peak.anonymous_bytes,
        "resident_bytes": peak.resident_bytes,
        "digest": measure.digest(model.state_dict()) if repetition == 0 else None,
    }


def reach(method: str, directory: str, warm_up: str) -> dict[str, Any]:
    """Return the seconds until the first parameter is about to be created, in this process."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    # A patched convert is not lowered, so the hook and transformers are stopped in different functions.
    places: list[Any] = [(WeightConverter, "convert"), (WeightRenaming, "convert")]
    if METHODS[method] is amc.accelerate_transformers:
        places = [(hooked_load, "fill")]

    def reached(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    _quiet()
    with METHODS[method]():
        AutoModelForCausalLM.from_pretrained(warm_up)
        with ExitStack() as patches:
            for owner, name in places:
                patches.enter_context(mock.patch.object(owner, name, reached))
            start = time.perf_counter()
            try:
                AutoModelForCausalLM.from_pretrained(directory)
            except _Reached:
                return {"seconds": time.perf_counter() - start}
    raise RuntimeError("no parameter was created")


def _quiet() -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()


def run(layers: int, small: bool, repetitions: int, directory: str | None) -> dict[str, Any]:
    """Return all runs, and the bytes of the files.

    Raises:
        RuntimeError: the two produce different tensors, or a run failed.
    """
    shape, many = (SMALL, SMALL) if small else (qwen3_30b(layers), DEEPSEEK_V3)
    with tempfile.TemporaryDirectory(prefix="benchmark-from-pretrained-", dir=directory) as root:
        places = {name: os.path.join(root, name) for name in ("big", "warm-up", "headers")}
        write: dict[str, Callable[[str], None]] = {
            "big": lambda path: write_checkpoint(shape, path),
            "warm-up": lambda path: write_checkpoint(SMALL, path),
            "headers": lambda path: write_sparse_checkpoint(many, path),
        }
        for name, path in places.items():
            show(f"  writing {path}", err=True)
            write[name](path)
        runs = {}
        for kind, path in (("load", places["big"]), ("reach", places["headers"])):
            command = ["-m", "benchmarks.from_pretrained", "--worker", kind]
            commands = {method: [*command, method, path, places["warm-up"]] for method in METHODS}
            before = (lambda: measure.read_through(places["big"])) if kind == "load" else (lambda: None)
            runs[kind] = measure.run_interleaved(commands, repetitions, before)
        file_bytes = sum(path.stat().st_size for path in Path(places["big"]).glob("*.safetensors"))
    digests = {method: loads[0]["digest"] for method, loads in runs["load"].items()}
    if len(set(digests.values())) > 1:
        raise RuntimeError(f"the tensors differ: {digests}")
    return {"shape": shape.name, "headers": many.name, "keys": many.keys, "file_bytes": file_bytes, "runs": runs}


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['shape']}: {result['file_bytes'] / 1e9:.2f} GB; median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("from_pretrained")
    first = f"s to first parameter, {result['keys']} tensors"
    for title in ("seconds", "GB/s", "anonymous, x files", "resident, x files", first):
        shown.add_column(title, justify="right")
    for method, loads in result["runs"]["load"].items():
        seconds = measure.spread([load["seconds"] for load in loads])
        shown.add_row(
            method,
            seconds.text(),
            f"{result['file_bytes'] / 1e9 / seconds.median:.2f}",
            *(f"{max(load[kind] or 0 for load in loads) / result['file_bytes']:.2f}" for kind in _MEMORY),
            measure.spread([run["seconds"] for run in result["runs"]["reach"][method]]).text(),
        )
    return shown


_MEMORY = ("anonymous_bytes", "resident_bytes")


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("from_pretrained", __doc__, repetitions=5, room="the size of the files")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    options.add_worker(parser, 4)
    given = parser.parse_args(arguments)
    if given.worker:
        kind, *rest = given.worker
        result = work(*rest, given.repetition) if kind == "load" else reach(*rest)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    environment = measure.environment()
    result = run(given.layers, given.size == "small", given.repetitions, given.directory)
    show_environment(environment)
    show(table(result))
    measure.write_json(given.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
