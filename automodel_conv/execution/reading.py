"""Reads from files into memory: threads share open files, adjacent reads share a call, and errors name the tensor."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from automodel_conv.errors import ReadError, in_context, message
from automodel_conv.execution.buffers import byte_view, dtype_of
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.source import OpenSource
from automodel_conv.schedule.jobs import GAP_BYTES, Job, Read, Reads
from automodel_conv.schedule.requests import ranges_of

# Memory for the bytes between wanted bytes. All threads read into it at the same time, and its contents are never used.
_JUNK = memoryview(bytearray(GAP_BYTES))


class OpenFiles:
    """The open files of a checkpoint, for all threads; each is open from the first job that reads it to the last.

    Args:
        checkpoint: the checkpoint with the files.
        jobs: the jobs, or the reads of each job.
    """

    def __init__(self, checkpoint: Checkpoint, jobs: Iterable[Job | Reads]):
        self._sources = checkpoint.sources
        self._jobs_left = Counter(file for job in jobs for file in job.files)
        self._open: dict[int, OpenSource] = {}
        self._lock = threading.Lock()

    def opened(self, file: int) -> OpenSource:
        """Return a file that is open; open it first if necessary.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            if file not in self._open:
                self._open[file] = self._sources[file].open()
            return self._open[file]

    def expect(self, file: int, ranges: Sequence[tuple[int, int]]) -> None:
        """State the ranges of a file that this thread reads next.

        Raises:
            OSError: the file cannot be opened.
        """
        self.opened(file).expect(ranges)

    def release(self, file: int) -> None:
        """Record that one job of a file is done, and close the file after its last job."""
        with self._lock:
            self._jobs_left[file] -= 1
            if not self._jobs_left[file]:
                self._open.pop(file).close()

    def abort(self) -> None:
        """End reads in which threads wait for a network, so that the threads can end; they raise ReadError."""
        with self._lock:
            files = list(self._open.values())
        for file in files:
            file.abort()

    def close(self) -> None:
        """Close all files that are still open."""
        while self._open:
            self._open.popitem()[1].close()


def read(reads: Reads, checkpoint: Checkpoint, files: OpenFiles, memories: Sequence[memoryview]) -> int:
    """Execute all reads of a job, and return the bytes of gaps, which are read and thrown away.

    Args:
        reads: the reads of the job.
        checkpoint: the checkpoint with the files.
        files: the open files.
        memories: memories to read into, by the numbers in ``reads.memory``.

    Raises:
        ReadError: a file cannot be opened or read. The error names the file and the tensors.
    """
    gap_bytes = 0
    for call in reads.calls():
        number = int(call.file[0])
        path = checkpoint.files[number]
        try:
            file = files.opened(number)
        except OSError as error:
            raise _failure(ReadError(f"cannot open a file: {error}"), path, call, checkpoint) from error
        views, gaps = _views(call, memories)
        gap_bytes += gaps
        try:
            file.read_into(views, int(call.offset_bytes[0]))
        except ReadError as error:
            # If the file shrank, its size shows which tensor is cut off. Other faults concern the whole call.
            raise _failure(error, path, call, checkpoint, file.size()) from error
    for file in reads.files:
        files.release(file)
    return gap_bytes


def _views(call: Reads, memories: Sequence[memoryview]) -> tuple[list[memoryview], int]:
    """Return the memory that one call fills, and the bytes of gaps in it."""
    columns = call.memory.tolist(), call.start_bytes.tolist(), call.nbytes.tolist()
    views = [memories[memory][start : start + nbytes] for memory, start, nbytes in zip(*columns, strict=True)]
    if len(views) == 1:
        return views, 0
    gaps = call.offset_bytes[1:] - call.stop_bytes[:-1]
    gap_bytes = int(gaps.sum())
    if gap_bytes:
        between = ([_JUNK[:gap]] if gap else [] for gap in gaps.tolist())
        views = [views[0], *(part for gap, view in zip(between, views[1:], strict=True) for part in (*gap, view))]
    return views, gap_bytes


def _failure(cause: ReadError, path: str, call: Reads, checkpoint: Checkpoint, size: int | None = None) -> ReadError:
    """Return the error of a read; it names the tensors in the read.

    If ``size``, the size of the file, cuts off tensors, the error names only the first of them.
    """
    rows = _rows_in(call, checkpoint)
    cut = [row for row in rows if size is not None and checkpoint.offsets[row] + checkpoint.nbytes[row] > size]
    rows = cut[:1] or rows
    names = checkpoint.names[rows[0]]
    if len(rows) > 1:
        names = f"one of {len(rows)}, {names} to {checkpoint.names[rows[-1]]}"
    where = f"{path}, from byte {call.offset_bytes[0]}"
    return ReadError(in_context(f"{message('tensor data could not be read', where=where)}\n  tensor:   {names}", cause))


def _rows_in(call: Reads, checkpoint: Checkpoint) -> list[int]:
    """Return the rows of the tensors that a call reads bytes of, in the order of the file."""
    file = call.file[0]
    spans = list(zip(call.offset_bytes.tolist(), call.stop_bytes.tolist(), strict=True))
    columns = zip(checkpoint.file_ids, checkpoint.offsets, checkpoint.nbytes, strict=True)
    rows = [
        row
        for row, (row_file, start, nbytes) in enumerate(columns)
        if row_file == file and any(first < start + nbytes and start < last for first, last in spans)
    ]
    return sorted(rows, key=lambda row: checkpoint.offsets[row])


def read_whole(row: int, checkpoint: Checkpoint) -> Tensor:
    """Read one source into a new tensor on the CPU."""
    [tensor] = read_each([row], checkpoint)
    return tensor


def read_each(rows: Sequence[int], checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Read sources one after another, each into a new tensor on the CPU."""
    jobs = [Read(checkpoint.file_ids[row], checkpoint.offsets[row], checkpoint.nbytes[row], 0, 0) for row in rows]
    reads = [Reads.from_list([job]) for job in jobs]
    files = OpenFiles(checkpoint, reads)
    try:
        if checkpoint.is_remote:
            for file, ranges in ranges_of(reads).items():
                files.expect(file, ranges)
        for row, job in zip(rows, reads, strict=True):
            dtype = dtype_of(checkpoint.dtypes[row], checkpoint.names[row])
            tensor = torch.empty(checkpoint.shapes[row], dtype=dtype, device="cpu")
            read(job, checkpoint, files, [byte_view(tensor)])
            yield tensor
    finally:
        files.close()
