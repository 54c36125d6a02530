"""Fair measurements of loads: record the peak memory of a load, and touch memory before it."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from contextlib import suppress
from types import TracebackType

import torch

from automodel_conv.execution import page_calls

_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"
# Short compared with any phase of a load that matters, long compared with the 50 us that one sample takes.
_INTERVAL_SECONDS = 0.003


def ready_memory(nbytes: int) -> None:
    """Touch memory and free it, so that the next allocation runs at the machine's own speed.

    A virtual machine may have returned its free memory to the host. The first touch then costs many times as much as
    reading the same bytes, and the measurement that happens to be first would pay for it.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    page_calls.advise_huge_pages(memory.data_ptr(), nbytes)
    memory[:: mmap.PAGESIZE] = 1


class PeakMemory:
    """A context manager that records how far memory rose above its level at the start.

    Anonymous memory is what the process allocated. Resident memory also counts mapped files, such as the pages of a
    checkpoint that is read through mmap. A thread samples them every 3 ms, so it can miss a shorter spike of anonymous
    or mapped memory; the kernel itself keeps the resident peak.

    Attributes:
        anonymous_bytes: peak of anonymous memory; like the others, None without /proc (not on Linux).
        mapped_bytes: total size of the file pages that entered memory, including pages that have left it since.
        resident_bytes: peak of resident memory.

    Example:
        >>> with PeakMemory() as peak:
        ...     data = bytes(2**20)
        >>> peak.resident_bytes is None or peak.resident_bytes >= 0
        True
    """

    def __init__(self) -> None:
        self.anonymous_bytes: int | None = None
        self.mapped_bytes: int | None = None
        self.resident_bytes: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if os.path.exists(_STATUS):
            gc.collect()
            with suppress(OSError), open(_CLEAR_REFS, "w") as clear:
                clear.write("5")  # resets VmHWM, see proc(5)
            anonymous, self._mapped, resident = _memory_kib()
            self._start = self._peak = anonymous, resident
            self._rises = 0
            self._high_water = _kib("VmHWM")
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        self._sample()
        anonymous, resident = self._peak
        high_water = _kib("VmHWM")
        if high_water > self._high_water:  # the peak was inside the block
            resident = max(resident, high_water)
        self.anonymous_bytes = (anonymous - self._start[0]) * 1024
        self.mapped_bytes = self._rises * 1024
        self.resident_bytes = (resident - self._start[1]) * 1024

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        anonymous, mapped, resident = _memory_kib()
        self._peak = max(self._peak[0], anonymous), max(self._peak[1], resident)
        self._rises += max(0, mapped - self._mapped)
        self._mapped = mapped


def _memory_kib() -> tuple[int, int, int]:
    """Return the current anonymous, mapped and resident memory in KiB."""
    return _kib("RssAnon"), _kib("RssFile"), _kib("VmRSS")


def _kib(field: str) -> int:
    with open(_STATUS, encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1])
