"""The executor that loads files to host memory: threads read jobs in place, or into scratch and copy from there."""

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
from automodel_conv.execution.cores import default_reader_threads, is_at_least
from automodel_conv.execution.host_decoding import decode_codes
from automodel_conv.execution.load import prepare_load, run_load
from automodel_conv.execution.new_memory import NewMemory
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.thread_policy import ThreadPolicy
from automodel_conv.execution.timeline import COPY, DECODE, MEMORY, SCHEDULE, Recorder
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar
from automodel_conv.schedule.host import schedule
from automodel_conv.schedule.jobs import ALIGN_BYTES, Copies, Job, ReadAndCopy, align_down, align_up
from automodel_conv.schedule.requests import JobGroup, group_by_requests, one_by_one

DEFAULT_SCRATCH_BYTES = 64 << 20
"""Scratch of a load to the host, if the caller sets none."""
LEAST_SCRATCH_BYTES = 4096
"""The smallest scratch of a load to the host."""

# A few threads read local files at full speed; more threads only compete for the page cache.
_MOST_THREADS = 16
# There may be more threads if they wait: a network or a disk answers many requests at once.
_MOST_WAITING_THREADS = 32
# Smaller loads are over before more threads could help.
_ADAPTED_BYTES = 256 << 20
# Starting a thread takes as long as reading 0.5 to 2 MB, so a thread that reads less than this is no gain.
_BYTES_PER_THREAD = 8 << 20


