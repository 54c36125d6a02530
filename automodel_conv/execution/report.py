"""``LoadReport``, the outcome of a load, and the clock that times its phases."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.stats import LoadStats
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems


@dataclass(frozen=True)
class LoadReport:
    """The outcome of a load.

    Attributes:
        missing_keys: targets that nothing provided, less what the model says to ignore and what is tied.
        unexpected_keys: target names that the model does not have, less what it says to ignore.
        mismatched_keys: ``(name, found shape, expected shape)``; those targets were left as they were.
        duplicated_keys: ``(name, sources)`` where several sources claim a target; the first was taken.
        fallbacks: targets made by upstream's own code, because an operation could not be lowered.
        bytes_read: bytes of tensor data that were read; mapped targets are not read.
        seconds: by phase: ``open``, ``plan``, ``read``.
        peak_extra_bytes: upper bound of the memory used beside the final buffers: scratch on the host and on the
            device, and second copies of parameters that the checkpoint holds under two names, unless they are mapped.
            What upstream's own code allocates is not in it.
        left_out: tensors of the checkpoint, by their names in it, that nothing was made of, and of its files.
        unindexed: name and file of each tensor that was not read, since the index does not give it to that file.
        carried: always empty: a model takes nothing that it has no place for.
        copied_by_kernels: copies that Triton kernels made on a device.
        copied_by_torch: copies that torch made on a device, because no kernel fits them or none can run there.
        without_kernels: why no kernel can run on the device; None where they can, where all bytes only move, and for
            loads to the host.
        threads: the most that read at the same time, of all devices together.
        pages: the new host memory by the size of its pages, and how fast each size was made; ``str`` says it in words;
            None where no target was read to the host.
        bytes_mapped: bytes of the targets that were mapped (``memory_map=True``). They were not read: their pages come
            into memory when they are touched.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    duplicated_keys: tuple[tuple[str, tuple[str, ...]], ...]
    fallbacks: tuple[str, ...]
    bytes_read: int
    seconds: Mapping[str, float]
    peak_extra_bytes: int
    left_out: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    unindexed: tuple[tuple[str, str], ...] = ()
    copied_by_kernels: int = 0
    copied_by_torch: int = 0
    without_kernels: str | None = None
    threads: int = 0
    pages: PageUse | None = None
    bytes_mapped: int = 0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes read per second of the read phase; mapped ones do not count."""
        return self.bytes_read / 1e9 / max(self.seconds["read"], 1e-9)


class LoadedStateDict(dict[str, Tensor]):
    """A state dict that also carries the ``LoadReport`` of how it was made, and the layout of its experts."""

    report: LoadReport
    layout: str | None = None
    """As the caller has asked for it, or as the files say where names are kept; None: as the model has them."""


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("open", "plan", "read"), 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def report_of(
    checkpoint: Checkpoint,
    plan: CopyPlan,
    problems: Problems,
    clock: Clock,
    stats: Mapping[torch.device, LoadStats],
    mapped: Mapping[str, Tensor],
    extra_bytes: int = 0,
) -> LoadReport:
    return LoadReport(
        missing_keys=tuple(problems.missing),
        unexpected_keys=tuple(problems.unexpected),
        mismatched_keys=tuple(problems.mismatched),
        duplicated_keys=tuple(problems.duplicated),
        fallbacks=plan.fallbacks,
        bytes_read=sum(part.bytes_read for part in stats.values()),
        seconds=clock.seconds,
        left_out=checkpoint.left_out(plan.unused_sources),
        unindexed=checkpoint.unindexed,
        peak_extra_bytes=sum(part.scratch_bytes + part.device_scratch_bytes for part in stats.values()) + extra_bytes,
        copied_by_kernels=sum(part.work.by_kernels for part in stats.values()),
        copied_by_torch=sum(part.work.by_torch for part in stats.values()),
        threads=sum(part.threads for part in stats.values()),
        pages=next((part.pages for device, part in stats.items() if device.type == "cpu"), None),
        without_kernels=next((part.without_kernels for part in stats.values() if part.without_kernels), None),
        bytes_mapped=sum(tensor.nbytes for tensor in mapped.values()),
    )
