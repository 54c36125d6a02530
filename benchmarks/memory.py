"""Free memory at the start of a load: the two states that all benchmarks use, and measurements of it.

ready       The process touches memory of three times the size of the files and frees it, last before the timing.
            The load then finds memory at the machine's own speed.
as-found    Nothing is touched beforehand, as in a user's process. The driver waits half a minute before each run. In
            that time a virtual machine may return its free memory to its host, which must then map and clear it again.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from automodel_conv.cli.measuring import ready_memory

READY, AS_FOUND = "ready", "as-found"
MEMORY: Mapping[str, str] = {READY: "memory made ready", AS_FOUND: "memory as found"}
"""The states and their names in tables."""

# Linux reports a sixteenth of each list of free blocks to the host every 2 s, all of them "in about 30 seconds"
# (``mm/page_reporting.c``, PAGE_REPORTING_DELAY, page_reporting_cycle). After 3 s here, 1.3 of 3 GB were still fast.
RETURN_SECONDS = 30.0
_HUGE_BYTES = 2 << 20
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15


def prepare(memory: str, nbytes: int) -> None:
    """Bring free memory into a state.

    Call this last before the timing, in the process that loads.

    Args:
        nbytes: size of the files.
    """
    if memory == READY:
        ready_memory(3 * nbytes)


def wait(memory: str) -> None:
    """Wait before a process that loads, in its parent."""
    if memory == AS_FOUND:
        time.sleep(RETURN_SECONDS)


def free() -> dict[str, int | None]:
    """Return the bytes of free memory, without the page cache, and those of them in blocks of 2 MiB or more.

    Both are None off Linux.
    """
    try:
        lines = Path("/proc/buddyinfo").read_text().splitlines()
    except OSError:
        return {"free_bytes": None, "free_huge_bytes": None}
    blocks = [
        (int(count), mmap.PAGESIZE << order)
        for line in lines
        for order, count in enumerate(line.split("zone")[1].split()[1:])
    ]
    return {
        "free_bytes": sum(count * size for count, size in blocks),
        "free_huge_bytes": sum(count * size for count, size in blocks if size >= _HUGE_BYTES),
    }


def total_bytes() -> int | None:
    """Return the bytes of the machine's memory, or None off Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))


def touch_speeds(nbytes: int = 512 << 20, rounds: int = 3, seconds: float = RETURN_SECONDS) -> dict[str, float]:
    """Return GB/s of the first touch of memory freed just now, and of memory freed half a minute ago.

    If the second is much slower, free memory goes back to a host in between.
    """
    speeds: dict[str, list[float]] = {"freed_just_now": [], "freed_long_ago": []}
    for _ in range(rounds):
        for name, pause in (("freed_just_now", 0.0), ("freed_long_ago", seconds)):
            ready_memory(3 * nbytes)
            time.sleep(pause)
            speeds[name].append(nbytes / 1e9 / _touch(nbytes))
    return {name: statistics.median(values) for name, values in speeds.items()}


def goes_back(speeds: Mapping[str, float]) -> bool:
    """Whether ``touch_speeds`` shows that free memory goes back to the host."""
    return speeds["freed_long_ago"] < speeds["freed_just_now"] / 2


def pages(address: int, nbytes: int) -> tuple[int, int]:
    """Return the start and the end of the whole pages in ``[address, address + nbytes)``."""
    return -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE


def advise(address: int, nbytes: int, huge: bool) -> None:
    """Advise huge pages, or only small ones, for the whole pages of ``[address, address + nbytes)``."""
    start, stop = pages(address, nbytes)
    if stop > start:
        _madvise()(start, stop - start, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)


def _touch(nbytes: int) -> float:
    """Touch new memory and return the seconds."""
    memory = numpy.empty(nbytes, numpy.uint8)
    advise(memory.ctypes.data, nbytes, huge=True)
    start = time.perf_counter()
    memory[:: mmap.PAGESIZE] = 1
    return time.perf_counter() - start


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
