"""What bounds a load: bytes from the host to the device, and from the page cache to pinned memory; and compilation."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu.timing import median_seconds, seconds
from benchmarks.operations import OPERATIONS, Experts

_RUN_BYTES = 16 << 20
_REPETITIONS = 5


def host_to_device_gb_per_s(nbytes: int, device: torch.device) -> float:
    """``copy_`` from one pinned buffer."""
    host = _pinned(nbytes, device)
    host.view(torch.int64).random_(-(2**63), None)
    on_device = torch.empty_like(host, device=device)
    return nbytes / median_seconds(lambda: on_device.copy_(host, non_blocking=True), device, _REPETITIONS) / 1e9


def preadv_gb_per_s(directory: str, most_bytes: int, threads: int, device: torch.device) -> float:
    """Files of a directory, in the page cache, into one pinned buffer: ``threads`` take runs of 16 MiB in turn."""
    runs: list[tuple[int, int, int]] = []  # descriptor, offset, bytes
    for path in sorted(Path(directory).glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        runs += [(descriptor, at, min(_RUN_BYTES, size - at)) for at in range(0, size, _RUN_BYTES)]
    runs = runs[: max(1, most_bytes // _RUN_BYTES)]
    nbytes = sum(run[2] for run in runs)
    view = memoryview(_pinned(nbytes, device).numpy())
    jobs = []
    at = 0
    for descriptor, offset, length in runs:
        jobs.append((descriptor, offset, view[at : at + length]))
        at += length
    with ThreadPoolExecutor(threads) as pool:
        taken = median_seconds(lambda: list(pool.map(lambda job: measure.read_into(*job), jobs)), device, _REPETITIONS)
    for descriptor in {run[0] for run in runs}:
        os.close(descriptor)
    return nbytes / taken / 1e9


def cold_compilation(timeout_s: float) -> dict[str, Any]:
    """Seconds of the first call of one transpose in a new process with an empty cache, and of the second."""
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-cache-") as cache:
        return measure.run_worker(["-m", "benchmarks.gpu.transfers", cache], 0, timeout_s)


def _first_calls(cache: str) -> dict[str, float]:
    os.environ["TRITON_CACHE_DIR"] = cache
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = OPERATIONS["transpose down"](Experts("", 2, 24, 48), torch.bfloat16, torch.bfloat16, device)
    return {"first_call_s": seconds(case.kernel, device), "second_call_s": seconds(case.kernel, device)}


def _pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_first_calls(sys.argv[1])) + "\n")
