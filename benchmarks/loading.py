"""Files to final buffers on the CPU: seconds, GB/s and peak memory, ours, its peers and the roof.

    python -m benchmarks.loading [--layers N] [--size full|small] [--repetitions N] [--threads N]
                                 [--method NAME ...] [--directory DIR] [--json FILE]

The checkpoint has N layers with the experts of Qwen3-30B-A3B (128 experts, hidden 2048, intermediate
768; 2 layers are 2.4 GB), random numbers in bfloat16, a tensor per expert and projection, two files
a layer. It lies in a temporary directory that is removed at the end, and is read once before every
run, so it is in the page cache.

Experts end as ``[E, 2I, H]`` and ``[E, H, I]``:

transformers  ``AutoModelForCausalLM.from_pretrained``; what it does not convert stays mapped to the
              files.
dcp           ``torch.distributed.checkpoint`` with ``HuggingFaceStorageReader``, into views of
              grouped buffers as ``torch.empty`` makes them.
              The row with huge pages: the same, into buffers advised to use them, as ours are.
ours          ``load_state_dict``.
roof          no conversion: ``os.preadv`` of the files' data in runs of 32 MiB, one buffer per file.
              Its bytes are not in their final places, so nothing that converts should be faster.

Experts end as ``[E, H, 2I]`` and ``[E, I, H]``:

transformers, transposed  ``from_pretrained``, then each grouped parameter is replaced by
                          ``transpose(1, 2).contiguous()``.
dcp, transposed           into transposed views of the buffers, with huge pages.
ours, transposed          ``load_state_dict(layout="nemo")``.

Every run is a process of its own that first loads a tiny checkpoint in the same way: imports and
everything made once are not timed. Then it touches memory of one and a half times the size of the
files and gives it back: on a virtual machine the first touch of memory that the host had taken is
many times slower than the reading, so that without this the host would be measured.

Timed is from the call, buffers included, until all bytes are in their final places. The buffers of
the roof are advised to use huge pages, as ours are. All use the same number of threads, as far as
they let one choose (dcp: one thread a file). Memory is the peak above the level at the start of the
timing; anonymous memory is what was allocated, resident memory has mapped files besides.

In the first round each run also computes a digest of its tensors, by name, dtype, shape and bytes.
No number is printed unless all agree; the bytes of the roof are put in order after the timing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import automodel_conv as amc
from automodel_conv.files import system
from automodel_conv.measuring import PeakMemory, ready_memory
from benchmarks import measure
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

_RUN_BYTES = 32 << 20
_GROUPED = ("gate_up_proj", "down_proj")

Made = Callable[[], dict[str, Tensor]]
"""A finished load: makes its tensors under transformers' names, for the digest."""


def load_with_transformers(directory: str, threads: int, transposed: bool) -> Made:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    if transposed:
        for name, parameter in model.named_parameters():
            if name.endswith(_GROUPED):
                parameter.data = parameter.data.transpose(1, 2).contiguous()
    return model.state_dict


def load_with_dcp(directory: str, threads: int, transposed: bool, huge_pages: bool = True) -> Made:
    import torch.distributed.checkpoint as dcp

    made: dict[str, Tensor] = {}
    views: dict[str, Tensor] = {}
    for name, shape in grouped_shapes(directory).items():
        if transposed and name.endswith(_GROUPED):
            shape = (shape[0], shape[2], shape[1])
        made[name] = torch.empty(shape, dtype=torch.bfloat16)
        if huge_pages:
            advise_huge_pages(made[name])
        views |= per_expert(name, made[name].transpose(1, 2) if transposed and len(shape) == 3 else made[name])
    dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(directory, thread_count=threads))
    return lambda: made


def load_with_ours(directory: str, threads: int, transposed: bool) -> Made:
    loaded = amc.load_state_dict(directory, layout="nemo" if transposed else None, threads=threads)
    return lambda: {
        name.replace("gate_and_up_projs", "gate_up_proj").replace("down_projs", "down_proj"): tensor
        for name, tensor in loaded.items()
    }


