"""New memory of a load's buffers, made just before bytes go there, with pages of the size that is made faster here.

The kernel makes the pages of new memory when they are first written to. Here it is asked for those of a few MiB at a
time (``MADV_POPULATE_WRITE``), by the thread that reads into them next: 512 small pages cost less in one call than in
512 page faults, and what it takes tells which size is faster (``page_policy``). Source: madvise(2).
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from automodel_conv.execution import page_calls
from automodel_conv.execution.buffers import span_bytes
from automodel_conv.execution.page_policy import PagePolicy, PageUse
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.planning.boxes import reach
from automodel_conv.schedule.jobs import Copies, Job, ReadInPlace, Reads

# A huge page of x86-64, and of arm64 with pages of 4 KiB.
BLOCK_BYTES = 2 << 20
# Below two blocks there may be no whole aligned one inside.
_LEAST_BYTES = 2 * BLOCK_BYTES
# Made in one call where nothing is read in between.
_FEW_READS = 32  # of a job: a loop over so many is faster than numpy
_RUN_BLOCKS = 4


class _Span:
    """The whole pages of a buffer, in blocks; ``seen`` marks the blocks that are made, or were before."""

    def __init__(self, address: int, nbytes: int):
        self.start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        self.stop = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self._outer_start = address // mmap.PAGESIZE * mmap.PAGESIZE
        self._outer_stop = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.address = address
        self.first = self.start // BLOCK_BYTES
        self.seen = bytearray(-(-self.stop // BLOCK_BYTES) - self.first)
        self.advised: bool | None = None

    def blocks(self, start_bytes: int, stop_bytes: int) -> tuple[int, int]:
        """The first block under these bytes of the buffer, and the one after the last."""
        first = (self.address + start_bytes) // BLOCK_BYTES - self.first
        stop = (self.address + stop_bytes - 1) // BLOCK_BYTES - self.first + 1
        return max(first, 0), min(stop, len(self.seen))

    def mark(self, first: int, stop: int) -> tuple[int, int]:
        """Mark the next blocks that are not, at most ``_RUN_BLOCKS``; a block that is not whole comes alone."""
        first = self.seen.find(0, first, stop)
        if first < 0:
            return stop, stop
        after = self.seen.find(1, first, stop)
        stop = min(stop if after < 0 else after, first + (_RUN_BLOCKS if self.is_whole(first) else 1))
        if stop - first > 1 and not self.is_whole(stop - 1):
            stop -= 1
        self.seen[first:stop] = b"\1" * (stop - first)
        return first, stop

    def unmark(self, first: int, stop: int) -> None:
        self.seen[first:stop] = bytes(stop - first)

    def is_whole(self, block: int) -> bool:
        """Whether all of a block is the buffer's, so that it can be a huge page."""
        return self.pages_of(block, block + 1)[1] == BLOCK_BYTES

    def pages_of(self, first: int, stop: int) -> tuple[int, int]:
        """Address and bytes of the whole pages of some blocks."""
        start = max(self.start, (self.first + first) * BLOCK_BYTES)
        return start, min(self.stop, (self.first + stop) * BLOCK_BYTES) - start

    def advise(self, huge: bool) -> None:
        """Ask for pages of one size, unless they are asked for already.

        Pages that are the buffer's in part are asked for too. Else each would be a mapping of its own between tensors,
        and a process may have some 65,000 (vm.max_map_count).
        """
        if self.advised != huge:
            self.advised = huge
            page_calls.advise_huge_pages(self._outer_start, self._outer_stop - self._outer_start, huge)


