"""What executors count: bytes, memory, threads, and copies by kernels or by torch."""

from __future__ import annotations

from typing import NamedTuple

from automodel_conv.execution.page_policy import PageUse


class Work(NamedTuple):
    """How many copies kernels made, and how many torch made one by one."""

    by_kernels: int
    by_torch: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.by_kernels + other.by_kernels, self.by_torch + other.by_torch)


class LoadStats(NamedTuple):
    """What a load did; ``gap_bytes``, read between wanted bytes, come on top of ``bytes_read``."""

    bytes_read: int
    gap_bytes: int
    scratch_bytes: int  # of host memory
    device_scratch_bytes: int = 0
    work: Work = Work(0, 0)  # copies on a device
    without_kernels: str | None = None  # why none of them could be a kernel's
    threads: int = 0  # the most that read at the same time
    pages: PageUse = PageUse()  # of new host memory
