"""Create the pages of new host memory just before threads write to them, in the faster page size.

Linux creates the pages of new memory when they are first written to. Here the thread that is about to write asks
for them first, a few MiB at a time (``MADV_POPULATE_WRITE``). 512 small pages cost less in one call than in 512 page
faults, and the time of a call shows which page size is faster (``page_policy``). Source: madvise(2).
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from automodel_conv.execution import page_calls
from automodel_conv.execution.buffers import span_bytes
from automodel_conv.execution.page_policy import PagePolicy, PageUse
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.planning.boxes import reach
from automodel_conv.schedule.jobs import Copies, Reads

# The size of a huge page on x86-64, and on arm64 with pages of 4 KiB.
BLOCK_BYTES = 2 << 20
# A smaller buffer may contain no whole aligned block.
_LEAST_BYTES = 2 * BLOCK_BYTES
# A loop over this many reads of a job is faster than numpy.
_FEW_READS = 32
# Blocks that one call populates at most.
_BLOCKS_PER_CALL = 4


class _Span:
    """The whole pages of a buffer, in blocks of ``BLOCK_BYTES``, with the set of blocks that threads have claimed.

    Attributes:
        address: address of the buffer's first byte.
        start: address of the first whole page.
        stop: address after the last whole page.
        first: number of the block at ``start``, counted from address 0. Methods count blocks from this one.
        claimed: one byte for each block: 1 if a thread populates it or has done so.
        advised: the last page size asked for, or None.
    """

    def __init__(self, address: int, nbytes: int):
        self.start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        self.stop = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self._outer_start = address // mmap.PAGESIZE * mmap.PAGESIZE
        self._outer_stop = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.address = address
        self.first = self.start // BLOCK_BYTES
        self.claimed = bytearray(-(-self.stop // BLOCK_BYTES) - self.first)
        self.advised: bool | None = None

    def blocks(self, start_bytes: int, stop_bytes: int) -> tuple[int, int]:
        """Return the first block that contains these bytes of the buffer, and the block after the last."""
        first = (self.address + start_bytes) // BLOCK_BYTES - self.first
        stop = (self.address + stop_bytes - 1) // BLOCK_BYTES - self.first + 1
        return max(first, 0), min(stop, len(self.claimed))

    def claim(self, first: int, stop: int) -> tuple[int, int]:
        """Claim the next unclaimed blocks in ``[first, stop)``, and return their range.

        One call claims at most ``_BLOCKS_PER_CALL`` whole blocks, or a single block that is not whole. The range is
        empty if all blocks are claimed.
        """
        first = self.claimed.find(0, first, stop)
        if first < 0:
            return stop, stop
        next_claimed = self.claimed.find(1, first, stop)
        limit = first + (_BLOCKS_PER_CALL if self.is_whole(first) else 1)
        stop = min(stop if next_claimed < 0 else next_claimed, limit)
        if stop - first > 1 and not self.is_whole(stop - 1):
            stop -= 1
        self.claimed[first:stop] = b"\1" * (stop - first)
        return first, stop

    def unclaim(self, first: int, stop: int) -> None:
        """Give blocks back that were claimed and not populated."""
        self.claimed[first:stop] = bytes(stop - first)

    def is_whole(self, block: int) -> bool:
        """Return whether the buffer covers all of a block, so that the block can be a huge page."""
        return self.pages_of(block, block + 1)[1] == BLOCK_BYTES

    def pages_of(self, first: int, stop: int) -> tuple[int, int]:
        """Return the address and the bytes of the whole pages in a range of blocks."""
        start = max(self.start, (self.first + first) * BLOCK_BYTES)
        return start, min(self.stop, (self.first + stop) * BLOCK_BYTES) - start

    def advise(self, huge: bool) -> None:
        """Advise the system to use one page size in the whole buffer, unless that was the last advice.

        This includes pages that the buffer covers only in part. Otherwise each of them would become a mapping of its
        own between two tensors, and a process may have only some 65,000 (vm.max_map_count).
        """
        if self.advised != huge:
            self.advised = huge
            page_calls.advise_huge_pages(self._outer_start, self._outer_stop - self._outer_start, huge)


class NewMemory:
    """The new memory in the host buffers of a load; all threads of the load share one object.

    Buffers below 4 MiB and memory that was written to before stay as they are. Systems other than Linux have no such
    calls, and nothing happens there. Before Linux 5.14 nothing can be measured, and the default is huge pages.

    Args:
        tensors: buffers by the target numbers of the jobs, with any strides.
        huge_pages: whether to ask for huge pages (True) or small pages (False). None measures which size is faster.
    """

    def __init__(self, tensors: Sequence[Tensor], huge_pages: bool | None = None):
        self._tensors = tensors  # keeps their memory alive
        self._spans = [_span_of(tensor) if page_calls.can_advise() else None for tensor in tensors]
        self._addresses = np.array([span.address if span else 0 for span in self._spans], np.int64)
        self._policy = PagePolicy(huge_pages)
        self._lock = threading.Lock()
        self._can_populate = True

    def populate_for(self, writes: Reads | Iterable[Copies]) -> None:
        """Populate the new memory that reads in place or copies write to."""
        if isinstance(writes, Reads):
            self._populate_reads(writes)
        else:
            for copies in writes:
                self._populate_copies(copies)

    def _populate_reads(self, reads: Reads) -> None:
        if len(reads.memory) > _FEW_READS:
            reads = reads.take(self._first_in_blocks(reads))
        columns = reads.memory.tolist(), reads.start_bytes.tolist(), reads.nbytes.tolist()
        for memory, start, nbytes in zip(*columns, strict=True):
            span = self._spans[memory]
            if span is not None:
                self._populate(span, start, start + nbytes)

    def _first_in_blocks(self, reads: Reads) -> np.ndarray:
        """Return the reads that suffice to populate all blocks: of the reads within one block, only the first."""
        start = self._addresses[reads.memory] + reads.start_bytes
        first, last = start // BLOCK_BYTES, (start + reads.nbytes - 1) // BLOCK_BYTES
        block = first * len(self._spans) + reads.memory  # unique for each block of each buffer
        _, needed = np.unique(np.where(first == last, block, -1 - np.arange(len(first))), return_index=True)
        return np.sort(needed)

    def _populate_copies(self, copies: Copies) -> None:
        span = self._spans[copies.target]
        if span is not None:
            size = self._tensors[copies.target].element_size()
            span_elements = 1 + reach(copies.box.shape, copies.box.target_strides)
            for offset in copies.target_offsets:
                self._populate(span, offset * size, (offset + span_elements) * size)

    def populate_all(self, threads: int) -> None:
        """Populate all buffers, in ``threads`` threads."""
        step = _BLOCKS_PER_CALL * BLOCK_BYTES
        ranges = [
            (span, start, min(start + step, span.stop - span.address))
            for span in self._spans
            if span is not None
            for start in range(0, span.stop - span.address, step)
        ]
        run_in_threads(ranges, threads, lambda: lambda byte_range: self._populate(*byte_range))

    def use(self) -> PageUse:
        """Return the pages populated so far, by size."""
        return self._policy.use()

    def _populate(self, span: _Span, start_bytes: int, stop_bytes: int) -> None:
        """Populate the blocks that contain these bytes of a buffer, except blocks that are claimed."""
        first, stop = span.blocks(start_bytes, stop_bytes)
        while span.claimed.find(0, first, stop) >= 0:
            with self._lock:
                first, after = span.claim(first, stop)
            if first < after:
                first = self._populate_claimed(span, first, after)

    def _populate_claimed(self, span: _Span, first: int, stop: int) -> int:
        """Populate claimed blocks, or only the first one as a trial; return the block after the last one populated."""
        address, nbytes = span.pages_of(first, stop)
        # A few pages may exist already: another job may have just written to the same block.
        if nbytes <= 0 or page_calls.resident_share(address, nbytes) > 0.5:
            return stop
        is_whole = span.is_whole(first)
        with self._lock:
            choice = self._policy.choose(BLOCK_BYTES, may_try=is_whole)
            if choice.is_trial:
                span.unclaim(first + 1, stop)
                stop = first + 1
                nbytes = BLOCK_BYTES
                page_calls.advise_huge_pages(address, nbytes, choice.huge)
            else:
                span.advise(choice.huge)
        seconds = self._timed_populate(address, nbytes) if self._can_populate else None
        with self._lock:
            if seconds is None:  # nothing can be measured any more
                self._can_populate = False
                self._policy.settle()
            self._policy.record(choice, nbytes, seconds if is_whole else None)
            if choice.is_trial and span.advised is not None:  # so that it is one mapping again
                page_calls.advise_huge_pages(address, nbytes, span.advised)
        return stop

    def _timed_populate(self, address: int, nbytes: int) -> float | None:
        """Populate pages, and return the seconds that this took; None if the system cannot populate them."""
        start = time.perf_counter()
        populated = page_calls.populate_pages(address, nbytes)
        return time.perf_counter() - start if populated else None


def _span_of(tensor: Tensor) -> _Span | None:
    """Return the span of a tensor; None if it is small, or if more than half of it is gaps that nothing writes to."""
    nbytes = span_bytes(tensor)
    return _Span(tensor.data_ptr(), nbytes) if _LEAST_BYTES <= nbytes <= 2 * tensor.nbytes else None
