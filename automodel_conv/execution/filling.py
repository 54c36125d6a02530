"""The entry point of loads: split the limits among the devices, and run the executor of each, all at the same time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, listing, message
from automodel_conv.execution import device as to_device
from automodel_conv.execution import host as to_host
from automodel_conv.execution.cores import default_reader_threads
from automodel_conv.execution.cuda import transfer_device
from automodel_conv.execution.device import load_to_device, ring_of
from automodel_conv.execution.host import load_to_host
from automodel_conv.execution.load import add_filled_targets, add_note
from automodel_conv.execution.protocols import Device
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.workers import Stopped, run_concurrently
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar, shared_progress
from automodel_conv.schedule.requests import CONNECTIONS

_LOG = logging.getLogger(__name__)


class Limits(NamedTuple):
    """The threads and memory that a load may use; None selects the executor's default."""

    threads: int | None = None
    """Number of threads of all devices together."""
    scratch_bytes: int | None = None
    """Bytes of host scratch of all devices together."""
    device_scratch_bytes: int | None = None
    """Bytes of scratch on each device."""
    huge_pages: bool | None = None
    """Whether new host memory gets huge pages."""


def limits_in_budget(
    memory_budget: int | None, limits: Limits, plan: CopyPlan, buffers: Mapping[str, Tensor], extra_bytes: int = 0
) -> Limits:
    """Return limits under which a load allocates at most ``memory_budget`` bytes in addition to its buffers.

    The budget covers the host and all devices together. Limits that the caller has set stay as they are. The others
    are reduced if necessary.

    Args:
        memory_budget: the budget in bytes; None returns ``limits`` unchanged.
        limits: the limits that the caller has set.
        plan: the plan to execute.
        buffers: buffers by target name.
        extra_bytes: bytes of the budget that the caller needs for itself.

    Raises:
        UnsupportedError: transformers' own code computes a target, and what it allocates has no bound.
        ConversionError: the budget is too small. The error states how much is needed.
    """
    if memory_budget is None:
        return limits
    if plan.fallbacks:
        raise UnsupportedError(
            message(
                "memory_budget cannot be kept: only transformers' own code can create some tensors, without a bound",
                found="\n" + listing(plan.fallbacks),
                do="leave {memory_budget} out",
            )
        )
    all_devices = {buffers[target.name].device for target in plan.targets}
    streamed = sum(transfer_device(device) is not None for device in all_devices)
    # A load of nothing has the minimum of a load to the host.
    least = streamed * to_device.LEAST_SCRATCH_BYTES
    if streamed < max(len(all_devices), 1):
        least += to_host.LEAST_SCRATCH_BYTES
    least_device_scratch = to_device.LEAST_SCRATCH_BYTES if streamed else 0
    left = memory_budget - extra_bytes
    host_scratch, device_scratch = limits.scratch_bytes, limits.device_scratch_bytes if streamed else 0
    if host_scratch is None:
        # torch allocates pinned memory in powers of two.
        most = left // 4 if streamed and device_scratch is None else left - streamed * (device_scratch or 0)
        most = 1 << max(most, 1).bit_length() - 1 if streamed else most
        threads = _threads(limits, len(all_devices))
        default = _pinned_bytes(ring_of(threads, None).nbytes) if streamed else to_host.DEFAULT_SCRATCH_BYTES
        host_scratch = min(most, default)
        host_scratch = max(host_scratch, least) if len(all_devices) > 1 else host_scratch
    if device_scratch is None:
        device_scratch = min((left - host_scratch) // streamed, to_device.DEFAULT_DEVICE_SCRATCH_BYTES)
    if host_scratch + streamed * device_scratch > left or host_scratch < least or device_scratch < least_device_scratch:
        needed = extra_bytes + max(limits.scratch_bytes or least, least)
        if streamed:
            needed += streamed * max(limits.device_scratch_bytes or 4 * least_device_scratch, least_device_scratch)
        text, expected = "memory_budget is too small for this load", f"at least {needed} bytes"
        raise ConversionError(message(text, expected=expected, found=memory_budget))
    return limits._replace(scratch_bytes=host_scratch, device_scratch_bytes=device_scratch or None)


def fill(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    limits: Limits,
    *,
    progress: bool = False,
) -> dict[torch.device, LoadStats]:
    """Fill the buffers of all targets, on all devices at the same time.

    Each device has an executor in a thread of its own: ``load_to_host`` or ``load_to_device``. The devices share the
    limits in proportion to their bytes. If there are more devices than threads, they are filled one after another. The
    first error, or an interrupt, ends the loads to all devices. It is raised after all of them have ended, and names
    the complete targets of each device.

    Args:
        plan: the plan to execute. Its sources are the checkpoint's rows.
        checkpoint: the checkpoint to read.
        buffers: buffers by target name, on any devices. Written in place.
        limits: threads and memory of the whole load.
        progress: whether to draw a progress bar.

    Returns:
        The statistics of each device.

    Raises:
        ConversionError: the scratch is too small for all devices. Raised before anything is read. See the executors for
            further errors.
    """
    parts = _parts_by_device(plan, buffers)
    if limits.threads is None and checkpoint.is_remote:
        limits = limits._replace(threads=CONNECTIONS)
    shares = split_limits(limits, [part.size for part in parts])
    stop = threading.Event()
    stats: dict[torch.device, LoadStats] = {}
    errors: dict[torch.device, BaseException] = {}
    note = None if checkpoint.traffic is None else checkpoint.traffic.text
    with shared_progress("reading", progress, note) as bar:

        def fill_part(part: _Part, share: Limits) -> None:
            try:
                stats[part.device] = _fill_device(part, checkpoint, buffers, share, bar, stop)
            except BaseException as error:
                errors[part.device] = error
                raise

        tasks = [partial(fill_part, part, share) for part, share in zip(parts, shares, strict=True)]
        try:
            if len(parts) > 1 and (limits.threads is None or limits.threads >= len(parts)):
                in_context = [_in_this_context(task, part.device) for task, part in zip(tasks, parts, strict=True)]
                run_concurrently(in_context, stop)
            else:
                for task in tasks:
                    task()
        except BaseException as error:
            for part in parts:
                _add_device_notes(part, error, part.device in stats, errors.get(part.device, error))
            errors.clear()  # their tracebacks hold the memory of the loads
            raise
    for device, one in stats.items():
        _LOG.debug("load to %s: %d threads, new memory: %s", device, one.threads, one.pages)
    if checkpoint.traffic is not None:
        _LOG.debug("requests: %r", checkpoint.traffic)
    return {part.device: stats[part.device] for part in parts}


class DeviceBytes(NamedTuple):
    """The size of the load to one device."""

    nbytes: int
    """Bytes of the buffers to fill."""
    is_streamed: bool
    """Whether the bytes pass through pinned memory, as they do to a GPU."""


def split_limits(limits: Limits, sizes: Sequence[DeviceBytes]) -> list[Limits]:
    """Split the limits of a load among its devices, in proportion to their bytes.

    torch rounds pinned memory up to a power of two, so a share of pinned memory is rounded down to one.

    Args:
        limits: the limits of the whole load.
        sizes: the size of the load to each device.

    Raises:
        ConversionError: the scratch is too small for this number of devices.
    """
    if len(sizes) < 2:
        return [limits] * len(sizes)
    weights = [size.nbytes for size in sizes]
    least = [to_device.LEAST_SCRATCH_BYTES if size.is_streamed else to_host.LEAST_SCRATCH_BYTES for size in sizes]
    threads = _threads(limits, len(sizes))
    # With fewer threads than devices, one device after another uses all threads.
    counts = [threads] * len(sizes)
    if threads >= len(sizes):
        counts = _proportional_shares(threads, weights, [1] * len(sizes))
    if limits.scratch_bytes is None:  # each executor allocates what its threads need
        return [limits._replace(threads=count) for count in counts]
    if limits.scratch_bytes < sum(least):
        expected = f"scratch_bytes >= {sum(least)}"
        found = limits.scratch_bytes
        raise ConversionError(message(f"cannot load to {len(sizes)} devices", expected=expected, found=found))
    scratches = [
        1 << share.bit_length() - 1 if size.is_streamed else share
        for size, share in zip(sizes, _proportional_shares(limits.scratch_bytes, weights, least), strict=True)
    ]
    shares = zip(counts, scratches, strict=True)
    return [limits._replace(threads=count, scratch_bytes=scratch) for count, scratch in shares]


def _pinned_bytes(nbytes: int) -> int:
    """Return the bytes that torch allocates for pinned memory: ``nbytes`` rounded up to a power of two."""
    return 1 << (nbytes - 1).bit_length()


def _threads(limits: Limits, devices: int) -> int:
    """Return the number of threads of a load to ``devices`` devices: the caller's, or at least one for each device."""
    if limits.threads is not None:
        return limits.threads
    return max(default_reader_threads(to_device.MOST_THREADS * max(devices, 1)), devices)


def _proportional_shares(total: int, weights: Sequence[int], least: Sequence[int]) -> list[int]:
    """Divide ``total``: each share is its minimum in ``least``, plus a part of the rest in proportion to its weight."""
    weights = weights if any(weights) else [1] * len(weights)
    rest, total_weight = total - sum(least), sum(weights)
    ends = [rest * weight // total_weight for weight in accumulate(weights, initial=0)]
    return [minimum + stop - start for minimum, (start, stop) in zip(least, pairwise(ends), strict=True)]


class _Part(NamedTuple):
    """The part of a load that fills one device."""

    device: torch.device
    plan: CopyPlan
    """The plan of the targets on this device."""
    transfer: Device | None
    """The interface for streams and pinned memory of the device; None for the host."""
    size: DeviceBytes


def _parts_by_device(plan: CopyPlan, buffers: Mapping[str, Tensor]) -> list[_Part]:
    """Group the targets of a load by the device of their buffers.

    Call this in the caller's thread: the streams of the load will run behind the current streams of this thread.
    """
    groups: dict[torch.device, list[Target]] = {}
    for target in plan.targets:
        groups.setdefault(buffers[target.name].device, []).append(target)
    parts = []
    for device, targets in groups.items():
        transfer = transfer_device(device)
        nbytes = sum(buffers[target.name].nbytes for target in targets)
        size = DeviceBytes(nbytes, transfer is not None)
        parts.append(_Part(device, replace(plan, targets=tuple(targets)), transfer, size))
    return parts


def _fill_device(
    part: _Part,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    limits: Limits,
    progress: SharedBar | bool,
    stop: threading.Event,
) -> LoadStats:
    threads, scratch_bytes, device_scratch_bytes, huge_pages = limits
    if part.transfer is None:
        return load_to_host(
            part.plan,
            checkpoint,
            buffers,
            threads=threads,
            scratch_bytes=scratch_bytes,
            huge_pages=huge_pages,
            progress=progress,
            stop=stop,
        )
    return load_to_device(
        part.plan,
        checkpoint,
        buffers,
        part.transfer,
        threads=threads,
        scratch_bytes=scratch_bytes,
        device_scratch_bytes=device_scratch_bytes,
        progress=progress,
        stop=stop,
    )


def _in_this_context(task: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Wrap a task for another thread, so that it runs with the inference mode, default device and stream of this one.

    The stream is the current stream of this thread on ``device``. Grad mode and autocast are not carried over: a load
    records no gradients and chooses its dtypes itself.
    """
    inference, default = torch.is_inference_mode_enabled(), torch.get_default_device()
    # In a new thread the current device is 0, and the first call would create a context on it.
    on_device = device.type == "cuda" and torch.cuda.is_initialized()
    stream = torch.cuda.current_stream(device) if on_device else None

    def run() -> None:
        with ExitStack() as state:
            state.enter_context(torch.inference_mode(inference))
            if default.type != "cpu":
                state.enter_context(default)
            if stream is not None:
                state.enter_context(torch.cuda.stream(stream))
            task()

    return run


def _add_device_notes(part: _Part, error: BaseException, is_complete: bool, own_error: BaseException) -> None:
    """Add the state of one device to the error that ends a load: its complete targets, or its own error.

    Args:
        part: the part of the load that fills the device.
        error: the error that ends the load.
        is_complete: whether the device is filled.
        own_error: the error of the device's executor, which names the complete targets; ``error`` if it raised none.
    """
    if is_complete:
        add_filled_targets(error, [target.name for target in part.plan.targets], len(part.plan.targets))
    elif own_error is not error:
        notes = getattr(own_error, "__notes__", ())
        failed = (
            ()
            if isinstance(own_error, Stopped)
            else (f"  also:     on {part.device}, {type(own_error).__name__}: {own_error}",)
        )
        for text in (*failed, *notes):
            add_note(error, text)
