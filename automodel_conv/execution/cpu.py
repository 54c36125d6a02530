"""From files to host buffers: every byte read once, straight to its place or through a scratch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from math import prod

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, ReadError, message
from automodel_conv.execution.buffers import Aim, byte_view, checked, dtype_of, strided
from automodel_conv.execution.reading import LoadStats, OpenFiles, cores, read_job, read_whole, with_filled
from automodel_conv.execution.schedule import GAP_BYTES, Job, Move, schedule
from automodel_conv.execution.upstream import run_upstream, upstream_calls
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.kernels.strided_copy import strided_copy_torch
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import bytes_progress

DEFAULT_SCRATCH_BYTES = 64 << 20
LEAST_SCRATCH_BYTES = 4096

# Local files are read at full speed by few threads; more only pass the page cache around.
_MOST_THREADS = 16
_ALIGN_BYTES = 64
# What a copy allocates for itself, see transpose_torch: at most this, and at most four times what
# it reads (two panels, of elements that a cast may have made twice as wide).
_COPY_BYTES = 4 << 20
_COPY_RATIO = 4


def load_files(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    *,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> LoadStats:
    """Fill the buffers of all targets of a plan from the files of its checkpoint.

    Each byte of a source is read once, also where several targets share it; only sources of targets
    that upstream's own code makes are read again for each of those, and whole.

    Args:
        plan: its sources are the checkpoint's rows.
        buffers: by target name, on the CPU, of the target's shape and dtype and any strides; other
            names are ignored. Written in place.
        threads: that read and copy; as many as there are cores if not given, at most 16. Fewer take
            part where scratch_bytes is too small for all. One is the caller's own.
        scratch_bytes: of all threads together, for what cannot be read in place; 64 MiB if not
            given. Sources that are larger go through it in slabs.
        progress: draw a bar.

    Raises:
        ConversionError: a buffer is missing or does not fit, before anything is read.
        ReadError: a file could not be read; names file and tensor, and the targets that were
            already complete.
        UnsupportedError: a dtype that torch does not know, or strides that copies cannot follow.
    """
    threads = min(cores(), _MOST_THREADS) if threads is None else threads
    scratch_bytes = DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    if threads < 1 or scratch_bytes < LEAST_SCRATCH_BYTES:
        raise ConversionError(
            message(
                "cannot load with these threads and scratch_bytes",
                expected=f"threads >= 1, scratch_bytes >= {LEAST_SCRATCH_BYTES}",
                found=f"threads={threads}, scratch_bytes={scratch_bytes}",
            )
        )
    targets = [t for t in plan.targets if t.fallback is None and prod(t.shape)]
    tensors = [checked(target, buffers) for target in targets]
    calls = upstream_calls(plan)
    for target in (target for call in calls for target in call.targets):
        checked(target, buffers)
    aim = Aim()
    copies = [aim(target, tensor) for target, tensor in zip(targets, tensors, strict=True)]
    threads = min(threads, scratch_bytes // (_ALIGN_BYTES * (1 + _COPY_RATIO)))
    share = scratch_bytes // threads
    slot_bytes = max(share - _COPY_BYTES, share // (1 + _COPY_RATIO))
    slot_bytes -= slot_bytes % _ALIGN_BYTES
    jobs = schedule(targets, copies, checkpoint, threads=threads, slot_bytes=slot_bytes)
    bytes_read = sum(job.nbytes for job in jobs)
    bytes_read += sum(checkpoint.nbytes[row] for call in calls for row in call.rows)
    done: set[int] = set()
    written: list[str] = []
    with bytes_progress(bytes_read, "loading", progress) as advance:
        try:
            stats = _run(jobs, checkpoint, tensors, threads, done, advance)
            for call in calls:
                run_upstream(call, {row: read_whole(row, checkpoint) for row in call.rows}, buffers)
                written += [target.name for target in call.targets]
                advance(sum(checkpoint.nbytes[row] for row in call.rows))
        except ReadError as error:
            unfinished = {n for k, job in enumerate(jobs) if k not in done for n in job.targets}
            written += [t.name for n, t in enumerate(targets) if n not in unfinished]
            raise with_filled(error, written, len(plan.targets)) from error
    return stats._replace(bytes_read=bytes_read)


class _TorchThreads:
    """The number of torch's threads that loads under way will restore, and how many such loads there are."""

    lock = threading.Lock()
    loads = 0
    number = 0


