"""From files to a device: reader threads, pinned memory, uploads and copies, each ahead of the next as far as it can.

    files --read--> slots (pinned) --copy stream--> targets, and windows --compute stream--> targets

A thread waits for the event of its own slot before it reads into it again; the copy stream for the copies out of a
window before that is filled again; the compute stream for the uploads before it copies out of a window. Nothing else
waits, until the end. What the device does is behind ``protocols``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import byte_view, raw_bytes
from automodel_conv.execution.copy_batch import takes_kernels
from automodel_conv.execution.cores import default_reader_threads
from automodel_conv.execution.load import add_note, prepare_load, run_load
from automodel_conv.execution.protocols import Device, Event, Stream
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.stats import LoadStats, Work
from automodel_conv.execution.window_copies import WindowCopies
from automodel_conv.execution.workers import Stopped, raise_if_stopped
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.kernels.launch import compile_ahead, why_not
from automodel_conv.kernels.variants import Variant
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar
from automodel_conv.schedule.device import Chunk, Upload, Window, device_schedule
from automodel_conv.schedule.jobs import align_down, align_up

DEFAULT_DEVICE_SCRATCH_BYTES = 256 << 20
LEAST_SCRATCH_BYTES = 8192
MOST_COMPILED = 3
"""Kernels that one load compiles at most; copies that need others are made by torch, and counted."""

MOST_THREADS = 8
"""Threads that read for one device where nobody says how many."""

# One is read into while the other is uploaded.
_SLOTS = 2
# A chunk takes Python some 70 us, under the GIL. 8 MiB take a bus of 55 GB/s twice as long.
_SLOT_BYTES = 8 << 20
_MOST_SLOT_BYTES = 16 << 20
_LEAST_SLOT_BYTES = LEAST_SCRATCH_BYTES // _SLOTS
# One is filled while the other is emptied.
_REGIONS = 2
# Larger ones gain nothing, and kernels count within one in 32 bits.
_MOST_WINDOW_BYTES = 1 << 30


class Ring(NamedTuple):
    """Pinned memory of a load: two slots for each thread."""

    threads: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        return self.threads * _SLOTS * self.slot_bytes


def ring_of(threads: int | None, scratch_bytes: int | None) -> Ring:
    """As many threads and as large slots as are given, or fit into what is given, or do best.

    Slots have 8 to 16 MiB, less only where ``threads`` and ``scratch_bytes`` leave no more.

    >>> ring_of(3, None)
    Ring(threads=3, slot_bytes=8388608)
    >>> ring_of(2, 16384)
    Ring(threads=2, slot_bytes=4096)
    """
    if threads is None:
        threads = default_reader_threads(MOST_THREADS)
        if scratch_bytes is not None:
            threads = max(1, min(threads, scratch_bytes // (_SLOTS * _SLOT_BYTES)))
    if scratch_bytes is None:
        return Ring(threads, _SLOT_BYTES)
    threads = min(threads, scratch_bytes // (_SLOTS * _LEAST_SLOT_BYTES))
    return Ring(threads, min(_MOST_SLOT_BYTES, align_down(scratch_bytes // (threads * _SLOTS))))


def load_to_device(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    device: Device,
    *,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    device_scratch_bytes: int | None = None,
    backend: str = "auto",
    progress: SharedBar | bool = False,
    stop: threading.Event | None = None,
) -> LoadStats:
    """Fill the buffers of all targets of a plan, on a device, from the files of its checkpoint.

    Each byte of a source is read and uploaded once. Exceptions are scales that two windows share, quantized sources
    that become two dtypes, and sources of targets that upstream's own code makes: these are read again for each such
    target, whole, and made into it on the device, but where upstream itself uses the host. All work is done when this
    returns or raises.
    At most ``MOST_COMPILED`` kernels are compiled, while the first bytes are read.

    Args:
        plan: its sources are the checkpoint's rows.
        buffers: by target name, on the device, of the target's shape and dtype and any strides; other names are
            ignored. Written in place.
        threads: that read; as many as there are cores if not given, at most 8; on several ranks of a node, its share of
            them. Fewer take part where scratch_bytes is too small for all.
        scratch_bytes: of pinned host memory; 16 MiB for each thread if not given.
        device_scratch_bytes: on the device, for what cannot be uploaded in place; 256 MiB if not given. Tables of
            quantized tensors take up to 16 MiB more for a moment.
        backend: what copies on the device, see ``convert_tensors``.
        progress: draw a bar, or draw in one that others share.
        stop: set by anybody, the load ends as soon as what is being read is uploaded.

    Raises:
        ConversionError: a buffer is missing or does not fit, before anything is read.
        ReadError: a file could not be read; names file and tensor, and the targets that were already complete,
            as whatever else is raised once reading has begun.
        UnsupportedError: a dtype that torch does not know, strides that copies cannot follow, or a backend that cannot
            run.
        Stopped: ``stop`` was set before all was done.
    """
    device_scratch_bytes = DEFAULT_DEVICE_SCRATCH_BYTES if device_scratch_bytes is None else device_scratch_bytes
    given = [size for size in (scratch_bytes, device_scratch_bytes) if size is not None]
    if (threads is not None and threads < 1) or min(given) < LEAST_SCRATCH_BYTES:
        found = f"threads={threads}, scratch_bytes={scratch_bytes}, device_scratch_bytes={device_scratch_bytes}"
        raise ConversionError(
            message(
                "cannot load with these threads, scratch_bytes and device_scratch_bytes",
                expected=f"threads >= 1, each scratch >= {LEAST_SCRATCH_BYTES}",
                found=found,
            )
        )
    ring = ring_of(threads, scratch_bytes)
    load = prepare_load(plan, checkpoint, buffers)
    if backend != "auto":  # which never refuses, so that it need not be asked before the first read
        takes_kernels(backend, load.tensors)
    window_bytes = align_down(min(device_scratch_bytes // _REGIONS, _MOST_WINDOW_BYTES))
    chunks, windows = device_schedule(
        load.targets,
        load.copies,
        checkpoint,
        plan.sources.decodes,
        slot_bytes=ring.slot_bytes,
        window_bytes=window_bytes,
    )
    stream = _DeviceLoad(chunks, windows, load.tensors, checkpoint, device, backend, stop)
    bytes_copied = sum(chunk.nbytes for chunk in chunks)
    return run_load(load, bytes_copied, partial(stream.run, ring.threads), stream.unfinished, progress, stop)


class _Slot:
    """Pinned memory of one thread, and the point after which it may be overwritten."""

    def __init__(self, memory: Tensor):
        self.memory = memory
        self.view = byte_view(memory)
        self.uploaded: Event | None = None


class _DeviceLoad:
    """A load under way: what its threads share."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        windows: Sequence[Window],
        tensors: Sequence[Tensor],
        checkpoint: Checkpoint,
        device: Device,
        backend: str,
        stop: threading.Event | None,
    ):
        self._windows = windows
        self._tensors = tensors
        self._checkpoint = checkpoint
        self._device = device
        self._backend = backend
        self._stop_asked = stop
        self._todo = deque(enumerate(chunks))
        self._not_uploaded = dict(enumerate(chunks))
        self._files = OpenFiles(checkpoint, (chunk.reads for chunk in chunks))
        self._target_bytes: dict[int, Tensor] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._chunks_left = [window.chunks for window in windows]
        self._filled: dict[int, Event] = {}  # by region, recorded once its uploads are queued
        self._emptied: dict[int, Event] = {}  # by window, recorded once its copies are queued
        self._compiled: Future[frozenset[Variant] | None] = Future()
        self._gap_bytes = 0
        self._work = Work(0, 0)
        self._without_kernels: str | None = None
        self._settled = 0  # streams that have done all without an error

    def run(self, threads: int, advance: Callable[[int], None]) -> LoadStats:
        """Do it all, wait until the device has, and let go of every resource, whatever happens."""
        self._advance = advance
        threads = max(1, min(threads, len(self._not_uploaded)))
        slot_bytes = align_up(max((chunk.nbytes for chunk in self._not_uploaded.values()), default=0))
        region_bytes = align_up(max((window.nbytes for window in self._windows), default=0))
        pinned = self._device.pinned(threads * _SLOTS * slot_bytes)
        slots = deque(_Slot(memory) for memory in pinned.view(threads * _SLOTS, slot_bytes))
        self._regions = [self._device.scratch(region_bytes) for _ in self._windows[:_REGIONS]]
        # Queued before the streams are made, which are behind it.
        self._window_copies = WindowCopies(self._windows, self._tensors, self._regions)
        stats = LoadStats(0, 0, pinned.nbytes, sum(region.nbytes for region in self._regions), threads=threads)
        self._copies, self._kernels = self._device.stream(), self._device.stream()
        del pinned
        futures: list[Future[Any]] = []
        try:
            self._run_threads(threads, slots, futures)
        except Exception as error:
            # A thread's own error says more than what the device says at the end.
            own = next(filter(None, (_own_error(future) for future in futures)), None)
            if own is None or own is error:
                raise
            add_note(own, f"  besides:  {type(error).__name__}: {error}")
            raise own from error
        if self._not_uploaded:
            raise_if_stopped(self._stop_asked)
        return stats._replace(gap_bytes=self._gap_bytes, work=self._work, without_kernels=self._without_kernels)

    def _run_threads(self, threads: int, slots: deque[_Slot], futures: list[Future[Any]]) -> None:
        """Read, upload and copy everything in threads, of which ``futures`` tells."""
        with ExitStack() as ending:  # the last one first, each whatever happens to another
            ending.callback(self._release)
            for stream in (self._copies, self._kernels):
                # Memory goes back only once nothing uses it.
                ending.callback(self._settle, stream)
            ending.callback(self._files.close)
            pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="automodel_conv")
            ending.callback(pool.shutdown)
            ending.callback(self._stop)
            if self._windows:
                self._compiled = pool.submit(self._compile)
                futures.append(self._compiled)
            futures += [pool.submit(self._read, [slots.popleft() for _ in range(_SLOTS)]) for _ in range(threads)]
            wait(futures, return_when=FIRST_EXCEPTION)
        for worker in futures:
            if not isinstance(worker.exception(), Stopped):
                worker.result()

    def _settle(self, stream: Stream) -> None:
        stream.record().synchronize()
        self._settled += 1

    def _release(self) -> None:
        self._regions.clear()
        self._window_copies.release()

    def unfinished(self) -> set[int]:
        """Numbers of the targets that may lack bytes, once ``run`` has returned or raised."""
        if self._settled < 2:  # what was queued may have failed
            return set(range(len(self._tensors)))
        windows = [window for number, window in enumerate(self._windows) if number not in self._emptied]
        by_upload = {number for chunk in list(self._not_uploaded.values()) for number in chunk.to_targets}
        return by_upload.union(*(window.targets for window in windows))

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @torch.inference_mode()  # a mode is a thread's own; the caller's tensors may be inference tensors
    def _read(self, slots: Sequence[_Slot]) -> None:
        try:
            self._read_chunks(slots)
        except BaseException:
            self._stop()  # the others, without waiting for the main thread to do it
            raise

    def _read_chunks(self, slots: Sequence[_Slot]) -> None:
        for slot in cycle(slots):
            if self._stop_asked is not None and self._stop_asked.is_set():
                self._stop()
            if self._stopped:
                return
            try:
                number, chunk = self._todo.popleft()
            except IndexError:
                return
            if slot.uploaded is not None:
                slot.uploaded.synchronize()
            gap_bytes = read(chunk.reads, self._checkpoint, self._files, [slot.view])
            self._upload(chunk, slot)
            with self._changed:
                self._gap_bytes += gap_bytes
                del self._not_uploaded[number]
            self._advance(chunk.nbytes)

    def _upload(self, chunk: Chunk, slot: _Slot) -> None:
        pairs: list[tuple[Tensor, Tensor]] = []
        for target, uploads in chunk.to_targets.items():
            if target not in self._target_bytes:
                self._target_bytes[target] = raw_bytes(self._tensors[target])
            pairs += _pairs(uploads, slot, self._target_bytes[target])
        for window, uploads in chunk.to_windows.items():
            self._enter(window)
            self._copies.copy_all(pairs + _pairs(uploads, slot, self._regions[window % _REGIONS]))
            pairs = []
            self._leave(window)
        if pairs:
            self._copies.copy_all(pairs)
        slot.uploaded = self._copies.record(slot.uploaded)

    def _enter(self, window: int) -> None:
        """Wait until the copies out of the window that had this memory before are queued; the stream waits for them."""
        before = window - _REGIONS
        if before >= 0:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or before in self._emptied)
                if self._stopped:
                    raise Stopped
            self._copies.wait(self._emptied[before])

    def _leave(self, window: int) -> None:
        """Queue the copies out of a window if all that fills it is queued."""
        with self._changed:
            self._chunks_left[window] -= 1
            if self._chunks_left[window]:
                return
        # Events are used again once all that waits for them has been told to.
        region = window % _REGIONS
        self._filled[region] = self._copies.record(self._filled.get(region))
        self._kernels.wait(self._filled[region])
        chosen = self._compiled.result()
        self._kernels.run(lambda: self._copy(window, chosen))
        emptied = self._kernels.record(self._emptied.get(window - _REGIONS))
        with self._changed:
            self._emptied[window] = emptied
            self._changed.notify_all()

    def _copy(self, window: int, chosen: frozenset[Variant] | None) -> None:
        work = self._window_copies.run(window, chosen)
        with self._changed:
            self._work += work

    @torch.inference_mode()
    def _compile(self) -> frozenset[Variant] | None:
        """Compile the kernels that move the most; None where none can run. Triton is imported and started here, too."""
        device = self._regions[0].device
        if self._backend != "torch" and device.type != "cpu":
            self._without_kernels = why_not(device)
        if not takes_kernels(self._backend, self._tensors):
            return None
        chosen = self._window_copies.variants(MOST_COMPILED)
        if chosen:
            self._kernels.run(lambda: compile_ahead(chosen, device))
        return chosen


def _own_error(future: Future[Any]) -> BaseException | None:
    """The error that a thread ended with, unless another's ended it."""
    error = future.exception() if future.done() else None
    return None if isinstance(error, Stopped) else error


def _pairs(uploads: Iterable[Upload], slot: _Slot, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Copies out of a slot: destinations and sources."""
    return [
        (memory.narrow(0, start_bytes, nbytes), slot.memory.narrow(0, slot_start, nbytes))
        for slot_start, nbytes, start_bytes in uploads
    ]
