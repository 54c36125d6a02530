"""Statistics that executors report: bytes, memory, threads, and copies by kernels or by torch."""

from __future__ import annotations

from typing import NamedTuple

from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.timeline import Spans


class CopyCounts(NamedTuple):
    """Numbers of copies that kernels and torch executed."""

    by_kernels: int
    """Copies that Triton kernels executed."""
    by_torch: int
    """Copies that torch executed one by one."""

    def __add__(self, other: CopyCounts) -> CopyCounts:  # type: ignore[override]
        return CopyCounts(self.by_kernels + other.by_kernels, self.by_torch + other.by_torch)


class LoadStats(NamedTuple):
    """Statistics of one load."""

    bytes_read: int
    """Bytes of tensor data that were read, without ``gap_bytes``."""
    gap_bytes: int
    """Bytes between wanted bytes that were read in the same call and thrown away."""
    scratch_bytes: int
    """Bytes of scratch in host memory: an upper bound."""
    device_scratch_bytes: int = 0
    """Bytes of scratch on the device."""
    counts: CopyCounts = CopyCounts(0, 0)
    """Copies on a device."""
    without_kernels: str | None = None
    """The reason why no kernel could run. None if one could, if no bytes had to change, and for loads to the host."""
    threads: int = 0
    """The largest number of threads that read at the same time."""
    pages: PageUse = PageUse()
    """New host memory by page size."""
    spans: Spans = Spans()
    """What each thread did, and when."""