def default_threads(nbytes: int | None = None) -> int:
    """Return the default number of threads of a load to the host; the ranks of one node share its cores.

    Args:
        nbytes: number of bytes to load, or None if it is unknown. A small load uses fewer threads.
    """
    most = _MOST_THREADS if nbytes is None else min(_MOST_THREADS, max(1, nbytes // _BYTES_PER_THREAD))
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
    """Fill the host buffers of all targets of a plan from the files of its checkpoint.

    Each byte of a source is read once, even if several targets share it. The exception is transformers' own code: each
    of its calls reads its sources again, and whole.

    Args:
        plan: the plan to execute. Its sources are the checkpoint's rows.
        checkpoint: the checkpoint to read.
        buffers: tensors on the CPU by target name, with the target's shape and dtype and any strides. Written in place.
            Other names are ignored.
        threads: number of threads that read and copy. The default is the number of cores (on several ranks of a node,
            the rank's share of them), but at most 16 and at most one for each 8 MiB. While threads wait and more of
            them read faster, the default grows up to 32. Fewer threads work if ``scratch_bytes`` is too small for all.
            ``threads=1`` runs in the caller's thread.
        scratch_bytes: bytes of scratch for all threads together, for bytes that cannot be read in place; 64 MiB by
            default. A larger source passes through the scratch in slabs.
        huge_pages: whether new memory of the buffers gets huge pages. None chooses the size that this machine creates
            faster; see ``NewMemory``.
        progress: whether to draw a progress bar, or a bar that several loads share.
        stop: event that any thread may set. Once it is set, the load ends as soon as the current reads are in place.

    Raises:
        ConversionError: a buffer is missing or does not fit. Raised before anything is read.
        ReadError: a file could not be read. The error names the file, the tensor, and the targets that were already
            complete. Every other error that is raised after reading has begun names these targets too.
        UnsupportedError: torch does not have a dtype, or copies cannot follow the strides of a buffer.
        Stopped: ``stop`` was set before all work was done.
    """
    adapts = threads is None
    threads = default_threads(plan.bytes_written) if threads is None else threads
    scratch_bytes = DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    if not (is_at_least(threads, 1) and is_at_least(scratch_bytes, LEAST_SCRATCH_BYTES)):
        raise ConversionError(
            message(
                "cannot load with these threads and scratch_bytes",
                expected=f"threads >= 1, scratch_bytes >= {LEAST_SCRATCH_BYTES}",
                found=f"threads={threads!r}, scratch_bytes={scratch_bytes!r}",
            )
        )
    recorder = Recorder(checkpoint.is_remote)
    load = prepare_load(plan, checkpoint, buffers)
    threads = min(threads, scratch_bytes // (ALIGN_BYTES * (1 + COPY_RATIO)))
    slot_bytes = bytes_of_slot(threads, scratch_bytes)
    decodes = plan.sources.decodes
    jobs = schedule(load.targets, load.copies, load.checkpoint, decodes, threads=threads, slot_bytes=slot_bytes)
    most = _most_threads(jobs, threads, scratch_bytes) if adapts else threads
    done: set[int] = set()

    groups = group_by_requests(jobs, threads) if checkpoint.is_remote else one_by_one(jobs)

    policy = ThreadPolicy(threads, most)
    run = partial(_run_jobs, jobs, groups, checkpoint, load.tensors, policy, huge_pages, done, stop, recorder)
    recorder.main.lap(SCHEDULE)

    def unfinished() -> set[int]:
        return {target for number, job in enumerate(jobs) if number not in done for target in job.targets}

    stats = run_load(load, sum(job.total_bytes for job in jobs), run, unfinished, progress, stop, recorder.main)
    return stats._replace(spans=recorder.recorded())


def bytes_of_slot(threads: int, scratch_bytes: int) -> int:
    """Return the bytes that each thread can read at once, if all threads share ``scratch_bytes`` with their copies."""
    share = scratch_bytes // threads
    nbytes = max(share - COPY_BYTES, share // (1 + COPY_RATIO))
    return align_down(nbytes)


def _most_threads(jobs: Sequence[Job], threads: int, scratch_bytes: int) -> int:
    """Return the number of threads that a load may grow to if its threads wait.

    Scratch limits it. A load that is too short to gain from more threads does not grow.
    """
    if sum(job.total_bytes for job in jobs) < _ADAPTED_BYTES:
        return threads
    thread_bytes = _scratch_of_thread(jobs)
    fitting = scratch_bytes // thread_bytes if thread_bytes else _MOST_WAITING_THREADS
    return max(threads, min(fitting, _MOST_WAITING_THREADS))


def _slot_bytes(jobs: Sequence[Job]) -> int:
    # Rounded up to whole alignment units, so that the slot can be viewed as elements of any size.
    return align_up(max((job.scratch_bytes for job in jobs if isinstance(job, ReadAndCopy)), default=0))


def _scratch_of_thread(jobs: Sequence[Job]) -> int:
    """Return the scratch of one thread: a slot to read into, and the memory that copies out of the slot need."""
    slot_bytes = _slot_bytes(jobs)
    return slot_bytes + min(COPY_BYTES, COPY_RATIO * slot_bytes)


def _run_jobs(
    jobs: Sequence[Job],
    groups: Sequence[JobGroup],
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    policy: ThreadPolicy,
    huge_pages: bool | None,
    done: set[int],
    stop: threading.Event | None,
    recorder: Recorder,
    advance: Callable[[int], None],
) -> LoadStats:
    """Run groups of jobs in threads; ``done`` collects the numbers of the finished jobs, even if this raises."""
    files = OpenFiles(checkpoint, jobs)
    views = [byte_view(tensor) for tensor in tensors]
    memory = NewMemory(tensors, huge_pages)
    slot_bytes = _slot_bytes(jobs)
    gaps: list[int] = []

    def start() -> Callable[[JobGroup], None]:
        scratch = torch.empty(slot_bytes, dtype=torch.uint8, device="cpu")
        scratch_view = [byte_view(scratch)]
        lane = recorder.lane()

        def run_group(group: JobGroup) -> None:
            for file, ranges in group.ranges.items():
                files.expect(file, ranges)
            for number in group.numbers:
                job = jobs[number]
                if isinstance(job, ReadAndCopy):
                    copies = job.copies
                    memory.populate_for(copies)
                    lane.lap(MEMORY)
                    gaps.append(read(job.reads, checkpoint, files, scratch_view))
                    lane.read_lap(job.total_bytes + gaps[-1])
                    if job.rectangles:
                        decode_codes(job.rectangles, scratch)
                        lane.lap(DECODE)
                    _copy(copies, scratch, tensors)
                    lane.lap(COPY)
                else:
                    memory.populate_for(job.reads)
                    lane.lap(MEMORY)
                    gaps.append(read(job.reads, checkpoint, files, views))
                    lane.read_lap(job.total_bytes + gaps[-1])
                done.add(number)
                advance(job.total_bytes)

        return _recorded(run_group, jobs, policy, lock) if adapts else run_group

    adapts, lock = policy.most > policy.threads, threading.Lock()
    wanted = (lambda: policy.threads) if adapts else None
    try:
        most = run_in_threads(groups, policy.threads, start, stop, most=policy.most, wanted=wanted, abort=files.abort)
    finally:
        files.close()
    return LoadStats(0, sum(gaps), most * _scratch_of_thread(jobs), threads=most, pages=memory.use())


def _recorded(
    run_group: Callable[[JobGroup], None], jobs: Sequence[Job], policy: ThreadPolicy, lock: threading.Lock
) -> Callable[[JobGroup], None]:
    """Return ``run_group`` with a measurement: after each group, its bytes and seconds are recorded in ``policy``."""

    last, last_ready = time.perf_counter(), system.seconds_ready()

    def run_and_record(group: JobGroup) -> None:
        nonlocal last, last_ready
        run_group(group)
        before, last = last, time.perf_counter()
        ready_before, last_ready = last_ready, system.seconds_ready()
        seconds = last - before
        nbytes = sum(jobs[number].total_bytes for number in group.numbers)
        with lock:
            policy.record(nbytes, seconds - (last_ready - ready_before), seconds, last)

    return run_and_record


def _copy(batches: Sequence[Copies], scratch: Tensor, tensors: Sequence[Tensor]) -> None:
    """Execute copies from the scratch to the targets."""
    typed = {dtype: scratch.view(dtype_of(dtype, "a source")) for dtype in {copies.dtype for copies in batches}}
    copy_equal((copies, typed[copies.dtype], tensors[copies.target]) for copies in batches)