def read_with_preadv(directory: str, threads: int, transposed: bool) -> Made:
    buffers: dict[str, Tensor] = {}
    runs = []
    for path in sorted(Path(directory).glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        header_bytes = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
        nbytes = os.fstat(descriptor).st_size - header_bytes
        buffer = buffers[str(path)] = torch.empty(nbytes, dtype=torch.uint8)
        advise_huge_pages(buffer)
        view = memoryview(buffer.numpy())
        runs += [
            (descriptor, header_bytes + start, view[start : start + _RUN_BYTES])
            for start in range(0, nbytes, _RUN_BYTES)
        ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda run: measure.read_into(*run), runs))
    for descriptor in {run[0] for run in runs}:
        os.close(descriptor)
    return lambda: _in_order(buffers, directory)


METHODS: Mapping[str, tuple[Callable[[str, int, bool], Made], bool]] = {
    "transformers": (load_with_transformers, False),
    "dcp": (partial(load_with_dcp, huge_pages=False), False),
    "dcp, huge pages": (load_with_dcp, False),
    "roof": (read_with_preadv, False),
    "ours": (load_with_ours, False),
    "transformers, transposed": (load_with_transformers, True),
    "dcp, transposed": (load_with_dcp, True),
    "ours, transposed": (load_with_ours, True),
}


def work(method: str, directory: str, warm_up: str, threads: int, repetition: int) -> dict[str, Any]:
    """One run, in this process."""
    warnings.simplefilter("ignore")  # dcp's, about there being no process group
    if "transformers" in method or "ours" in method:
        from transformers.utils import logging

        logging.disable_progress_bar()
    load, transposed = METHODS[method]
    load(warm_up, threads, transposed)
    ready_memory(3 * sum(file.stat().st_size for file in os.scandir(directory)) // 2)
    with PeakMemory() as peak:
        start, start_cpu = time.perf_counter(), time.process_time()
        made = load(directory, threads, transposed)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "anonymous_bytes": peak.anonymous_bytes,
        "resident_bytes": peak.resident_bytes,
        "digest": measure.digest(made()) if repetition == 0 else None,
    }


def grouped_shapes(directory: str) -> dict[str, tuple[int, ...]]:
    """What the model has: names and shapes, experts grouped."""
    shapes: dict[str, tuple[int, ...]] = {}
    checkpoint = amc.open_checkpoint(directory)
    experts = 1 + max(int(name.split(".")[5]) for name in checkpoint.names if ".experts." in name)
    for name, shape in zip(checkpoint.names, checkpoint.shapes, strict=True):
        path, found, part = name.partition(".experts.")
        if not found:
            shapes[name] = shape
        elif part.endswith("gate_proj.weight"):
            shapes[f"{path}.experts.gate_up_proj"] = (experts, 2 * shape[0], shape[1])
        elif part.endswith("down_proj.weight"):
            shapes[f"{path}.experts.down_proj"] = (experts, *shape)
    return shapes


def per_expert(name: str, grouped: Tensor, first: int = 0) -> dict[str, Tensor]:
    """The views of a tensor ``[E, 2I, H]`` or ``[E, H, I]`` that a checkpoint has tensors for.

    Args:
        first: number of its first expert.
    """
    path, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        parts = zip(("gate_proj", "up_proj"), grouped.chunk(2, dim=1), strict=True)
    elif leaf == "down_proj":
        parts = iter([(leaf, grouped)])
    else:
        return {name: grouped}
    return {f"{path}.{expert}.{part}.weight": view for part, views in parts for expert, view in enumerate(views, first)}


