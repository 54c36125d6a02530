"""From files to buffers wherever they are: each device by the executor made for it, all devices at the same time."""

from __future__ import annotations

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


class Limits(NamedTuple):
    """The threads and memory that a load may use; None for the executors' own defaults."""

    threads: int | None = None  # of all devices together
    scratch_bytes: int | None = None  # of host memory, of all devices together
    device_scratch_bytes: int | None = None  # on each device
    huge_pages: bool | None = None  # of new host memory


def limits_in_budget(
    memory_budget: int | None, limits: Limits, plan: CopyPlan, buffers: Mapping[str, Tensor], extra_bytes: int = 0
) -> Limits:
    """Limits under which a load uses at most ``memory_budget`` bytes beside its buffers, on host and devices together.

    Limits that are given stay as they are; the others are made smaller where they must be.

    Args:
        extra_bytes: that the caller needs besides.

    Raises:
        UnsupportedError: upstream's own code makes a target, and allocates as it does.
        ConversionError: the budget is too small; says how much is needed.
    """
    if memory_budget is None:
        return limits
    if plan.fallbacks:
        found = "\n" + listing(plan.fallbacks)
        raise UnsupportedError(message("the memory of transformers' own code cannot be bounded", found=found))
    homes = {buffers[target.name].device for target in plan.targets}
    devices = sum(transfer_device(home) is not None for home in homes)
    # With nothing to load the least is that of the host, as it has always been.
    least = devices * to_device.LEAST_SCRATCH_BYTES + (devices < max(len(homes), 1)) * to_host.LEAST_SCRATCH_BYTES
    least_on_each = to_device.LEAST_SCRATCH_BYTES if devices else 0
    left = memory_budget - extra_bytes
    host, on_each = limits.scratch_bytes, limits.device_scratch_bytes if devices else 0
    if host is None:
        # Pinned memory comes in powers of two.
        most = left // 4 if devices and on_each is None else left - devices * (on_each or 0)
        most = 1 << max(most, 1).bit_length() - 1 if devices else most
        threads = _threads(limits, len(homes))
        host = min(most, _pinned_bytes(ring_of(threads, None).nbytes) if devices else to_host.DEFAULT_SCRATCH_BYTES)
        host = max(host, least) if len(homes) > 1 else host
    if on_each is None:
        on_each = min((left - host) // devices, to_device.DEFAULT_DEVICE_SCRATCH_BYTES)
    if host + devices * on_each > left or host < least or on_each < least_on_each:
        needed = extra_bytes + max(limits.scratch_bytes or least, least)
        if devices:
            needed += devices * max(limits.device_scratch_bytes or 4 * least_on_each, least_on_each)
        expected = f"at least {needed} bytes"
        raise ConversionError(message("no load fits into memory_budget", expected=expected, found=memory_budget))
    return limits._replace(scratch_bytes=host, device_scratch_bytes=on_each or None)


def fill(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    limits: Limits,
    *,
    progress: bool = False,
) -> dict[torch.device, LoadStats]:
    """Fill the buffers of all targets, on all devices at the same time, each in a thread of its own; see the executors.

    Threads and scratch are shared out by what each device is filled with; where there are more devices than threads,
    one is filled after the other. The first error, or an interrupt, ends the loads of the others too; it is raised
    when nothing is under way any more, and names the targets that are complete, on each device.

    Raises:
        ConversionError: there is less scratch than all devices need; nothing has been read then.
    """
    parts = _parts(plan, buffers)
    shares = split_limits(limits, [part.need for part in parts])
    stop = threading.Event()
    stats: dict[torch.device, LoadStats] = {}
    errors: dict[torch.device, BaseException] = {}
    with shared_progress("loading", progress) as bar:

        def fill_part(part: _Part, share: Limits) -> None:
            try:
                stats[part.device] = _fill_device(part, checkpoint, buffers, share, bar, stop)
            except BaseException as error:
                errors[part.device] = error
                raise

        works = [partial(fill_part, part, share) for part, share in zip(parts, shares, strict=True)]
        try:
            if len(parts) > 1 and (limits.threads is None or limits.threads >= len(parts)):
                run_concurrently([_as_here(work, part.device) for work, part in zip(works, parts, strict=True)], stop)
            else:
                for work in works:
                    work()
        except BaseException as error:
            for part in parts:
                _note_device(part, error, part.device in stats, errors.get(part.device, error))
            errors.clear()  # whose tracebacks hold the memory of their loads
            raise
    return {part.device: stats[part.device] for part in parts}


class DeviceBytes(NamedTuple):
    """The bytes that a device is filled with, and whether they are streamed to it."""

    nbytes: int
    is_streamed: bool


def split_limits(limits: Limits, needs: Sequence[DeviceBytes]) -> list[Limits]:
    """The limits of each device, in proportion to its bytes; together they are no more than those of the load.

    Pinned memory, which torch rounds up to a power of two, is rounded down to one.

    Raises:
        ConversionError: the scratch is too small for so many devices.
    """
    if len(needs) < 2:
        return [limits] * len(needs)
    weights = [need.nbytes for need in needs]
    least = [to_device.LEAST_SCRATCH_BYTES if need.is_streamed else to_host.LEAST_SCRATCH_BYTES for need in needs]
    # Fewer threads than devices are used by one after the other.
    threads = _threads(limits, len(needs))
    counts = _divided(threads, weights, [1] * len(needs)) if threads >= len(needs) else [threads] * len(needs)
    if limits.scratch_bytes is None:  # each device takes what its threads need
        return [limits._replace(threads=count) for count in counts]
    if limits.scratch_bytes < sum(least):
        expected = f"scratch_bytes >= {sum(least)}"
        found = limits.scratch_bytes
        raise ConversionError(message(f"cannot load to {len(needs)} devices", expected=expected, found=found))
    scratches = [
        1 << share.bit_length() - 1 if need.is_streamed else share
        for need, share in zip(needs, _divided(limits.scratch_bytes, weights, least), strict=True)
    ]
    shares = zip(counts, scratches, strict=True)
    return [limits._replace(threads=count, scratch_bytes=scratch) for count, scratch in shares]


def _pinned_bytes(nbytes: int) -> int:
    """The pinned memory that torch takes: a power of two."""
    return 1 << (nbytes - 1).bit_length()


def _threads(limits: Limits, devices: int) -> int:
    """Threads of a load to so many devices: what is given, or at least one for each."""
    if limits.threads is not None:
        return limits.threads
    return max(default_reader_threads(to_device.MOST_THREADS * max(devices, 1)), devices)


def _divided(total: int, weights: Sequence[int], least: Sequence[int]) -> list[int]:
    """Shares that sum up to ``total``: the least of each, and of what is left a part in proportion to its weight."""
    weights = weights if any(weights) else [1] * len(weights)
    rest, whole = total - sum(least), sum(weights)
    ends = [rest * weight // whole for weight in accumulate(weights, initial=0)]
    return [low + stop - start for low, (start, stop) in zip(least, pairwise(ends), strict=True)]


class _Part(NamedTuple):
    """The part of a load that fills one device."""

    device: torch.device
    plan: CopyPlan
    streamed_to: Device | None
    need: DeviceBytes


def _parts(plan: CopyPlan, buffers: Mapping[str, Tensor]) -> list[_Part]:
    """The parts of a load. Made in the caller's thread: streams will be behind the current ones of this thread."""
    groups: dict[torch.device, list[Target]] = {}
    for target in plan.targets:
        groups.setdefault(buffers[target.name].device, []).append(target)
    parts = []
    for device, targets in groups.items():
        streamed_to = transfer_device(device)
        nbytes = sum(buffers[target.name].nbytes for target in targets)
        need = DeviceBytes(nbytes, streamed_to is not None)
        parts.append(_Part(device, replace(plan, targets=tuple(targets)), streamed_to, need))
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
    if part.streamed_to is None:
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
        part.streamed_to,
        threads=threads,
        scratch_bytes=scratch_bytes,
        device_scratch_bytes=device_scratch_bytes,
        progress=progress,
        stop=stop,
    )


def _as_here(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Work for another thread, with this thread's inference mode, default device and current stream on ``device``.

    Grad mode and autocast are not copied: a load records no gradients, and chooses its dtypes itself.
    """
    inference, default = torch.is_inference_mode_enabled(), torch.get_default_device()
    # A thread's own current device is 0, where the first call would make a context.
    on_device = device.type == "cuda" and torch.cuda.is_initialized()
    stream = torch.cuda.current_stream(device) if on_device else None

    def there() -> None:
        with ExitStack() as state:
            state.enter_context(torch.inference_mode(inference))
            if default.type != "cpu":
                state.enter_context(default)
            if stream is not None:
                state.enter_context(torch.cuda.stream(stream))
            work()

    return there


def _note_device(part: _Part, error: BaseException, is_complete: bool, own: BaseException) -> None:
    """Tell in the error that ends a load what is complete on one device, or what went wrong there besides.

    Args:
        own: what its executor raised, which has told what is complete; ``error`` itself if that has raised nothing.
    """
    if is_complete:
        add_filled_targets(error, [target.name for target in part.plan.targets], len(part.plan.targets))
    elif own is not error:
        notes = getattr(own, "__notes__", ())
        failed = () if isinstance(own, Stopped) else (f"  besides:  on {part.device}, {type(own).__name__}: {own}",)
        for text in (*failed, *notes):
            add_note(error, text)
