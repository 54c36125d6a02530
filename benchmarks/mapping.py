"""Benchmark loads without reading: a checkpoint in the model's own layout, mapped, against loads that read it.

    python -m benchmarks.mapping [--layers N] [--size full|small] [--repetitions N] [--directory DIR] [--json FILE]
    python -m benchmarks.mapping --from FILE           the table of docs/performance.md from that JSON

First ``convert_checkpoint`` converts layers with the experts of Qwen3-30B-A3B to the model's own layout. Every load is
a process of its own, from a warm page cache, with all modules imported, including the model's, and memory as found
(``benchmarks/memory.py``): half a minute passes before each. ``load_model`` gets an existing model on the meta device.
``from_pretrained`` loads the published files, and those in the model's own layout, which it also maps. "All pages
touched" is the time to read from each page once after the load: then pages of a mapped file come into the process. All
loads are compared by a digest. Then each writes to its tensors, and the files must be unchanged.

At the end four processes map the checkpoint at once and have touched all pages. The memory of each is the sum of its
pages, each divided by the number of processes that share it (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import automodel_conv as amc
from benchmarks import measure, memory, options
from benchmarks.shapes import SMALL, Shape, meta_model, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

PROCESSES = 4
_PAGE_BYTES = 4096

Loaded = tuple[Mapping[str, Tensor], Any]
"""Tensors by name, and the report or None."""


def _state_dict(directory: str, model: nn.Module, memory_map: bool) -> Loaded:
    loaded = amc.load_state_dict(directory, memory_map=memory_map)
    return loaded, loaded.report


def _model(directory: str, model: nn.Module, memory_map: bool) -> Loaded:
    report = amc.load_model(model, directory, memory_map=memory_map)
    return model.state_dict(), report


def _from_pretrained(directory: str, model: nn.Module, memory_map: bool) -> Loaded:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).state_dict(), None


# The function that loads, whether it maps, and the directory, for each method.
METHODS: dict[str, tuple[Callable[[str, nn.Module, bool], Loaded], bool, str]] = {
    "load_state_dict(memory_map=True)": (_state_dict, True, "own"),
    "load_model(memory_map=True)": (_model, True, "own"),
    "load_state_dict": (_state_dict, False, "own"),
    "load_model": (_model, False, "own"),
    "from_pretrained": (_from_pretrained, False, "own"),
    "from_pretrained, published files": (_from_pretrained, False, "published"),
}


def touched(tensors: Mapping[str, Tensor]) -> float:
    """Read one byte of each page and return the seconds."""
    start = time.perf_counter()
    for tensor in tensors.values():
        tensor.detach().reshape(-1).view(torch.uint8)[::_PAGE_BYTES].sum()
    return time.perf_counter() - start


def work(method: str, root: str, size: str, layers: int) -> dict[str, Any]:
    """Perform one load in this process."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load, memory_map, place = METHODS[method]
    directory, model = os.path.join(root, place), meta_model(_shape(size, layers))
    measure.read_through(directory)  # last: the page cache may have evicted pages that were read before the wait
    start = time.perf_counter()
    tensors, report = load(directory, model, memory_map)
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "touched_seconds": touched(tensors),
        "bytes_read": None if report is None else report.bytes_read,
        "bytes_mapped": None if report is None else report.bytes_mapped,
        "phases": None if report is None else dict(report.seconds),
        "digest": measure.digest(tensors),
    }
    for tensor in tensors.values():  # must not reach the files
        tensor.detach().reshape(-1)[:_PAGE_BYTES].fill_(1)
    return result


