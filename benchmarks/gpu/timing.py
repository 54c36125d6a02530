"""Times of work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.operations import synchronize


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Return the median of many runs, each after a flush of the L2 cache; without a GPU, the time of one run."""
    if device.type == "cuda":
        # A late import: nothing may import triton before the smoke test has turned its interpreter on.
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))  # type: ignore[arg-type]
    return 1e3 * seconds(run, device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time of one run, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    return statistics.median(seconds(run, device) for _ in range(repetitions))


def pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return page-locked memory of the host, or ordinary memory if there is no GPU."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def why_broken(device: torch.device) -> str | None:
    """Return the error of every further call on the device after a fault, or None if the device works."""
    try:
        synchronize(device)
    except RuntimeError as error:
        return str(error)
    return None
