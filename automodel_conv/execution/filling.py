"""From files to buffers wherever they are: each device by the executor made for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.execution.cpu import load_files
from automodel_conv.execution.cuda import streaming_device
from automodel_conv.execution.reading import LoadStats
from automodel_conv.execution.streaming import stream_files
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan


class Limits(NamedTuple):
    """What an executor may use; None for its own default."""

    threads: int | None = None
    scratch_bytes: int | None = None
    device_scratch_bytes: int | None = None


def fill(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    buffers: Mapping[str, Tensor],
    limits: Limits,
    *,
    progress: bool = False,
) -> dict[torch.device, LoadStats]:
    """Fill the buffers of all targets, those of one device after those of another; see the executors."""
    groups: dict[torch.device, list[Target]] = {}
    for target in plan.targets:
        groups.setdefault(buffers[target.name].device, []).append(target)
    stats = {}
    for device, targets in groups.items():
        part = replace(plan, targets=tuple(targets))
        streamed_to = streaming_device(device)
        if streamed_to is None:
            stats[device] = load_files(
                part, checkpoint, buffers, threads=limits.threads, scratch_bytes=limits.scratch_bytes, progress=progress
            )
        else:
            stats[device] = stream_files(part, checkpoint, buffers, streamed_to, **limits._asdict(), progress=progress)
    return stats