def share(directory: str) -> None:
    """Map the checkpoint next to other processes: report when all pages are touched, and then the PSS."""
    loaded = amc.load_state_dict(directory, rules=[], memory_map=True)
    touched(loaded)
    _say(None)
    sys.stdin.readline()
    _say(measure.mapped_pss(directory))
    sys.stdin.readline()


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def shared(directory: str) -> list[int]:
    """Return the PSS in bytes of a directory's files, in each process after all have touched all of them."""
    command = [sys.executable, "-m", "benchmarks.mapping", "--share", directory]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, cwd=measure.REPOSITORY, text=True, bufsize=1, stdin=pipe, stdout=pipe)
        for _ in range(PROCESSES)
    ]

    def ask_all() -> list[Any]:
        return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]

    def tell_all() -> None:
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("\n")

    try:
        ask_all()
        tell_all()
        return ask_all()
    finally:
        for process in processes:
            process.communicate("\n")


def _shape(size: str, layers: int) -> Shape:
    return SMALL if size == "small" else qwen3_30b(layers)


def run(layers: int, size: str, repetitions: int, directory: str | None) -> dict[str, Any]:
    """Return all runs by method, the bytes of the files, and PSS.

    Raises:
        RuntimeError: two loads differ, or a write to tensors has reached the files.
    """
    shape = _shape(size, layers)
    with tempfile.TemporaryDirectory(prefix="benchmark-mapping-", dir=directory) as root:
        published, own = os.path.join(root, "published"), os.path.join(root, "own")
        write_checkpoint(shape, published)
        amc.convert_checkpoint(published, own)
        at_start = measure.digest(amc.load_state_dict(own, rules=[]))
        common = [root, size, str(layers)]
        commands = {method: ["-m", "benchmarks.mapping", "--worker", method, *common] for method in METHODS}
        runs = measure.run_interleaved(commands, repetitions, lambda: memory.wait(memory.AS_FOUND))
        measure.check_digests({method: one["digest"] for method, method_runs in runs.items() for one in method_runs})
        if measure.digest(amc.load_state_dict(own, rules=[])) != at_start:
            raise RuntimeError("writing to tensors has reached the files")
        file_bytes = measure.file_bytes(own)
        pss = shared(own)
    return {"shape": shape.name, "file_bytes": file_bytes, "runs": runs, "pss_bytes": pss}


_TITLES = ("seconds", "all pages touched, seconds more", "GB read", "GB mapped")


def _cells(loads: list[dict[str, Any]]) -> list[str]:
    seconds, touches = (measure.spread([load[kind] for load in loads]) for kind in ("seconds", "touched_seconds"))
    gigabytes = [
        "-" if loads[0][kind] is None else f"{loads[0][kind] / 1e9:.2f}" for kind in ("bytes_read", "bytes_mapped")
    ]
    return [seconds.text(digits=3), touches.text(digits=3), *gigabytes]


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['shape']}: {result['file_bytes'] / 1e9:.2f} GB; median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("load")
    for title in _TITLES:
        shown.add_column(title, justify="right")
    for method, loads in result["runs"].items():
        shown.add_row(method, *_cells(loads))
    return shown


def markdown(result: dict[str, Any]) -> str:
    lines = [f"| load | {' | '.join(_TITLES)} |", "|---" * (len(_TITLES) + 1) + "|"]
    lines += [f"| `{method}` | {' | '.join(_cells(loads))} |" for method, loads in result["runs"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("mapping", __doc__, repetitions=3, room="twice the size of the files")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--from", dest="source", metavar="FILE", help="print the table of a result file in Markdown")
    options.add_worker(parser, 4)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.share:
        share(given.share)
        return
    if given.worker:
        method, root, size, layers = given.worker
        _say(work(method, root, size, int(layers)))
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)) + "\n")
        return
    environment = measure.environment()
    result = run(given.layers, given.size, given.repetitions, given.directory)
    show_environment(environment)
    show(table(result))
    pss = ", ".join(f"{nbytes / result['file_bytes']:.2f}" for nbytes in result["pss_bytes"])
    show(f"memory of {PROCESSES} processes that have all of it mapped and touched, each x files (PSS): {pss}")
    measure.write_json(given.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
