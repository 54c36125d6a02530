"""Measure the bounds of a load: host to device, page cache to pinned memory, pinning, compilation.

python -m benchmarks.gpu.transfers    (a worker; a cell is one of these, at one size or number of threads)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu import checkpoints
from benchmarks.gpu.kernels import a_cell
from benchmarks.gpu.timing import median_seconds, pinned, seconds
from benchmarks.gpu.worker import Channel, serve
from benchmarks.operations import OPERATIONS, Experts

_MIB = 1 << 20
_RUN_BYTES = 16 * _MIB
_REPETITIONS = 5
CHUNKS_MIB = (2, 4, 8, 16)
THREADS = (4, 8, 16)
PINNED_MIB = (64, 128, 256)
COLD = "first call of a kernel"
READS = {f"preadv, {threads} threads": threads for threads in THREADS}


def host_to_device(chunk_bytes: int, nbytes: int, device: torch.device) -> dict[str, Any]:
    """Copy chunks with ``copy_``, one after another, from one pinned buffer."""
    host = pinned(nbytes, device)
    host.fill_(7)  # the bus does not compress
    on_device = torch.empty_like(host, device=device)
    pairs = list(zip(on_device.split(chunk_bytes), host.split(chunk_bytes), strict=True))

    def run() -> None:
        for dst, src in pairs:
            dst.copy_(src, non_blocking=True)

    run()
    return {"gb_per_s": nbytes / median_seconds(run, device, _REPETITIONS) / 1e9, "nbytes": nbytes}


def preadv(threads: int, directory: str, most_bytes: int, device: torch.device) -> dict[str, Any]:
    """Read files of a directory, in the page cache, into one pinned buffer, with ``threads`` in runs of 16 MiB."""
    with _runs(directory, most_bytes) as runs:
        nbytes = sum(run[2] for run in runs)
        view = memoryview(pinned(nbytes, device).numpy())
        jobs, at = [], 0
        for descriptor, offset, length in runs:
            jobs.append((descriptor, offset, view[at : at + length]))
            at += length
        with ThreadPoolExecutor(threads) as pool:

            def run() -> None:
                list(pool.map(lambda job: measure.read_into(*job), jobs))

            run()
            return {"gb_per_s": nbytes / median_seconds(run, device, _REPETITIONS) / 1e9, "nbytes": nbytes}


@contextmanager
def _runs(directory: str, most_bytes: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield descriptor, offset and bytes."""
    runs: list[tuple[int, int, int]] = []
    for path in sorted(Path(directory).glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        runs += [(descriptor, at, min(_RUN_BYTES, size - at)) for at in range(0, size, _RUN_BYTES)]
    try:
        yield runs[: max(1, most_bytes // _RUN_BYTES)]
    finally:
        for descriptor in {run[0] for run in runs}:
            os.close(descriptor)


def pinning(nbytes: int, device: torch.device) -> dict[str, Any]:
    """Return the seconds to pin memory, and the seconds to pin it again after it was freed."""
    torch.empty(1, device=device)  # creates the device's context
    first = seconds(lambda: pinned(nbytes, device), device)
    return {"first_s": first, "again_s": seconds(lambda: pinned(nbytes, device), device), "nbytes": nbytes}


def cold_compilation(root: str, device: torch.device) -> dict[str, Any]:
    """Return the seconds of a transpose's first call with an empty cache, and of the second, in a new process."""
    with tempfile.TemporaryDirectory(dir=root) as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        case = OPERATIONS["transpose down"](Experts("", 2, 24, 48), torch.bfloat16, torch.bfloat16, device)
        first = seconds(case.kernel, device)
        return {"first_s": first, "again_s": seconds(case.kernel, device)}


def cells(root: str, smoke: bool, device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return all transfers by name: first the one that needs a new process, last ``READS``, which need a checkpoint."""
    directory = os.path.join(root, checkpoints.SHORT)
    unit, most = (1 << 12, 1 << 20) if smoke else (_MIB, 1 << 30)
    made: dict[str, Callable[[], dict[str, Any]]] = {COLD: partial(cold_compilation, root, device)}
    made |= {f"pin {mib} MiB": partial(pinning, mib * unit, device) for mib in PINNED_MIB}
    chunks = {f"to the device, {mib} MiB chunks": mib * unit for mib in CHUNKS_MIB}
    made |= {name: partial(host_to_device, nbytes, most, device) for name, nbytes in chunks.items()}
    made["to the device, at once"] = partial(host_to_device, most, most, device)
    return made | {name: partial(preadv, n, directory, most, device) for name, n in READS.items()}


def work(order: Mapping[str, Any], channel: Channel) -> None:
    device = torch.device(order["device"])
    known = cells(order["root"], order["smoke"], device)
    for cell in order["cells"]:
        channel.begin(cell)
        with a_cell(cell, device, channel):
            channel.row(cell, **known[cell]())


if __name__ == "__main__":
    serve(work)
