"""New memory of a load's buffers, made just before bytes go there, with pages of the size that is made faster here.

The kernel makes the pages of new memory when they are first written to. Here it is asked for those of a few MiB at a
time (``MADV_POPULATE_WRITE``), by the thread that reads into them next: 512 small pages cost less in one call than in
512 page faults, and what it takes tells which size is faster (``page_policy``). Source: madvise(2).
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from automodel_conv.execution.buffers import reach, span_bytes
from automodel_conv.execution.jobs import SCRATCH, Job
from automodel_conv.execution.page_policy import PagePolicy, PageUse
from automodel_conv.execution.workers import work_off
from automodel_conv.files import system

# A huge page of x86-64, and of arm64 with pages of 4 KiB.
BLOCK_BYTES = 2 << 20
# Below two blocks there may be no whole aligned one inside.
_LEAST_BYTES = 2 * BLOCK_BYTES
# Made in one call where nothing is read in between.
_RUN_BLOCKS = 4


class _Span:
    """The whole pages of a buffer, in blocks; ``seen`` marks the blocks that are made, or were before."""

    def __init__(self, address: int, nbytes: int):
        self.start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        self.stop = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self.address = address
        self.first = self.start // BLOCK_BYTES
        self.seen = bytearray(-(-self.stop // BLOCK_BYTES) - self.first)
        self.advised: bool | None = None

    def unseen(self, start_bytes: int, stop_bytes: int) -> Iterator[tuple[int, int]]:
        """Mark the blocks under these bytes of the buffer; gives the runs of those that were not marked."""
        first = max((self.address + start_bytes) // BLOCK_BYTES - self.first, 0)
        stop = min((self.address + stop_bytes - 1) // BLOCK_BYTES - self.first + 1, len(self.seen))
        while (first := self.seen.find(0, first, stop)) >= 0:
            after = self.seen.find(1, first, stop)
            after = stop if after < 0 else after
            self.seen[first:after] = b"\1" * (after - first)
            yield first, after
            first = after

    def pages_of(self, first: int, stop: int) -> tuple[int, int]:
        """Address and bytes of the whole pages of some blocks."""
        start = max(self.start, (self.first + first) * BLOCK_BYTES)
        return start, min(self.stop, (self.first + stop) * BLOCK_BYTES) - start


class NewMemory:
    """The buffers of a load on the host, as far as they are new memory; all threads of the load use one.

    Buffers below 4 MiB, and memory that was written to before, are left as they are. So is everything where the system
    knows no such calls (off Linux); where it can only be advised (before Linux 5.14), huge pages are.

    Args:
        tensors: by the numbers of the jobs' targets; any strides.
        huge_pages: True and False ask for that size, None measures which one is faster.
    """

    def __init__(self, tensors: Sequence[Tensor], huge_pages: bool | None = None):
        self._tensors = tensors  # whose memory must not go meanwhile
        spans = [(tensor.data_ptr(), span_bytes(tensor)) for tensor in tensors]
        self._spans = [_Span(*span) if span[1] >= _LEAST_BYTES and system.knows_pages() else None for span in spans]
        self._policy = PagePolicy(huge_pages)
        self._without_measuring = huge_pages is not False
        self._lock = threading.Lock()
        self._can_make = True

    def make_for(self, job: Job) -> None:
        """Make the memory that a job writes to, as far as it is new."""
        spans = self._spans
        for _, _, nbytes, target, start, _ in job.parts:
            if target != SCRATCH and (span := spans[target]) is not None:
                self._make(span, start, start + nbytes)
        for move in job.moves:
            if (span := spans[move.target]) is not None:
                size = self._tensors[move.target].element_size()
                stop = move.target_offset + 1 + reach(move.shape, move.target_strides)
                self._make(span, move.target_offset * size, stop * size)

    def make_all(self, threads: int) -> None:
        """Make all of it, by some threads."""
        step = _RUN_BLOCKS * BLOCK_BYTES
        runs = [
            (span, start, min(start + step, span.stop - span.address))
            for span in self._spans
            if span is not None
            for start in range(0, span.stop - span.address, step)
        ]
        work_off(runs, threads, lambda: lambda run: self._make(*run))

    def use(self) -> PageUse:
        """The pages made so far."""
        return self._policy.use()

    def _make(self, span: _Span, start_bytes: int, stop_bytes: int) -> None:
        for first, stop in span.unseen(start_bytes, stop_bytes):
            while first < stop:
                first += self._make_some(span, first, stop)

    def _make_some(self, span: _Span, first: int, stop: int) -> int:
        """Make the memory of some blocks; returns how many of them are done."""
        address, nbytes = span.pages_of(first, stop)
        # A few pages may be there: another job has just written to the same block.
        if nbytes <= 0 or system.resident_share(address, nbytes) > 0.5:
            return stop - first
        with self._lock:
            choice = self._policy.choose(min(nbytes, BLOCK_BYTES))
            if choice.is_try:
                stop = first + 1
                address, nbytes = span.pages_of(first, stop)
                system.advise_huge_pages(address, nbytes, choice.huge)
            elif span.advised != choice.huge:
                span.advised = choice.huge
                system.advise_huge_pages(span.start, span.stop - span.start, choice.huge)
        if not self._can_make:
            return stop - first
        begin = time.perf_counter()
        self._can_make = system.make_pages(address, nbytes)
        seconds = time.perf_counter() - begin
        with self._lock:
            if self._can_make:
                self._policy.tell(choice, nbytes, seconds)
            else:  # nothing can be measured here
                self._policy = PagePolicy(self._without_measuring)
        return stop - first