def _in_order(buffers: Mapping[str, Tensor], directory: str) -> dict[str, Tensor]:
    """What lies in the files' data, put in the model's order."""
    checkpoint = amc.open_checkpoint(directory)
    first: dict[int, int] = {}  # offset of the first tensor of each file: rows come by file, then offset
    for file, offset in zip(checkpoint.file_ids, checkpoint.offsets, strict=True):
        first.setdefault(file, offset)
    found = {}
    for row, name in enumerate(checkpoint.names):
        file = checkpoint.file_ids[row]
        start = checkpoint.offsets[row] - first[file]
        data = buffers[checkpoint.files[file]][start : start + checkpoint.nbytes[row]]
        found[name] = data.view(torch.bfloat16).view(checkpoint.shapes[row])
    made = {}
    for name, shape in grouped_shapes(directory).items():
        made[name] = torch.empty(shape, dtype=torch.bfloat16)
        for part, view in per_expert(name, made[name]).items():
            view.copy_(found[part])
    return made


def advise_huge_pages(tensor: Tensor) -> None:
    if tensor.nbytes >= 4 << 20:
        system.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def run(shape: Shape, methods: list[str], repetitions: int, threads: int, directory: str | None) -> dict[str, Any]:
    """All runs, and the bytes of the files.

    Raises:
        RuntimeError: the digests of two methods differ, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-loading-", dir=directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        show(f"  writing {shape.name} to {big}", err=True)
        write_checkpoint(shape, big)
        write_checkpoint(SMALL, warm_up)
        commands = {
            method: ["-m", "benchmarks.loading", "--worker", method, big, warm_up, str(threads)] for method in methods
        }
        runs = measure.run_interleaved(commands, repetitions, lambda: measure.read_through(big))
        file_bytes = sum(path.stat().st_size for path in Path(big).glob("*.safetensors"))
    for transposed in (False, True):
        found = {m: runs[m][0]["digest"] for m in methods if METHODS[m][1] == transposed}
        if len(set(found.values())) > 1:
            raise RuntimeError(f"the methods do not make the same tensors: {found}")
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": file_bytes,
        "threads": threads,
        "runs": runs,
    }


def table(result: Mapping[str, Any]) -> Table:
    file_bytes, runs = result["file_bytes"], result["runs"]
    shown = Table(
        title=f"{result['shape']}: {file_bytes / 1e9:.2f} GB of files, {result['threads']} threads, "
        f"warm page cache, {len(next(iter(runs.values())))} runs each: median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("method")
    for title in (
        "seconds",
        "s of CPU",
        "GB/s",
        "ours is",
        "of the roof",
        "anonymous GB",
        "- files, MiB",
        "resident GB",
    ):
        shown.add_column(title, justify="right")
    seconds = {m: statistics.median(run["seconds"] for run in found) for m, found in runs.items()}
    for transposed in (False, True):
        ours = seconds.get("ours, transposed" if transposed else "ours")
        for method, found in runs.items():
            if METHODS[method][1] != transposed:
                continue
            anonymous = max(run["anonymous_bytes"] or 0 for run in found)
            resident = max(run["resident_bytes"] or 0 for run in found)
            shown.add_row(
                method,
                measure.spread([run["seconds"] for run in found]).text(),
                f"{statistics.median(run['cpu_seconds'] for run in found):.2f}",
                f"{file_bytes / 1e9 / seconds[method]:.2f}",
                f"{seconds[method] / ours:.2f}x" if ours else "",
                f"{seconds['roof'] / seconds[method]:.2f}" if "roof" in seconds else "",
                f"{anonymous / 1e9:.2f} ({anonymous / file_bytes:.2f}x)",
                f"{(anonymous - file_bytes) / 2**20:+.0f}",
                f"{resident / 1e9:.2f} ({resident / file_bytes:.2f}x)",
            )
        shown.add_section()
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--directory", help="where a temporary directory is made; it needs the size of the files")
    parser.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--repetition", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        method, directory, warm_up, threads = options.worker
        result = work(method, directory, warm_up, int(threads), options.repetition)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    environment = measure.environment()
    shape = SMALL if options.size == "small" else qwen3_30b(options.layers)
    methods = options.method or list(METHODS)
    result = run(shape, methods, options.repetitions, options.threads, options.directory)
    show_environment(environment)
    show(table(result))
    measure.write_json(options.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
