"""Load files to a device: reader threads, pinned memory, uploads, and the copies and decoding that empty windows.

    files --read--> slots (pinned) --copy stream--> targets, and windows --compute stream--> targets

Every stage runs as far ahead of the next as it can:

- A thread waits for the event of its own slot before it reads into the slot again.
- The copy stream waits for the copies out of a window before it fills the same memory again.
- The compute stream waits for the uploads into a window before it copies out of it.

Nothing else waits before the end of the load. The device is behind ``protocols``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import byte_view, raw_bytes
from automodel_conv.execution.copy_batch import uses_kernels
from automodel_conv.execution.cores import default_reader_threads, is_at_least
from automodel_conv.execution.load import add_note, prepare_load, run_load
from automodel_conv.execution.protocols import Device, Event, Stream
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.stats import CopyCounts, LoadStats
from automodel_conv.execution.timeline import (
    COMPILE,
    DEVICE,
    KERNELS,
    LAUNCH,
    SCHEDULE,
    SLOT,
    UPLOAD,
    WINDOW,
    Lane,
    Recorder,
)
from automodel_conv.execution.window_copies import WindowCopies
from automodel_conv.execution.workers import Stopped, raise_if_stopped, wait_until_first_error
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.kernels.launch import compile_ahead, why_not
from automodel_conv.kernels.variants import Variant
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar
from automodel_conv.schedule.device import Chunk, Upload, Window, device_schedule
from automodel_conv.schedule.jobs import align_down, align_up
from automodel_conv.schedule.requests import ranges_of

DEFAULT_DEVICE_SCRATCH_BYTES = 256 << 20
LEAST_SCRATCH_BYTES = 8192
MOST_COMPILED = 3
"""Maximum number of kernels that one load compiles; torch carries out copies that need others, and counts them."""

MOST_THREADS = 8
"""Maximum number of threads that read for one device, if the caller does not set a number."""

# Slots of a thread: one is read into while the other is uploaded.
_SLOTS = 2
# Python spends some 70 us on a chunk, under the GIL. A bus of 55 GB/s needs twice as long for 8 MiB.
_SLOT_BYTES = 8 << 20
_MOST_SLOT_BYTES = 16 << 20
_LEAST_SLOT_BYTES = LEAST_SCRATCH_BYTES // _SLOTS
# Regions that windows use in rotation: one is filled while the other is emptied.
_REGIONS = 2
# Larger windows gain nothing, and kernels count within a window in 32 bits.
_MOST_WINDOW_BYTES = 1 << 30


class Ring(NamedTuple):
    """The size of the pinned memory of a load: two slots for each thread."""

    threads: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        return self.threads * _SLOTS * self.slot_bytes


def ring_of(threads: int | None, scratch_bytes: int | None) -> Ring:
    """Choose the number of threads and the size of slots for a load.

    Slots have 8 to 16 MiB, or less if ``threads`` and ``scratch_bytes`` leave no more.

    Args:
        threads: number of threads; None to choose one. Fewer are used if ``scratch_bytes`` is too small for all.
        scratch_bytes: maximum bytes of pinned memory; None for slots of 8 MiB.

    Example:
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

    Each byte of a source is read and uploaded once, with three exceptions. Scales that two windows share are read for
    each of them. Quantized sources that are decoded to two dtypes are read for each dtype. If transformers'
    own code computes a target, its sources are read again as whole tensors; the code runs on the device, unless
    transformers itself uses the host. All work is done when this returns or raises. At most ``MOST_COMPILED`` kernels
    are compiled, while the first bytes are read.

    Args:
        plan: a plan with the checkpoint's rows as its sources.
        checkpoint: the files to read.
        buffers: tensors by target name, on the device, of the target's shape and dtype and any strides; other names are
            ignored. Written in place.
        device: the device that owns the buffers.
        threads: number of threads that read. Default: one for each core, at most 8; on several ranks of a node, the
            rank's share of the cores. Fewer are used if ``scratch_bytes`` is too small for all.
        scratch_bytes: bytes of pinned host memory. Default: 16 MiB for each thread.
        device_scratch_bytes: bytes on the device for everything that cannot be uploaded in place. Default: 256 MiB.
            Tables of quantized tensors temporarily use up to 16 MiB more.
        backend: the backend that copies on the device; see ``convert_tensors``.
        progress: True to draw a progress bar, or a bar that several loads share.
        stop: an event that any thread may set to end the load as soon as the chunks being read are uploaded.

    Raises:
        ConversionError: a buffer is missing or does not fit, before anything is read.
        ReadError: a file could not be read. The error names the file and the tensor. Like any error raised after
            reading has begun, it also names the targets that are complete.
        UnsupportedError: torch has no such dtype, copies cannot follow the strides of a buffer, or the backend cannot
            run.
        Stopped: ``stop`` was set before all work was done.
    """
    device_scratch_bytes = DEFAULT_DEVICE_SCRATCH_BYTES if device_scratch_bytes is None else device_scratch_bytes
    scratch_sizes = [size for size in (scratch_bytes, device_scratch_bytes) if size is not None]
    can_run = threads is None or is_at_least(threads, 1)
    if not (can_run and all(is_at_least(size, LEAST_SCRATCH_BYTES) for size in scratch_sizes)):
        arguments = (
            f"threads={threads!r}, scratch_bytes={scratch_bytes!r}, device_scratch_bytes={device_scratch_bytes!r}"
        )
        raise ConversionError(
            message(
                "cannot load with these threads, scratch_bytes and device_scratch_bytes",
                expected=f"threads >= 1, each scratch >= {LEAST_SCRATCH_BYTES}",
                found=arguments,
            )
        )
    ring = ring_of(threads, scratch_bytes)
    recorder = Recorder(checkpoint.is_remote)
    load = prepare_load(plan, checkpoint, buffers)
    if backend != "auto":  # "auto" never raises, so it needs no check before the first read
        uses_kernels(backend, load.tensors)
    window_bytes = align_down(min(device_scratch_bytes // _REGIONS, _MOST_WINDOW_BYTES))
    chunks, windows = device_schedule(
        load.targets,
        load.copies,
        load.checkpoint,
        plan.sources.decodes,
        slot_bytes=ring.slot_bytes,
        window_bytes=window_bytes,
    )
    stream = _DeviceLoad(chunks, windows, load.tensors, checkpoint, device, backend, stop, recorder)
    bytes_copied = sum([chunk.nbytes for chunk in chunks])
    recorder.main.lap(SCHEDULE)
    run = partial(stream.run, ring.threads)
    stats = run_load(load, bytes_copied, run, stream.unfinished, progress, stop, recorder.main)
    return stats._replace(spans=recorder.recorded())


class _Slot:
    """Pinned memory of one thread, and the event after which it may be overwritten."""

    def __init__(self, memory: Tensor):
        self.memory = memory
        self.view = byte_view(memory)
        self.uploaded: Event | None = None


class _DeviceLoad:
    """A load in progress, and the state that its threads share."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        windows: Sequence[Window],
        tensors: Sequence[Tensor],
        checkpoint: Checkpoint,
        device: Device,
        backend: str,
        stop: threading.Event | None,
        recorder: Recorder,
    ):
        self._recorder = recorder
        self._windows = windows
        self._tensors = tensors
        self._checkpoint = checkpoint
        self._is_remote = checkpoint.is_remote
        self._device = device
        self._backend = backend
        self._stop_event = stop
        self._todo = deque(enumerate(chunks))
        self._not_uploaded = dict(enumerate(chunks))
        self._files = OpenFiles(checkpoint, (chunk.reads for chunk in chunks))
        self._target_bytes: dict[int, Tensor] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._chunks_left = [window.chunks for window in windows]
        self._filled: dict[int, Event] = {}  # by region, recorded once the uploads into its window are queued
        self._emptied: dict[int, Event] = {}  # by window, recorded once its copies are queued
        self._compiled: Future[frozenset[Variant] | None] = Future()
        self._is_compiling = True
        self._chosen: frozenset[Variant] | None = None
        """Result of ``_compiled``, once it is not compiling any more."""
        self._gap_bytes = 0
        self._counts = CopyCounts(0, 0)
        self._without_kernels: str | None = None
        self._streams_done = 0  # streams that have finished without an error

    def run(self, threads: int, advance: Callable[[int], None]) -> LoadStats:
        """Do the whole load, wait for the device, and release every resource even if an error is raised.

        Args:
            threads: maximum number of threads that read.
            advance: called with the number of bytes of each chunk that is uploaded.
        """
        self._advance = advance
        threads = max(1, min(threads, len(self._not_uploaded)))
        slot_bytes = align_up(max([chunk.nbytes for chunk in self._not_uploaded.values()], default=0))
        region_bytes = align_up(max((window.nbytes for window in self._windows), default=0))
        pinned = self._device.pinned(threads * _SLOTS * slot_bytes)
        slots = deque(_Slot(memory) for memory in pinned.view(threads * _SLOTS, slot_bytes))
        self._regions = [self._device.scratch(region_bytes) for _ in self._windows[:_REGIONS]]
        # This queues work, so it comes before the streams are created, which wait for it.
        self._window_copies = WindowCopies(self._windows, self._tensors, self._regions)
        stats = LoadStats(0, 0, pinned.nbytes, sum(region.nbytes for region in self._regions), threads=threads)
        self._copy_stream, self._compute_stream = self._device.stream(), self._device.stream()
        del pinned
        futures: list[Future[Any]] = []
        try:
            self._run_threads(threads, slots, futures)
        except Exception as error:
            # The error of a thread is more specific than the error that the device raises at the end.
            thread_error = next(filter(None, (_thread_error(future) for future in futures)), None)
            if thread_error is None or thread_error is error:
                raise
            text = error.args[0] if isinstance(error, ConversionError) else error
            add_note(thread_error, f"  also:     {type(error).__name__}: {text}")
            raise thread_error from error
        if self._not_uploaded:
            raise_if_stopped(self._stop_event)
        return stats._replace(gap_bytes=self._gap_bytes, counts=self._counts, without_kernels=self._without_kernels)

    def _run_threads(self, threads: int, slots: deque[_Slot], futures: list[Future[Any]]) -> None:
        """Read, upload and copy everything in threads, and append the future of each thread to ``futures``."""
        with ExitStack() as ending:  # callbacks run in reverse order, each even if another raises
            ending.callback(self._release)
            for stream in (self._copy_stream, self._compute_stream):
                # Memory is released only after all work that uses it is done.
                ending.callback(self._synchronize, stream)
            ending.callback(self._files.close)
            pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="automodel_conv")
            ending.callback(pool.shutdown)
            ending.callback(self._files.abort)
            ending.callback(self._stop)
            if self._windows:
                self._compiled = pool.submit(self._compile)
                futures.append(self._compiled)
            futures += [pool.submit(self._read, [slots.popleft() for _ in range(_SLOTS)]) for _ in range(threads)]
            done = wait_until_first_error(futures)
            futures.sort(key=lambda future: future not in done)  # later errors may be of reads that are ended here
        for worker in futures:
            if not isinstance(worker.exception(), Stopped):
                worker.result()

    def _synchronize(self, stream: Stream) -> None:
        self._recorder.main.restart()
        stream.record().synchronize()
        self._recorder.main.lap(DEVICE)
        self._streams_done += 1

    def _release(self) -> None:
        self._regions.clear()
        self._window_copies.release()

    def unfinished(self) -> set[int]:
        """Return the numbers of the targets that may lack bytes, after ``run`` has returned or raised."""
        if self._streams_done < 2:  # queued work may have failed
            return set(range(len(self._tensors)))
        windows = [window for number, window in enumerate(self._windows) if number not in self._emptied]
        by_upload = {number for chunk in list(self._not_uploaded.values()) for number in chunk.to_targets}
        return by_upload.union(*(window.targets for window in windows))

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @torch.inference_mode()  # each thread has its own mode, and the caller's tensors may be inference tensors
    def _read(self, slots: Sequence[_Slot]) -> None:
        """Read and upload chunks until none is left; stop the other threads at once if this one fails."""
        try:
            self._read_chunks(slots)
        except BaseException:
            self._stop()
            raise

    def _read_chunks(self, slots: Sequence[_Slot]) -> None:
        lane = self._recorder.lane()
        for slot in cycle(slots):
            if self._stop_event is not None and self._stop_event.is_set():
                self._stop()
            if self._stopped:
                return
            try:
                number, chunk = self._todo.popleft()
            except IndexError:
                return
            if slot.uploaded is not None:
                slot.uploaded.synchronize()
                lane.lap(SLOT)
            if self._is_remote:
                for file, ranges in ranges_of([chunk.reads]).items():
                    self._files.expect(file, ranges)
            gap_bytes = read(chunk.reads, self._checkpoint, self._files, [slot.view])
            lane.read_lap(chunk.nbytes + gap_bytes)
            self._upload(chunk, slot, lane)
            lane.lap(UPLOAD)
            with self._changed:
                self._gap_bytes += gap_bytes
                del self._not_uploaded[number]
            self._advance(chunk.nbytes)

    def _upload(self, chunk: Chunk, slot: _Slot, lane: Lane) -> None:
        """Queue the uploads of a chunk out of a slot, and the copies out of each window that it fills up."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for target, uploads in chunk.to_targets.items():
            if target not in self._target_bytes:
                self._target_bytes[target] = raw_bytes(self._tensors[target])
            pairs += _copy_pairs(uploads, slot, self._target_bytes[target])
        for window, uploads in chunk.to_windows.items():
            self._wait_for_region(window, lane)
            self._copy_stream.copy_all(pairs + _copy_pairs(uploads, slot, self._regions[window % _REGIONS]))
            pairs = []
            self._empty_if_full(window, lane)
        if pairs:
            self._copy_stream.copy_all(pairs)
        slot.uploaded = self._copy_stream.record(slot.uploaded)

    def _wait_for_region(self, window: int, lane: Lane) -> None:
        """Make the copy stream wait for the copies out of the previous window in the same region.

        The thread itself waits until these copies are queued.

        Raises:
            Stopped: the load is stopped before they are queued.
        """
        previous = window - _REGIONS
        if previous >= 0:
            if previous not in self._emptied:
                lane.lap(UPLOAD)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or previous in self._emptied)
                lane.lap(WINDOW)
            if self._stopped:
                raise Stopped
            self._copy_stream.wait(self._emptied[previous])

    def _empty_if_full(self, window: int, lane: Lane) -> None:
        """Count a chunk of a window as queued, and queue the copies out of the window after its last chunk."""
        with self._changed:
            self._chunks_left[window] -= 1
            if self._chunks_left[window]:
                return
        # An event is recorded again only after everything that waits for it has been queued.
        region = window % _REGIONS
        self._filled[region] = self._copy_stream.record(self._filled.get(region))
        self._compute_stream.wait(self._filled[region])
        lane.lap(UPLOAD)
        if self._is_compiling:
            self._chosen = self._compiled.result()
            self._is_compiling = False
            lane.lap(KERNELS)
        self._compute_stream.run(lambda: self._copy_window(window, self._chosen))
        lane.lap(LAUNCH)
        emptied = self._compute_stream.record(self._emptied.get(window - _REGIONS))
        with self._changed:
            self._emptied[window] = emptied
            self._changed.notify_all()

    def _copy_window(self, window: int, chosen: frozenset[Variant] | None) -> None:
        counts = self._window_copies.run(window, chosen)
        with self._changed:
            self._counts += counts

    @torch.inference_mode()
    def _compile(self) -> frozenset[Variant] | None:
        """Compile the kernels that write the most bytes and return them, or None if no kernel can run.

        Triton is imported and started in this thread, too.
        """
        lane = self._recorder.lane("compiler")
        device = self._regions[0].device
        if self._backend != "torch" and device.type != "cpu":
            self._without_kernels = why_not(device)
        if not uses_kernels(self._backend, self._tensors):
            lane.lap(COMPILE)
            return None
        chosen = self._window_copies.variants(MOST_COMPILED)
        if chosen:
            self._compute_stream.run(lambda: compile_ahead(chosen, device))
        lane.lap(COMPILE)
        return chosen


def _thread_error(future: Future[Any]) -> BaseException | None:
    """Return the error that a thread raised, or None if it raised none or was stopped by the error of another."""
    error = future.exception() if future.done() else None
    return None if isinstance(error, Stopped) else error


def _copy_pairs(uploads: Iterable[Upload], slot: _Slot, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the destinations in ``memory`` and the sources in a slot of uploads."""
    return [
        (memory.narrow(0, start_bytes, nbytes), slot.memory.narrow(0, slot_start, nbytes))
        for slot_start, nbytes, start_bytes in uploads
    ]
