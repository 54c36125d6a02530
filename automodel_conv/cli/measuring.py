"""Measure a load fairly: record its peak memory, and touch memory beforehand."""

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
# Short against any phase of a load worth seeing, long against the 50 us that one look takes.
_INTERVAL_SECONDS = 0.003


def ready_memory(nbytes: int) -> None:
    """Touch memory and give it back, so that who comes next finds it at the machine's own speed.

    A virtual machine may have given its free memory back to the host; the first touch then costs
    many times the reading of the same bytes, for whoever happens to come first.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    page_calls.advise_huge_pages(memory.data_ptr(), nbytes)
    memory[:: mmap.PAGESIZE] = 1


class PeakMemory:
    """``with PeakMemory() as peak: ...``; then ``peak.anonymous_bytes``, ``mapped_bytes``, ``resident_bytes``.

    Anonymous memory is what the process allocated; resident memory has mapped files besides, such as the pages of a
    checkpoint that is read through mmap. Mapped are the pages of files that came into memory in all, also those that
    left it again. A thread looks at them every 3 ms, so a shorter spike of the first and the last can be missed; the
    kernel keeps the resident peak itself. All stay None where there is no /proc (off Linux).
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
                clear.write("5")  # VmHWM starts anew, see proc(5)
            anonymous, self._mapped, resident = _now()
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
        self._look()
        anonymous, resident = self._peak
        high_water = _kib("VmHWM")
        if high_water > self._high_water:  # reached within the block, so it belongs to it
            resident = max(resident, high_water)
        self.anonymous_bytes = (anonymous - self._start[0]) * 1024
        self.mapped_bytes = self._rises * 1024
        self.resident_bytes = (resident - self._start[1]) * 1024

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        anonymous, mapped, resident = _now()
        self._peak = max(self._peak[0], anonymous), max(self._peak[1], resident)
        self._rises += max(0, mapped - self._mapped)
        self._mapped = mapped


def _now() -> tuple[int, int, int]:
    """Anonymous, mapped and resident memory in KiB."""
    return _kib("RssAnon"), _kib("RssFile"), _kib("VmRSS")


def _kib(field: str) -> int:
    with open(_STATUS, encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1])