@contextmanager
def _keeping_torch_threads() -> Iterator[None]:
    """Undo, after the last load under way, that a worker's number of torch threads holds for later threads too."""
    with _TorchThreads.lock:
        if not _TorchThreads.loads:
            _TorchThreads.number = torch.get_num_threads()
        _TorchThreads.loads += 1
    try:
        yield
    finally:
        with _TorchThreads.lock:
            _TorchThreads.loads -= 1
            if not _TorchThreads.loads:
                torch.set_num_threads(_TorchThreads.number)


def _run(
    jobs: Sequence[Job],
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    threads: int,
    done: set[int],
    advance: Callable[[int], None],
) -> LoadStats:
    """Run the jobs; ``done`` collects the numbers of the finished ones, also when this raises."""
    files = OpenFiles(checkpoint.files, jobs)
    views = [byte_view(tensor) for tensor in tensors]
    # Whole alignment units, so that the slot can be seen as elements of any size.
    slot_bytes = -(-max((job.scratch_bytes for job in jobs), default=0) // _ALIGN_BYTES) * _ALIGN_BYTES
    todo = deque(enumerate(jobs))
    stop = threading.Event()
    gaps: list[int] = []

    @torch.inference_mode()  # a mode is a thread's own; the caller's tensors may be inference tensors
    def work() -> None:
        scratch = torch.empty(slot_bytes, dtype=torch.uint8, device="cpu")
        own_views = [*views, byte_view(scratch)]  # so that SCRATCH finds it
        junk = memoryview(bytearray(GAP_BYTES))
        while not stop.is_set():
            try:
                number, job = todo.popleft()
            except IndexError:
                return
            gaps.append(read_job(job, checkpoint, files, own_views, junk))
            _copy(job.moves, scratch, tensors)
            done.add(number)
            advance(job.nbytes)

    threads = min(threads, len(jobs))
    with closing(files):
        if threads > 1:
            _in_threads(work, threads, stop)
        else:
            work()
    copy_bytes = min(_COPY_BYTES, _COPY_RATIO * slot_bytes)
    return LoadStats(0, sum(gaps), threads * (slot_bytes + copy_bytes))


def _in_threads(work: Callable[[], None], threads: int, stop: threading.Event) -> None:
    """Run as many of ``work`` at once; the first error sets ``stop`` and is raised when all have ended."""
    # The copies of one thread must not start threads of their own.
    pool = ThreadPoolExecutor(threads, "automodel_conv", torch.set_num_threads, (1,))
    with _keeping_torch_threads():
        try:
            workers = [pool.submit(work) for _ in range(threads)]
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown()
    for worker in workers:
        worker.result()


def _copy(moves: Sequence[Move], scratch: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy from the scratch to the targets, copies of equal geometry in one call."""
    typed: dict[str, Tensor] = {}
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    # Ordered by place: copies that fill each other's gaps are faster next to each other.
    for move in sorted(moves, key=lambda move: (move.target, move.target_offset)):
        if move.dtype not in typed:
            typed[move.dtype] = scratch.view(dtype_of(move.dtype, "a source"))
        target = tensors[move.target]
        key = (move.dtype, target.dtype, move.shape, move.source_strides, move.target_strides)
        dst, src = groups.setdefault(key, ([], []))
        dst.append(strided(target, move.shape, move.target_strides, move.target_offset))
        src.append(strided(typed[move.dtype], move.shape, move.source_strides, move.source_offset))
    for dst, src in groups.values():
        strided_copy_torch(dst, src)
