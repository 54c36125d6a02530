"""The executor that writes files: threads produce slabs in bounded scratch, and write them or compare them with a file.

Each thread has a ``SlabProducer``, which computes the bytes of a slab from host tensors, from tensors on a device, or
from other files. Writing and comparing are the same for all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message, size_text
from automodel_conv.execution.buffers import byte_view, dtype_of, raw_bytes
from automodel_conv.execution.copy_batch import CopyBatch, uses_kernels
from automodel_conv.execution.copying import COPY_BYTES, COPY_RATIO, copy_equal
from automodel_conv.execution.cores import cores, is_at_least
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
from automodel_conv.schedule.host import group_reads, jobs_through_scratch
from automodel_conv.schedule.jobs import Copies, Job, Move, ReadInPlace, Reads, align_down
from automodel_conv.schedule.requests import CONNECTIONS, ranges_of
from automodel_conv.schedule.writes import Slab, filled_ranges

LEAST_SCRATCH_BYTES = 1 << 16
"""The smallest scratch of one thread that writes."""

_MOST_THREADS = 16
# Input of permuting copies at once: as much as stays in the cache between the read and the copy.
_INPUT_BYTES = 8 << 20
# Bytes of a file that are compared at once.
_WINDOW_BYTES = 1 << 20


class SlabProducer(Protocol):
    """Computes the bytes of slabs, in one thread."""

    def __call__(self, slab: Slab) -> list[memoryview]:
        """Return all bytes of a slab in order; the views are valid until the next call.

        Views of memory that is not the producer's own cannot be written to.
        """
        ...

    def try_copy_range(self, slab: Slab, fd: int) -> bool:
        """Let the operating system copy the slab to its place in ``fd``, if it can; return whether it did."""
        ...


class SlabGroup(NamedTuple):
    """Slabs of one file that one kind of producer computes."""

    slabs: Sequence[Slab]
    start: Callable[[], SlabProducer]
    """Function that starts a producer in a thread."""
    abort: Callable[[], None] | None = None
    """Function that ends reads in which producers wait for a network; None if they do not."""


class ScratchSplit(NamedTuple):
    """Scratch for writing or comparing files, split equally among threads."""

    threads: int
    slab_bytes: int
    """Bytes of each thread's slab memory, the size limit of a slab."""
    input_bytes: int
    """Bytes of each thread's input memory, for sources to permute or decode; 0 if no files are read."""

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch of all threads together, including the memory that copies allocate."""
        copies = min(COPY_BYTES, COPY_RATIO * self.slab_bytes)
        return self.threads * (self.slab_bytes + self.input_bytes + copies)


def split_scratch(
    threads: int | None, scratch_bytes: int, *, reads_files: bool, is_remote: bool = False
) -> ScratchSplit:
    """Split ``scratch_bytes`` among threads: a slab for each, memory for its copies, and an input if files are read.

    Args:
        threads: number of threads, or None for the number of cores, at most 16, and 16 if they wait for a network.
            Fewer are used if the scratch is too small for all.
        scratch_bytes: scratch of all threads together.
        reads_files: whether slabs are computed from files.
        is_remote: whether bytes of the files come over a network.

    Raises:
        ConversionError: the scratch is too small for one thread, or ``threads`` is below 1.
    """
    if threads is None:
        threads = CONNECTIONS if is_remote else min(cores(), _MOST_THREADS)
    if not (is_at_least(threads, 1) and is_at_least(scratch_bytes, LEAST_SCRATCH_BYTES)):
        raise ConversionError(
            message(
                "cannot write with these threads and scratch_bytes",
                expected=f"threads >= 1, scratch_bytes >= {LEAST_SCRATCH_BYTES}",
                found=f"threads={threads!r}, scratch_bytes={scratch_bytes!r}",
            )
        )
    threads = min(threads, scratch_bytes // LEAST_SCRATCH_BYTES)
    share = scratch_bytes // threads
    share = max(share - COPY_BYTES, share // (1 + COPY_RATIO))
    inputs = min(_INPUT_BYTES, share // 4) if reads_files else 0
    return ScratchSplit(threads, align_down(share - inputs), align_down(inputs))


def create_shard_file(shard: Shard, path: str) -> None:
    """Create an output file: write its header, and reserve the space of its data.

    Raises:
        WriteError: the file cannot be created, or the disk is full. Not every file system reports a full disk here.
    """
    with write_errors(path, "a file", f"room for {size_text(shard.nbytes)}"):
        with system.create(path) as file:
            system.reserve(file.fileno(), shard.nbytes)
            write_exactly(file.fileno(), [memoryview(shard.header)], 0, path)


def write_slabs(
    groups: Sequence[SlabGroup],
    path: str,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Write slabs into a file that ``create_shard_file`` has created, and wait until they are on the disk.

    Args:
        groups: the slabs of this file.
        path: path of the file.
        threads: number of threads that write.
        advance: function that is called with each number of bytes written.

    Raises:
        WriteError: the system cannot write the bytes.
        ReadError: a source cannot be read.
    """
    with write_errors(path, "a file"):
        with system.open_existing(path) as file:
            fd = file.fileno()
            for slabs, start, abort in groups:
                run_in_threads(
                    slabs, threads, lambda start=start: _slab_writer(start(), fd, path, advance), abort=abort
                )
            system.sync(fd)