class NewMemory:
    """The buffers of a load on the host, as far as they are new memory; all threads of the load use one.

    Buffers below 4 MiB, and memory that was written to before, are left as they are. So is everything where the system
    knows no such calls (off Linux). Before Linux 5.14 nothing can be measured, and huge pages are asked for.

    Args:
        tensors: by the numbers of the jobs' targets; any strides.
        huge_pages: True and False ask for that size, None measures which one is faster.
    """

    def __init__(self, tensors: Sequence[Tensor], huge_pages: bool | None = None):
        self._tensors = tensors  # whose memory must not go meanwhile
        self._spans = [_span_of(tensor) if page_calls.can_advise() else None for tensor in tensors]
        self._addresses = np.array([span.address if span else 0 for span in self._spans], np.int64)
        self._policy = PagePolicy(huge_pages)
        self._lock = threading.Lock()
        self._can_make = True

    def populate_for(self, job: Job) -> None:
        """Make the memory that a job writes to, as far as it is new."""
        if isinstance(job, ReadInPlace):
            self._make_for_reads(job.reads)
        else:
            for copies in job.copies:
                self._make_for_copies(copies)

    def _make_for_reads(self, reads: Reads) -> None:
        """Make the memory that reads fill."""
        if len(reads.memory) > _FEW_READS:
            reads = reads.take(self._first_in_blocks(reads))
        columns = reads.memory.tolist(), reads.start_bytes.tolist(), reads.nbytes.tolist()
        for memory, start, nbytes in zip(*columns, strict=True):
            span = self._spans[memory]
            if span is not None:
                self._make(span, start, start + nbytes)

    def _first_in_blocks(self, reads: Reads) -> np.ndarray:
        """Which reads make all blocks: of those that lie in one block of a buffer, the first makes it."""
        start = self._addresses[reads.memory] + reads.start_bytes
        first, last = start // BLOCK_BYTES, (start + reads.nbytes - 1) // BLOCK_BYTES
        block = first * len(self._spans) + reads.memory
        _, needed = np.unique(np.where(first == last, block, -1 - np.arange(len(first))), return_index=True)
        return np.sort(needed)

    def _make_for_copies(self, copies: Copies) -> None:
        span = self._spans[copies.target]
        if span is not None:
            size = self._tensors[copies.target].element_size()
            span_elements = 1 + reach(copies.box.shape, copies.box.target_strides)
            for offset in copies.target_offsets:
                self._make(span, offset * size, (offset + span_elements) * size)

    def populate_all(self, threads: int) -> None:
        """Make all of it, by some threads."""
        step = _RUN_BLOCKS * BLOCK_BYTES
        runs = [
            (span, start, min(start + step, span.stop - span.address))
            for span in self._spans
            if span is not None
            for start in range(0, span.stop - span.address, step)
        ]
        run_in_threads(runs, threads, lambda: lambda run: self._make(*run))

    def use(self) -> PageUse:
        """The pages made so far."""
        return self._policy.use()

    def _make(self, span: _Span, start_bytes: int, stop_bytes: int) -> None:
        first, stop = span.blocks(start_bytes, stop_bytes)
        while span.seen.find(0, first, stop) >= 0:
            with self._lock:
                first, after = span.mark(first, stop)
            if first < after:
                first = self._make_run(span, first, after)

    def _make_run(self, span: _Span, first: int, stop: int) -> int:
        """Make the memory of some blocks, or of the first one alone; returns the one after the last."""
        address, nbytes = span.pages_of(first, stop)
        # A few pages may be there: another job has just written to the same block.
        if nbytes <= 0 or page_calls.resident_share(address, nbytes) > 0.5:
            return stop
        is_whole = span.is_whole(first)
        with self._lock:
            choice = self._policy.choose(BLOCK_BYTES, may_try=is_whole)
            if choice.is_trial:
                span.unmark(first + 1, stop)
                stop = first + 1
                nbytes = BLOCK_BYTES
                page_calls.advise_huge_pages(address, nbytes, choice.huge)
            else:
                span.advise(choice.huge)
        seconds = self._seconds_to_make(address, nbytes) if self._can_make else None
        with self._lock:
            if seconds is None:  # nothing can be measured any more
                self._can_make = False
                self._policy.settle()
            self._policy.record(choice, nbytes, seconds if is_whole else None)
            if choice.is_trial and span.advised is not None:  # one mapping again
                page_calls.advise_huge_pages(address, nbytes, span.advised)
        return stop

    def _seconds_to_make(self, address: int, nbytes: int) -> float | None:
        """None if the system cannot make them."""
        begin = time.perf_counter()
        made = page_calls.populate_pages(address, nbytes)
        return time.perf_counter() - begin if made else None


def _span_of(tensor: Tensor) -> _Span | None:
    """None for a small tensor, and for one with gaps that nobody writes to."""
    nbytes = span_bytes(tensor)
    return _Span(tensor.data_ptr(), nbytes) if _LEAST_BYTES <= nbytes <= 2 * tensor.nbytes else None
