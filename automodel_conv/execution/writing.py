"""From tensors or files to files: slabs made by several threads with bounded scratch, and written where they belong.

What makes the bytes of a slab is a ``Maker``, one a thread: from host tensors, from a device's, or from other files.
What is done with them, written to a file or compared with one, is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import byte_view, dtype_of, raw_bytes
from automodel_conv.execution.copy_batch import CopyBatch, takes_kernels
from automodel_conv.execution.copying import COPY_BYTES, COPY_RATIO, copy_equal
from automodel_conv.execution.cores import cores
from automodel_conv.execution.host_decoding import decode_codes
from automodel_conv.execution.protocols import Device
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.full_io import write_exactly
from automodel_conv.files.shards import Shard
from automodel_conv.files.source import ByteSource, OpenSource, opened
from automodel_conv.files.write_errors import write_errors
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.host import jobs_through_scratch, runs
from automodel_conv.schedule.jobs import Copies, Job, Move, ReadInPlace, Reads, align_down
from automodel_conv.schedule.writes import Slab, filled_ranges

LEAST_SCRATCH_BYTES = 1 << 16

_MOST_THREADS = 16
# Of a source that is permuted: as much as stays in the cache between the read and the copy.
_INPUT_BYTES = 8 << 20
# Of a file that is compared.
_WINDOW_BYTES = 1 << 20


class Maker(Protocol):
    """Makes the bytes of slabs, in one thread."""

    def __call__(self, slab: Slab) -> list[memoryview]:
        """All bytes of a slab in their order; they hold until the next call."""
        ...

    def copy_within_kernel(self, slab: Slab, fd: int) -> bool:
        """Write the slab to its place in ``fd`` if its bytes need not be seen; whether that was done."""
        ...


class Budget(NamedTuple):
    """Scratch of a work, shared out among its threads; each slab is made in at most ``slab_bytes``."""

    threads: int
    slab_bytes: int
    input_bytes: int

    @property
    def scratch_bytes(self) -> int:
        copies = min(COPY_BYTES, COPY_RATIO * self.slab_bytes)
        return self.threads * (self.slab_bytes + self.input_bytes + copies)


def budget(threads: int | None, scratch_bytes: int, *, reads_files: bool) -> Budget:
    """Share out ``scratch_bytes``: for each thread a slab, what a copy allocates, and where files are read, an input.

    Raises:
        ConversionError: there is too little for one thread, or there are no threads.
    """
    threads = min(cores(), _MOST_THREADS) if threads is None else threads
    if threads < 1 or scratch_bytes < LEAST_SCRATCH_BYTES:
        raise ConversionError(
            message(
                "cannot write with these threads and scratch_bytes",
                expected=f"threads >= 1, scratch_bytes >= {LEAST_SCRATCH_BYTES}",
                found=f"threads={threads}, scratch_bytes={scratch_bytes}",
            )
        )
    threads = min(threads, scratch_bytes // LEAST_SCRATCH_BYTES)
    share = scratch_bytes // threads
    share = max(share - COPY_BYTES, share // (1 + COPY_RATIO))
    inputs = min(_INPUT_BYTES, share // 4) if reads_files else 0
    return Budget(threads, align_down(share - inputs), align_down(inputs))


def begin_shard(shard: Shard, path: str) -> None:
    """Make a file with its header and room for its data.

    Raises:
        WriteError: the system does not let us; a full disk is told here, where the file system can tell.
    """
    with write_errors(path, "a file", f"room for {shard.nbytes} bytes"):
        fd = system.create(path)
        try:
            system.reserve(fd, shard.nbytes)
            write_exactly(fd, [memoryview(shard.header)], 0, path)
        finally:
            system.close(fd)


def write_slabs(
    slabs: Sequence[tuple[Sequence[Slab], Callable[[], Maker]]],
    path: str,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Write data into a file that has been begun, and wait until the disk has it.

    Args:
        slabs: groups of slabs of this file, each with what starts a maker for it in a thread.

    Raises:
        WriteError: the system does not take the bytes.
        ReadError: a source cannot be read.
    """
    with write_errors(path, "a file"):
        fd = system.open_existing(path)
        try:
            for group, start in slabs:
                run_in_threads(group, threads, lambda start=start: _writer(start(), fd, path, advance))
            system.sync(fd)
        finally:
            system.close(fd)


