"""Bytes of files into memory: descriptors shared by threads, one call for neighbours, errors with names."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, ReadError, listing, message
from automodel_conv.execution.buffers import byte_view, dtype_of, span_bytes
from automodel_conv.execution.copy_batch import Work
from automodel_conv.execution.jobs import GAP_BYTES, Job, Part
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint

# Where bytes between wanted ones are read to, by all threads at once; nobody looks at it.
_JUNK = memoryview(bytearray(GAP_BYTES))


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


def cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ranks_on_this_node() -> int:
    """Processes of this job on this machine; 1 where nobody says.

    torchrun, and what starts processes as it does, tells each of them in ``LOCAL_WORLD_SIZE``
    (https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables"). It says what the job is, also
    before ``torch.distributed`` is initialized, so that is not asked.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if re.fullmatch("0*[1-9][0-9]{0,5}", text) else 1


def rank_on_this_node() -> int:
    """The number of this process among those of its job on this machine, from ``LOCAL_RANK``; 0 where nobody says."""
    text = os.environ.get("LOCAL_RANK", "")
    number = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    return number if number < ranks_on_this_node() else 0


def share_of_cores(usable: int, machine: int, ranks: int) -> int:
    """Cores for one of ``ranks`` processes, each of which may use ``usable`` of the ``machine``'s.

    A launcher may have given each rank cores of its own: so it is taken if they are no more than an equal share of the
    machine. Otherwise all ranks use the same ones.
    """
    return usable if usable <= machine // ranks else max(1, usable // ranks)


def default_reader_threads(most: int) -> int:
    """Threads that one rank reads with where nobody says it: as many as its share of the cores, at most ``most``."""
    return min(share_of_cores(cores(), os.cpu_count() or 1, ranks_on_this_node()), most)


@contextmanager
def reading(path: str) -> Iterator[int]:
    """A file that is open for the length of a block.

    Raises:
        ReadError: it cannot be opened.
    """
    try:
        fd = system.open_readonly(path)
    except OSError as error:
        raise ReadError(message("cannot open a file", where=path, found=error)) from error
    try:
        yield fd
    finally:
        system.close(fd)


class OpenFiles:
    """Descriptors for all threads, each open from the first job that reads its file to the last.

    Raises:
        ReadError: the files are those of a repository that was opened from its headers alone.
    """

    def __init__(self, paths: Sequence[str], jobs: Iterable[Job]):
        if remote := [path for path in paths if "://" in path]:
            text = "only the headers of this checkpoint were read, its data is not on this machine"
            raise ReadError(message(text, where=remote[0], do="load it by its name org/name, which downloads it"))
        self._paths = paths
        self._jobs_left = Counter(file for job in jobs for file in job.files)
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, file: int) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = system.open_readonly(self._paths[file])
            return self._open[file]

    def release(self, file: int) -> None:
        with self._lock:
            self._jobs_left[file] -= 1
            if not self._jobs_left[file]:
                system.close(self._open.pop(file))

    def close(self) -> None:
        while self._open:
            system.close(self._open.popitem()[1])


def read_job(job: Job, checkpoint: Checkpoint, files: OpenFiles, views: Sequence[memoryview]) -> int:
    """Read all parts of a job; returns the bytes read between them and thrown away."""
    by_file = groupby(job.parts, key=attrgetter("file"))
    return sum(_read_parts(list(parts), checkpoint, files, views) for _, parts in by_file)


def _read_parts(
    parts_of_file: Sequence[Part], checkpoint: Checkpoint, files: OpenFiles, views: Sequence[memoryview]
) -> int:
    """Read parts of one file."""
    file = parts_of_file[0].file
    path = checkpoint.files[file]
    try:
        fd = files.descriptor(file)
    except OSError as error:
        raise _failure(f"cannot open a file: {error}", path, parts_of_file, checkpoint) from error
    gaps = 0
    for parts in calls_of(parts_of_file):
        stop = parts[0].offset_bytes
        slices: list[memoryview] = []
        for _, offset, nbytes, target, start, _ in parts:
            if offset > stop:
                slices.append(_JUNK[: offset - stop])
                gaps += offset - stop
            slices.append(views[target][start : start + nbytes])
            stop = offset + nbytes
        try:
            system.read_exactly(fd, slices, parts[0].offset_bytes, path)
        except ReadError as error:
            # If the file shrank its size tells the tensor; any other fault is one of the run's.
            raise _failure(str(error), path, parts, checkpoint, system.size(fd)) from error
    files.release(file)
    return gaps


def calls_of(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Groups of parts near enough to be read by one call."""
    first = 0
    file_before, stop = parts[0].file, parts[0].offset_bytes
    for n, (file, start, nbytes, _, _, _) in enumerate(parts):
        if file != file_before or not 0 <= start - stop <= GAP_BYTES:
            yield parts[first:n]
            first = n
        file_before, stop = file, start + nbytes
    yield parts[first:]


def _failure(text: str, path: str, parts: Sequence[Part], checkpoint: Checkpoint, size: int | None = None) -> ReadError:
    """The error of a read; names the tensors in it, or the first one that a file of ``size`` bytes does not hold."""
    rows = _rows_in(parts, checkpoint)
    cut = [row for row in rows if size is not None and checkpoint.offsets[row] + checkpoint.nbytes[row] > size]
    rows = cut[:1] or rows
    names = checkpoint.names[rows[0]]
    if len(rows) > 1:
        names = f"one of {len(rows)}, {names} to {checkpoint.names[rows[-1]]}"
    where = f"{path}, from byte {parts[0].offset_bytes}"
    return ReadError(f"{message('tensor data could not be read', where=where)}\n  tensor:   {names}\n{text}")


def _rows_in(parts: Sequence[Part], checkpoint: Checkpoint) -> list[int]:
    """The tensors of one file that parts read bytes of, in the order of the file; a part may be several."""
    file, spans = parts[0].file, [(part.offset_bytes, part.offset_bytes + part.nbytes) for part in parts]
    columns = zip(checkpoint.file_ids, checkpoint.offsets, checkpoint.nbytes, strict=True)
    rows = [
        row
        for row, (of_row, start, nbytes) in enumerate(columns)
        if of_row == file and any(first < start + nbytes and start < last for first, last in spans)
    ]
    return sorted(rows, key=lambda row: checkpoint.offsets[row])


def read_whole(row: int, checkpoint: Checkpoint) -> Tensor:
    """A source read into a tensor of its own."""
    dtype = dtype_of(checkpoint.dtypes[row], checkpoint.names[row])
    tensor = torch.empty(checkpoint.shapes[row], dtype=dtype, device="cpu")
    job = Job(
        [Part(checkpoint.file_ids[row], checkpoint.offsets[row], span_bytes(tensor), 0, 0, row)],
        [],
        0,
    )
    files = OpenFiles(checkpoint.files, [job])
    try:
        read_job(job, checkpoint, files, [byte_view(tensor)])
    finally:
        files.close()
    return tensor


def tell_filled(error: BaseException, written: Sequence[str], total: int) -> None:
    """Add the names of the targets that are complete, of ``total``, to the text of our own errors, as a note to others.

    Said of the targets of one device, once for each that has been written to.
    """
    tell(error, "\n".join(filter(None, [f"  filled:   {len(written)} of {total} targets", listing(written)])))


def tell(error: BaseException, text: str) -> None:
    """Add lines to the text of our own errors, as a note to others."""
    if isinstance(error, ConversionError):
        error.add(text)
    else:  # as add_note, which Python 3.10 does not have
        error.__notes__ = [*getattr(error, "__notes__", ()), text]  # type: ignore[attr-defined]
