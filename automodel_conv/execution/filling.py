"""From files to buffers wherever they are: each device by the executor made for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, listing, message
from automodel_conv.execution import cpu, streaming
from automodel_conv.execution.cpu import load_files
from automodel_conv.execution.cuda import streaming_device
from automodel_conv.execution.reading import LoadStats, tell_filled
from automodel_conv.execution.streaming import stream_files
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan


class Limits(NamedTuple):
    """What an executor may use; None for its own default."""

    threads: int | None = None
    scratch_bytes: int | None = None
    device_scratch_bytes: int | None = None


def within(
    memory_budget: int | None, limits: Limits, plan: CopyPlan, buffers: Mapping[str, Tensor], extra_bytes: int = 0
) -> Limits:
    """Limits under which a load uses at most ``memory_budget`` bytes beside its buffers, on host and device together.

    What is given in ``limits`` stays as it is; what is not is made smaller where it must be.

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
    on_device = any(streaming_device(buffers[target.name].device) for target in plan.targets)
    least = streaming.LEAST_SCRATCH_BYTES if on_device else cpu.LEAST_SCRATCH_BYTES
    left = memory_budget - extra_bytes
    host, device = limits.scratch_bytes, limits.device_scratch_bytes if on_device else 0
    if host is None:
        # Pinned memory comes in powers of two.
        most = left // 4 if on_device and device is None else left - (device or 0)
        most = 1 << max(most, 1).bit_length() - 1 if on_device else most
        host = min(most, streaming.DEFAULT_SCRATCH_BYTES if on_device else cpu.DEFAULT_SCRATCH_BYTES)
    if device is None:
        device = min(left - host, streaming.DEFAULT_DEVICE_SCRATCH_BYTES)
    if host + device > left or host < least or (on_device and device < least):
        needed = extra_bytes + max(limits.scratch_bytes or least, least)
        if on_device:
            needed += max(limits.device_scratch_bytes or 4 * least, least)
        expected = f"at least {needed} bytes"
        raise ConversionError(message("no load fits into memory_budget", expected=expected, found=memory_budget))
    return limits._replace(scratch_bytes=host, device_scratch_bytes=device or None)


def fill(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    limits: Limits,
    *,
    progress: bool = False,
) -> dict[torch.device, LoadStats]:
    """Fill the buffers of all targets, those of one device after those of another; see the executors.

    An error names the targets of all devices that are complete.
    """
    groups: dict[torch.device, list[Target]] = {}
    for target in plan.targets:
        groups.setdefault(buffers[target.name].device, []).append(target)
    stats = {}
    for device, targets in groups.items():
        part = replace(plan, targets=tuple(targets))
        try:
            stats[device] = _fill_device(part, checkpoint, buffers, device, limits, progress)
        except BaseException as error:
            for before in stats:
                tell_filled(error, [target.name for target in groups[before]], len(groups[before]))
            raise
    return stats


def _fill_device(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    device: torch.device,
    limits: Limits,
    progress: bool,
) -> LoadStats:
    streamed_to = streaming_device(device)
    if streamed_to is not None:
        return stream_files(plan, checkpoint, buffers, streamed_to, **limits._asdict(), progress=progress)
    threads, scratch_bytes, _ = limits
    return load_files(plan, checkpoint, buffers, threads=threads, scratch_bytes=scratch_bytes, progress=progress)