def _slab_writer(producer: SlabProducer, fd: int, path: str, advance: Callable[[int], None]) -> Callable[[Slab], None]:
    def write(slab: Slab) -> None:
        if not producer.try_copy_range(slab, fd):
            views = producer(slab)
            if not slab.sparse_itemsize:
                write_exactly(fd, views, slab.offset_bytes, path)
            for first, nbytes in filled_ranges(slab) if slab.sparse_itemsize else ():
                write_exactly(fd, [views[0][first : first + nbytes]], slab.offset_bytes + first, path)
        system.begin_writeback(fd, slab.offset_bytes, slab.nbytes)
        advance(slab.nbytes)

    return write


def first_different_byte(
    group: SlabGroup,
    source: ByteSource,
    threads: int,
    advance: Callable[[int], None],
) -> int | None:
    """Return the offset of the first byte of a file that differs from the bytes of its slabs; None if none does.

    Args:
        group: slabs of the file. Bytes that no slab covers are not compared.
        source: the file to compare.
        threads: number of threads that compare.
        advance: function that is called with each number of bytes compared.
    """
    differences: list[int] = []
    with opened(source) as file:

        def abort() -> None:
            file.abort()
            if group.abort is not None:
                group.abort()

        run_in_threads(
            group.slabs, threads, lambda: _slab_comparer(group.start(), file, differences, advance), abort=abort
        )
    return min(differences, default=None)


def _slab_comparer(
    producer: SlabProducer, file: OpenSource, differences: list[int], advance: Callable[[int], None]
) -> Callable[[Slab], None]:
    window = np.empty(_WINDOW_BYTES, np.uint8)

    def compare(slab: Slab) -> None:
        offset = slab.offset_bytes
        file.expect([(offset, offset + slab.nbytes)])
        for view in producer(slab):
            for first in range(0, len(view), _WINDOW_BYTES):
                expected = np.frombuffer(view[first : first + _WINDOW_BYTES], np.uint8)
                stored = window[: expected.size]
                file.read_into([stored.data], offset)
                if not np.array_equal(stored, expected):  # several times faster than torch.equal on bytes
                    differences.append(offset + int(np.argmax(stored != expected)))
                    return
                offset += expected.size
        advance(slab.nbytes)

    return compare


def _copies_in_write_order(moves: Mapping[int, Sequence[Move]]) -> list[tuple[int, Copies]]:
    """Return pairs of source row and copies in the order of the addresses that they write, which is faster."""
    pairs = sorted(
        ((row, move) for row, group in moves.items() for move in group),
        key=lambda pair: (pair[1].target, pair[1].target_offset),
    )
    ordered: list[tuple[int, Copies]] = []
    for (row, target, dtype, box), run in groupby(pairs, lambda pair: (pair[0], *pair[1].group_key)):
        offsets = [(move.source_offset, move.target_offset) for _, move in run]
        ordered.append((row, Copies(target, dtype, box, *map(list, zip(*offsets, strict=True)))))
    return ordered


class _SlabMemory:
    """The memory of a slab, with a view of it in each dtype that moves write."""

    def __init__(self, memory: Tensor, dtypes: Sequence[str]):
        self.memory = memory
        self.typed = [memory.view(dtype_of(dtype, "a target")) for dtype in dtypes]


def _scratch(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class HostTensorProducer:
    """Produces slabs from tensors in host memory; unchanged bytes are written straight from the tensors."""

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[str], slab_bytes: int):
        self._tensors = tensors
        self._views: dict[int, memoryview] = {}
        self._slab = _SlabMemory(_scratch(slab_bytes), dtypes)
        self._view = byte_view(self._slab.memory)

    def __call__(self, slab: Slab) -> list[memoryview]:
        if slab.reads:
            return [self._bytes(file)[start : start + nbytes] for file, start, nbytes, *_ in slab.reads]
        if slab.is_zeros:
            self._slab.memory[: slab.nbytes].zero_()
        ordered = _copies_in_write_order(slab.moves)
        copy_equal((copies, self._tensors[row], self._slab.typed[copies.target]) for row, copies in ordered)
        return [self._view[: slab.nbytes]]

    def try_copy_range(self, slab: Slab, fd: int) -> bool:
        return False

    def _bytes(self, row: int) -> memoryview:
        if row not in self._views:
            self._views[row] = byte_view(self._tensors[row]).toreadonly()
        return self._views[row]