def _writer(maker: Maker, fd: int, path: str, advance: Callable[[int], None]) -> Callable[[Slab], None]:
    def write(slab: Slab) -> None:
        if not maker.copy_within_kernel(slab, fd):
            made = maker(slab)
            if not slab.sparse_itemsize:
                write_exactly(fd, made, slab.offset_bytes, path)
            for first, nbytes in filled_ranges(slab) if slab.sparse_itemsize else ():
                write_exactly(fd, [made[0][first : first + nbytes]], slab.offset_bytes + first, path)
        system.begin_writeback(fd, slab.offset_bytes, slab.nbytes)
        advance(slab.nbytes)

    return write


def compare_slabs(
    slabs: Sequence[Slab], source: ByteSource, start: Callable[[], Maker], threads: int, advance: Callable[[int], None]
) -> int | None:
    """The first byte of a file, among those that ``slabs`` cover, that is not what they make; None if all are."""
    found: list[int] = []
    with opened(source) as file:
        run_in_threads(slabs, threads, lambda: _comparer(start(), file, found, advance))
    return min(found, default=None)


def _comparer(
    maker: Maker, file: OpenSource, found: list[int], advance: Callable[[int], None]
) -> Callable[[Slab], None]:
    window = np.empty(_WINDOW_BYTES, np.uint8)

    def compare(slab: Slab) -> None:
        at = slab.offset_bytes
        for made in maker(slab):
            for first in range(0, len(made), _WINDOW_BYTES):
                wanted = np.frombuffer(made[first : first + _WINDOW_BYTES], np.uint8)
                there = window[: wanted.size]
                file.read_into([there.data], at)
                if not np.array_equal(there, wanted):  # which is several times faster than torch.equal on bytes
                    found.append(at + int(np.argmax(there != wanted)))
                    return
                at += wanted.size
        advance(slab.nbytes)

    return compare


def _by_place(moves: Mapping[int, Sequence[Move]]) -> list[tuple[int, Copies]]:
    """Pairs of source row and copies, ordered by where they write: filling gaps one after the other is faster."""
    pairs = sorted(
        ((row, move) for row, group in moves.items() for move in group),
        key=lambda pair: (pair[1].target, pair[1].target_offset),
    )
    made: list[tuple[int, Copies]] = []
    for (row, target, dtype, box), run in groupby(pairs, lambda pair: (pair[0], *pair[1].group_key)):
        places = [(move.source_offset, move.target_offset) for _, move in run]
        made.append((row, Copies(target, dtype, box, *map(list, zip(*places, strict=True)))))
    return made


class _Memory:
    """Scratch of a thread, also as elements of each dtype that moves write."""

    def __init__(self, memory: Tensor, dtypes: Sequence[str]):
        self.memory = memory
        self.typed = [memory.view(dtype_of(dtype, "a target")) for dtype in dtypes]


def _scratch(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class HostTensors:
    """Makes slabs of tensors in host memory; bytes that only move are written from where they lie."""

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[str], slab_bytes: int):
        self._tensors = tensors
        self._views: dict[int, memoryview] = {}
        self._slab = _Memory(_scratch(slab_bytes), dtypes)
        self._view = byte_view(self._slab.memory)

    def __call__(self, slab: Slab) -> list[memoryview]:
        if slab.reads:
            return [self._bytes(file)[start : start + nbytes] for file, start, nbytes, *_ in slab.reads]
        batches = _by_place(slab.moves)
        copy_equal((copies, self._tensors[row], self._slab.typed[copies.target]) for row, copies in batches)
        return [self._view[: slab.nbytes]]

    def copy_within_kernel(self, slab: Slab, fd: int) -> bool:
        return False

    def _bytes(self, row: int) -> memoryview:
        if row not in self._views:
            self._views[row] = byte_view(self._tensors[row])
        return self._views[row]


