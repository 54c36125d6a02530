"""Load files to host buffers: each byte is read once, in place or through scratch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import byte_view, dtype_of
from automodel_conv.execution.copying import COPY_BYTES, COPY_RATIO, copy_equal
from automodel_conv.execution.cores import default_reader_threads
from automodel_conv.execution.host_decoding import decode_codes
from automodel_conv.execution.load import begin, carry_out
from automodel_conv.execution.new_memory import NewMemory
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.thread_policy import ThreadPolicy
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar
from automodel_conv.schedule.host import schedule
from automodel_conv.schedule.jobs import ALIGN_BYTES, Copies, Job, ReadAndCopy, align_down, align_up

DEFAULT_SCRATCH_BYTES = 64 << 20
LEAST_SCRATCH_BYTES = 4096

# Local files are read at full speed by few threads; more only pass the page cache around.
_MOST_THREADS = 16
# Threads that wait may be more: a network, or a disk, answers many at once.
_MOST_WAITING_THREADS = 32
# Loads below this are over before more threads could help.
_ADAPTED_BYTES = 256 << 20
# To start a thread takes as long as reading half a megabyte to two; one that finds less than this to do is no gain.
_BYTES_A_THREAD = 8 << 20


def default_threads(nbytes: int | None = None) -> int:
    """How many threads load where nobody says it; ranks of one node share its cores.

    Args:
        nbytes: to be loaded, if that is known: few bytes are loaded by few threads.
    """
    most = _MOST_THREADS if nbytes is None else min(_MOST_THREADS, max(1, nbytes // _BYTES_A_THREAD))
    return default_reader_threads(most)


def load_to_host(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    *,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    huge_pages: bool | None = None,
    progress: SharedBar | bool = False,
    stop: threading.Event | None = None,
) -> LoadStats:
    """Fill the buffers of all targets of a plan from the files of its checkpoint.

    Each byte of a source is read once, also where several targets share it; only sources of targets
    that upstream's own code makes are read again for each of those, and whole.

    Args:
        plan: its sources are the checkpoint's rows.
        buffers: by target name, on the CPU, of the target's shape and dtype and any strides; other
            names are ignored. Written in place.
        threads: that read and copy. Not given: as many as there are cores, at most 16 and one for each 8 MiB, on
            several ranks of a node its share of them; and up to 32 while that many read faster because they wait.
            Fewer take part where scratch_bytes is too small for all. A single one that is given is the caller's own.
        scratch_bytes: of all threads together, for what cannot be read in place; 64 MiB if not
            given. Sources that are larger go through it in slabs.
        huge_pages: the pages of buffers that are new memory; None: of the size that is made faster, see ``NewMemory``.
        progress: draw a bar, or draw in one that others share.
        stop: set by anybody, the load ends as soon as what is being read is in its place.

    Raises:
        ConversionError: a buffer is missing or does not fit, before anything is read.
        ReadError: a file could not be read; names file and tensor, and the targets that were
            already complete, as whatever else is raised once reading has begun.
        UnsupportedError: a dtype that torch does not know, or strides that copies cannot follow.
        Stopped: ``stop`` was set before all was done.
    """
    adapts = threads is None
    threads = default_threads(plan.bytes_written) if threads is None else threads
    scratch_bytes = DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    if threads < 1 or scratch_bytes < LEAST_SCRATCH_BYTES:
        raise ConversionError(
            message(
                "cannot load with these threads and scratch_bytes",
                expected=f"threads >= 1, scratch_bytes >= {LEAST_SCRATCH_BYTES}",
                found=f"threads={threads}, scratch_bytes={scratch_bytes}",
            )
        )
    load = begin(plan, checkpoint, buffers)
    threads = min(threads, scratch_bytes // (ALIGN_BYTES * (1 + COPY_RATIO)))
    slot_bytes = bytes_of_slot(threads, scratch_bytes)
    decodes = plan.sources.decodes
    jobs = schedule(load.targets, load.copies, checkpoint, decodes, threads=threads, slot_bytes=slot_bytes)
    most = _most_threads(jobs, threads, scratch_bytes) if adapts else threads
    done: set[int] = set()

    run = partial(_run, jobs, checkpoint, load.tensors, ThreadPolicy(threads, most), huge_pages, done, stop)

    def unfinished() -> set[int]:
        return {target for number, job in enumerate(jobs) if number not in done for target in job.targets}

    return carry_out(load, sum(job.reads.total_bytes for job in jobs), run, unfinished, progress, stop)


def bytes_of_slot(threads: int, scratch_bytes: int) -> int:
    """What is left to each thread for what it reads, of the scratch of all, beside what its copies need."""
    share = scratch_bytes // threads
    nbytes = max(share - COPY_BYTES, share // (1 + COPY_RATIO))
    return align_down(nbytes)


def _most_threads(jobs: Sequence[Job], threads: int, scratch_bytes: int) -> int:
    """How many threads there may be where they wait: scratch for each of them, and time to find out."""
    if sum(job.reads.total_bytes for job in jobs) < _ADAPTED_BYTES:
        return threads
    of_each = _scratch_of_thread(jobs)
    fitting = scratch_bytes // of_each if of_each else _MOST_WAITING_THREADS
    return max(threads, min(fitting, _MOST_WAITING_THREADS))


def _slot_bytes(jobs: Sequence[Job]) -> int:
    # Whole alignment units, so that the slot can be seen as elements of any size.
    return align_up(max((job.scratch_bytes for job in jobs if isinstance(job, ReadAndCopy)), default=0))


def _scratch_of_thread(jobs: Sequence[Job]) -> int:
    """A slot to read into, and the memory that copies out of it need."""
    slot_bytes = _slot_bytes(jobs)
    return slot_bytes + min(COPY_BYTES, COPY_RATIO * slot_bytes)


def _run(
    jobs: Sequence[Job],
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    policy: ThreadPolicy,
    huge_pages: bool | None,
    done: set[int],
    stop: threading.Event | None,
    advance: Callable[[int], None],
) -> LoadStats:
    """Run the jobs; ``done`` collects the numbers of the finished ones, also when this raises."""
    files = OpenFiles(checkpoint, (job.reads for job in jobs))
    views = [byte_view(tensor) for tensor in tensors]
    memory = NewMemory(tensors, huge_pages)
    slot_bytes = _slot_bytes(jobs)
    gaps: list[int] = []

    def start() -> Callable[[tuple[int, Job]], None]:
        scratch = torch.empty(slot_bytes, dtype=torch.uint8, device="cpu")
        scratch_view = [byte_view(scratch)]

        def take(item: tuple[int, Job]) -> None:
            number, job = item
            memory.populate_for(job)
            through_scratch = isinstance(job, ReadAndCopy)
            gaps.append(read(job.reads, checkpoint, files, scratch_view if through_scratch else views))
            if through_scratch:
                decode_codes(job.rectangles, scratch)
                _copy(job.copies, scratch, tensors)
            done.add(number)
            advance(job.reads.total_bytes)

        return _recording(take, policy, lock) if adapts else take

    adapts, lock = policy.most > policy.threads, threading.Lock()
    wanted = (lambda: policy.threads) if adapts else None
    try:
        most = run_in_threads(enumerate(jobs), policy.threads, start, stop, most=policy.most, wanted=wanted)
    finally:
        files.close()
    return LoadStats(0, sum(gaps), most * _scratch_of_thread(jobs), threads=most, pages=memory.use())


def _recording(
    take: Callable[[tuple[int, Job]], None], policy: ThreadPolicy, lock: threading.Lock
) -> Callable[[tuple[int, Job]], None]:
    """``take``, and what it has taken told to ``policy``."""

    last, last_ready = time.perf_counter(), system.seconds_ready()

    def told(item: tuple[int, Job]) -> None:
        nonlocal last, last_ready
        take(item)
        begin, last = last, time.perf_counter()
        ready, last_ready = last_ready, system.seconds_ready()
        seconds = last - begin
        with lock:
            policy.tell(item[1].reads.total_bytes, seconds - (last_ready - ready), seconds, last)

    return told


def _copy(batches: Sequence[Copies], scratch: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy from the scratch to the targets."""
    typed = {dtype: scratch.view(dtype_of(dtype, "a source")) for dtype in {copies.dtype for copies in batches}}
    copy_equal((copies, typed[copies.dtype], tensors[copies.target]) for copies in batches)
