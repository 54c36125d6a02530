"""How long work on a device takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.operations import synchronize


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """The median of many runs, each after the second-level cache was flushed; without a GPU, the time of one run."""
    if device.type == "cuda":
        # Not at the top: nothing may import triton before the smoke test has turned its interpreter on.
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))  # type: ignore[arg-type]
    return 1e3 * seconds(run, device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one run, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    return statistics.median(seconds(run, device) for _ in range(repetitions))


def pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    """Page-locked memory of the host; where there is no GPU, any."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def why_broken(device: torch.device) -> str | None:
    """The error of every further call on the device, if an earlier one was a fault; None if it is sound."""
    try:
        synchronize(device)
    except RuntimeError as error:
        return str(error)
    return None