class DeviceTensors:
    """Makes slabs of tensors on one device, through pinned memory; copies there are made by kernels, or by torch."""

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[str], slab_bytes: int, device: Device, backend: str):
        self._tensors = tensors
        self._stream = device.stream()
        self._pinned = device.pinned(slab_bytes)
        self._view = byte_view(self._pinned)
        # The stream's own: what this thread's current one gives back may still be in use there.
        self._slab = _Memory(self._stream.scratch(slab_bytes), dtypes)
        self._use_kernels = takes_kernels(backend, tensors)

    def __call__(self, slab: Slab) -> list[memoryview]:
        self._stream.copy_all(
            (
                self._pinned[start : start + nbytes],
                raw_bytes(self._tensors[file])[offset : offset + nbytes],
            )
            for file, offset, nbytes, _, start in slab.reads
        )
        if slab.moves:
            batch = CopyBatch()
            for row, copies in _by_place(slab.moves):
                batch.add(copies.as_strided_copy(), [self._tensors[row]], self._slab.typed[copies.target])
            self._stream.run(lambda: self._copy(batch))
            self._stream.copy_all([(self._pinned[: slab.nbytes], self._slab.memory[: slab.nbytes])])
        self._stream.record().synchronize()
        return [self._view[: slab.nbytes]]

    def _copy(self, batch: CopyBatch) -> None:
        batch.run(self._use_kernels)

    def copy_within_kernel(self, slab: Slab, fd: int) -> bool:
        return False


class SourceFiles:
    """Makes slabs of the files of a checkpoint; what is permuted or decoded is read a piece at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: OpenFiles,
        jobs: Mapping[tuple[int, int], Sequence[Job]],
        dtypes: Sequence[str],
        slab_bytes: int,
        input_bytes: int,
    ):
        self._checkpoint = checkpoint
        self._files = files
        self._jobs = jobs
        self._slab = _Memory(_scratch(slab_bytes), dtypes)
        self._input = _scratch(input_bytes)
        self._slab_view, self._input_view = byte_view(self._slab.memory), byte_view(self._input)

    def __call__(self, slab: Slab) -> list[memoryview]:
        typed = {}
        for job in self._jobs[slab.file, slab.offset_bytes]:
            if isinstance(job, ReadInPlace):
                read(job.reads, self._checkpoint, self._files, [self._slab_view])
                continue
            read(job.reads, self._checkpoint, self._files, [self._input_view])
            decode_codes(job.rectangles, self._input)
            for dtype in {copies.dtype for copies in job.copies} - typed.keys():
                typed[dtype] = self._input.view(dtype_of(dtype, "a source"))
            copy_equal((copies, typed[copies.dtype], self._slab.typed[copies.target]) for copies in job.copies)
        return [self._slab_view[: slab.nbytes]]

    def copy_within_kernel(self, slab: Slab, fd: int) -> bool:
        """Whether the kernel took all parts; where it did not, they are read and written, which tells what is wrong."""
        if not slab.reads:
            return False
        try:
            for file, offset, nbytes, _, start in slab.reads:
                source, done = self._files.opened(file).descriptor(), 0
                if source is None:
                    return False
                while done < nbytes:
                    at = slab.offset_bytes + start + done
                    count = system.copy_range(source, offset + done, fd, at, nbytes - done)
                    if not count:
                        return False
                    done += count
        except OSError:
            return False  # which of the two files it was is found out by reading and writing
        for job in self._jobs[slab.file, slab.offset_bytes]:
            for file in job.reads.files:
                self._files.release(file)
        return True


def jobs_of(
    slabs: Iterable[Slab], checkpoint: Checkpoint, decodes: Mapping[int, Decode], input_bytes: int
) -> dict[tuple[int, int], list[Job]]:
    """What is read for each slab, by its place."""
    jobs: dict[tuple[int, int], list[Job]] = {}
    for slab in slabs:
        in_place = runs(Reads.from_list(sorted(slab.reads)), slab.nbytes)
        through_input = jobs_through_scratch(slab.moves, checkpoint, decodes, input_bytes)
        jobs[slab.file, slab.offset_bytes] = [*map(ReadInPlace, in_place), *through_input]
    return jobs