class DeviceTensorProducer:
    """Produces slabs from tensors on one device, through pinned memory; kernels or torch copy on the device."""

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[str], slab_bytes: int, device: Device, backend: str):
        self._tensors = tensors
        self._stream = device.stream()
        self._pinned = device.pinned(slab_bytes)
        self._view = byte_view(self._pinned)
        # Memory of this stream: memory that this thread's current stream has freed may still be in use on it.
        self._slab = _SlabMemory(self._stream.scratch(slab_bytes), dtypes)
        self._use_kernels = uses_kernels(backend, tensors)

    def __call__(self, slab: Slab) -> list[memoryview]:
        self._stream.copy_all(
            (
                self._pinned[start : start + nbytes],
                raw_bytes(self._tensors[file])[offset : offset + nbytes],
            )
            for file, offset, nbytes, _, start in slab.reads
        )
        if slab.is_zeros:
            self._pinned[: slab.nbytes].zero_()
        if slab.moves:
            batch = CopyBatch()
            for row, copies in _copies_in_write_order(slab.moves):
                batch.add(copies.as_strided_copy(), [self._tensors[row]], self._slab.typed[copies.target])
            self._stream.run(lambda: self._copy(batch))
            self._stream.copy_all([(self._pinned[: slab.nbytes], self._slab.memory[: slab.nbytes])])
        self._stream.record().synchronize()
        return [self._view[: slab.nbytes]]

    def _copy(self, batch: CopyBatch) -> None:
        batch.run(self._use_kernels)

    def try_copy_range(self, slab: Slab, fd: int) -> bool:
        return False


class SourceFileProducer:
    """Produces slabs from the files of a checkpoint; sources to permute or decode are read in parts."""

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
        self._slab = _SlabMemory(_scratch(slab_bytes), dtypes)
        self._input = _scratch(input_bytes)
        self._slab_view, self._input_view = byte_view(self._slab.memory), byte_view(self._input)

    def __call__(self, slab: Slab) -> list[memoryview]:
        typed = {}
        if slab.is_zeros:
            self._slab.memory[: slab.nbytes].zero_()
        if self._checkpoint.is_remote:
            for file, ranges in ranges_of(job.reads for job in self._jobs[slab.file, slab.offset_bytes]).items():
                self._files.expect(file, ranges)
        for job in self._jobs[slab.file, slab.offset_bytes]:
            if isinstance(job, ReadInPlace):
                read(job.reads, self._checkpoint, self._files, [self._slab_view])
                continue
            read(job.reads, self._checkpoint, self._files, [self._input_view])
            decode_codes(job.rectangles, self._input)
            copies_of_job = job.copies
            for dtype in {copies.dtype for copies in copies_of_job} - typed.keys():
                typed[dtype] = self._input.view(dtype_of(dtype, "a source"))
            copy_equal((copies, typed[copies.dtype], self._slab.typed[copies.target]) for copies in copies_of_job)
        return [self._slab_view[: slab.nbytes]]

    def try_copy_range(self, slab: Slab, fd: int) -> bool:
        """Let the operating system copy all reads of a slab from file to file; return whether it did.

        If it did not, the caller reads and writes the slab, and then any fault raises an error that names the file.
        """
        if not slab.reads:
            return False
        try:
            for file, offset, nbytes, _, start in slab.reads:
                source, done = self._files.opened(file).descriptor(), 0
                if source is None:
                    return False
                while done < nbytes:
                    target_offset = slab.offset_bytes + start + done
                    count = system.copy_range(source, offset + done, fd, target_offset, nbytes - done)
                    if not count:
                        return False
                    done += count
        except OSError:
            return False  # it may be either file; reading and writing shows which
        for job in self._jobs[slab.file, slab.offset_bytes]:
            for file in job.files:
                self._files.release(file)
        return True


def jobs_by_slab(
    slabs: Iterable[Slab], checkpoint: Checkpoint, decodes: Mapping[int, Decode], input_bytes: int
) -> dict[tuple[int, int], list[Job]]:
    """Return the jobs that fill each slab, scheduled as for a load to the host; keys are output file and offset."""
    jobs: dict[tuple[int, int], list[Job]] = {}
    for slab in slabs:
        in_place = group_reads(Reads.from_list(sorted(slab.reads)), slab.nbytes)
        through_input = jobs_through_scratch(slab.moves, checkpoint, decodes, input_bytes)
        jobs[slab.file, slab.offset_bytes] = [*map(ReadInPlace, in_place), *through_input]
    return jobs
