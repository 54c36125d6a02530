"""``LoadReport``, the outcome of a load, and a clock for the phases of the load."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from automodel_conv.errors import size_text
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.report_text import Row, cost_rows, count_row, memory_row, text_of
from automodel_conv.execution.stats import LoadStats
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.remote.connections import Traffic
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems


@dataclass(frozen=True)
class LoadReport:
    """The outcome of a load; ``print`` shows it.

    Attributes:
        missing_keys: names of targets that no source provided, except those that the model ignores or ties.
        unexpected_keys: target names that the model does not have, except those that it ignores.
        mismatched_keys: ``(name, shape in the checkpoint, shape in the model)`` of targets that were left unchanged.
        duplicated_keys: ``(name, sources)`` of targets that several sources claim; the first source was used.
        fallbacks: names of targets that transformers' own code computed, because strided copies cannot.
        bytes_read: bytes of tensor data that were requested from the files. A read continues across a gap of at most
            64 KiB between bytes that the targets need; the bytes of such gaps count. Mapped targets are not read.
        seconds: seconds by phase: ``open``, ``plan``, ``read``.
        peak_extra_bytes: upper bound of the memory used in addition to the final buffers, in bytes: scratch on the host
            and on the devices, and second copies of parameters that the checkpoint has under two names, unless they
            are mapped. Memory that transformers' own code allocates is not included.
        left_out: names of tensors of the checkpoint and its files that no target uses.
        unindexed: name and file of each tensor that was not read because the index does not map it to that file.
        carried: always empty, because a load does not carry tensors over; saves and conversions do.
        copied_by_kernels: number of copies on a device by Triton kernels.
        copied_by_torch: number of copies on a device by torch, because no kernel fits them or none can run there.
        without_kernels: the reason why no kernel can run on the device. None if kernels can run, if all bytes only
            move, and for loads to the host.
        threads: largest number of threads that read at the same time, for all devices together.
        pages: bytes of new host memory by page size, and the speed of each size; ``str`` describes them. None if no
            target was read to the host.
        bytes_mapped: bytes of the targets that were mapped (``memory_map=True``). They were not read: the system reads
            their pages on the first access.
        computed: targets that ``load_with`` left to the loading code itself, and why, by name.
        adapted: names of targets that an adapter changed.
        rewritten: names of targets to which loading code writes elements more than once; the last write counts.
        requests: number of requests for bytes that are not on this machine, since the checkpoint was opened; like the
            next three, 0 for files on this machine.
        retries: number of requests that were repeated because of a fault that passed.
        connections: largest number of connections that were open at the same time.
        bytes_received: bytes of all answers, with headers of files and copies of small files.

    Example:
        >>> import torch
        >>> from automodel_conv import load_model
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": torch.ones(2, 3), "gain": torch.ones(2)}, f"{directory}/model.safetensors")
        ...     report = load_model(torch.nn.Linear(3, 2), directory, strict=False)
        >>> report.missing_keys, report.unexpected_keys, report.bytes_read
        (('bias',), ('gain',), 24)
        >>> sorted(report.seconds)
        ['open', 'plan', 'read']
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
    computed: Mapping[str, str] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    requests: int = 0
    retries: int = 0
    connections: int = 0
    bytes_received: int = 0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes read per second of the read phase, without mapped bytes."""
        return self.bytes_read / 1e9 / max(self.seconds["read"], 1e-9)

    def __str__(self) -> str:
        return text_of(load_rows(self))


def load_rows(report: LoadReport) -> list[Row]:
    """Return the rows of the report of a load, those of devices and of rare problems only if they are not empty."""
    rows = cost_rows("read", report.bytes_read, report.gb_per_s)
    rows += [Row("mapped", size_text(report.bytes_mapped))] if report.bytes_mapped else []
    if report.requests:
        requests = f"{report.requests}, {report.retries} of them repeated"
        rows.append(Row("received", size_text(report.bytes_received)))
        rows += [Row("requests", requests), Row("connections, at most", str(report.connections))]
    rows.append(Row("seconds", f"{sum(report.seconds.values()):.3f}"))
    labels = {"plan": "plan, with imports"}
    rows += [Row(f"seconds: {labels.get(phase, phase)}", f"{s:.3f}") for phase, s in report.seconds.items()]
    rows += [memory_row(report.peak_extra_bytes), Row("threads, at most", str(report.threads))]
    rows += [] if report.pages is None else [Row("new memory", str(report.pages))]
    rows.append(count_row("computed by transformers' own code", report.fallbacks))
    if report.copied_by_kernels or report.copied_by_torch:
        rows.append(Row("copies on the device by kernels", str(report.copied_by_kernels)))
        rows.append(Row("copies on the device by torch", str(report.copied_by_torch)))
    rows += [] if report.without_kernels is None else [Row("no kernels, because", report.without_kernels)]
    wrong = [f"{name}: {list(stored)}, not {list(own)} as in the model" for name, stored, own in report.mismatched_keys]
    rows.append(count_row("missing", report.missing_keys))
    rows.append(count_row("unexpected", report.unexpected_keys))
    rows.append(count_row("wrong shape", wrong))
    rows.append(count_row("left out", report.left_out))
    several = [f"{name}: {', '.join(sources)}" for name, sources in report.duplicated_keys]
    unindexed = [f"{name} of {file}" for name, file in report.unindexed]
    computed = [f"{name}: {reason}" for name, reason in report.computed.items()]
    rare = [
        count_row("changed by the adapter", report.adapted),
        count_row("claimed by several sources", several),
        count_row("unindexed", unindexed),
        count_row("computed by the loading code", computed),
        count_row("written twice", report.rewritten),
    ]
    return rows + [row for row in rare if row.names]


class LoadedStateDict(dict[str, Tensor]):
    """A state dict with the report of its load and the layout of its experts."""

    report: LoadReport
    """The outcome of the load that returned this dict."""
    layout: str | None = None
    """Layout that the caller requested, or that the files state if names are kept. None: the model's own layout."""


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("open", "plan", "read"), 0.0)
        self.restart()

    def restart(self) -> None:
        """Begin a lap now, so that the time since the last lap counts for no phase."""
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
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
    adapted: Iterable[str] = (),
) -> LoadReport:
    """Build the report of a load from its plan, problems, times and statistics by device."""
    traffic = Traffic() if checkpoint.traffic is None else checkpoint.traffic
    return LoadReport(
        missing_keys=tuple(problems.missing),
        unexpected_keys=tuple(problems.unexpected),
        mismatched_keys=tuple(problems.mismatched),
        duplicated_keys=tuple(problems.duplicated),
        fallbacks=plan.fallbacks,
        bytes_read=sum(one.bytes_read + one.gap_bytes for one in stats.values()),
        seconds=clock.seconds,
        left_out=checkpoint.left_out(plan.unused_sources),
        unindexed=checkpoint.unindexed,
        peak_extra_bytes=sum(one.scratch_bytes + one.device_scratch_bytes for one in stats.values()) + extra_bytes,
        copied_by_kernels=sum(one.counts.by_kernels for one in stats.values()),
        copied_by_torch=sum(one.counts.by_torch for one in stats.values()),
        threads=sum(one.threads for one in stats.values()),
        pages=next((one.pages for device, one in stats.items() if device.type == "cpu"), None),
        without_kernels=next((one.without_kernels for one in stats.values() if one.without_kernels), None),
        bytes_mapped=sum(tensor.nbytes for tensor in mapped.values()),
        adapted=tuple(adapted),
        requests=traffic.requests,
        retries=traffic.retries,
        connections=traffic.most_connections,
        bytes_received=traffic.bytes_received,
    )
