"""``LoadReport``, the outcome of a load, and a clock for the phases of the load."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from automodel_conv.errors import rate_text, size_text
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.report_text import Report, Row, cells_of, cost_rows, count_row, memory_row, phase_rows
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.timeline import FILL, FINISH, OPEN, PHASES, PLAN, VERIFY, Span, Timeline, timeline_of
from automodel_conv.execution.timeline_picture import timeline_page
from automodel_conv.execution.timeline_words import seconds_text
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.remote.connections import Traffic
from automodel_conv.pictures.page import FilePath, in_frame, table, write_page
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class LoadReport(Report):
    """The outcome of a load; ``print`` shows it.

    Attributes:
        missing_keys: names of targets that no source provided, except those that the model ignores or ties.
        unexpected_keys: target names that the model does not have, except those that it ignores.
        mismatched_keys: ``(name, shape in the checkpoint, shape in the model)`` of targets that were left unchanged.
        duplicated_keys: ``(name, sources)`` of targets that several sources claim; the first source was used.
        fallbacks: names of targets that transformers' own code computed, because strided copies cannot.
        bytes_read: bytes of tensor data that were requested from the files. A read continues across a gap of at most
            64 KiB between bytes that the targets need; the bytes of such gaps count. Mapped targets are not read.
        seconds: seconds by phase: ``open``, ``plan``, ``read``, and ``verify`` if checksums were compared.
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
        timeline: what each thread did, when, and what it waited for. Equal reports may differ in it.

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
    timeline: Timeline = field(default=Timeline(), compare=False, repr=False)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes read per second of the read phase, without mapped bytes."""
        return self.bytes_read / 1e9 / max(self.seconds["read"], 1e-9)

    def _rows(self) -> list[Row]:
        return load_rows(self)

    def _repr_html_(self) -> str:
        """Return the table of the report and the picture of its timeline, for a notebook."""
        height = min(720, 310 + 22 * len(self.timeline.lanes))
        frame = in_frame(timeline_page(self.timeline, self._title, []), height, "timeline of a load")
        return table(cells_of(load_rows(self))) + frame

    def to_html(self, file: FilePath, *, title: str | None = None) -> None:
        """Write a page that shows the timeline of the load: what each thread did, when, and what it waited for.

        The page is one file, which loads nothing from anywhere. Each bar says what it is when the pointer is over it.
        Below the picture, a sentence says what bound the load, and one for each kind of wait how long all threads
        together waited. The rows of the report follow.

        Args:
            file: path of the page; an existing file is replaced.
            title: title of the page. None: the bytes and seconds of the load.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> import torch
            >>> from automodel_conv import load_state_dict
            >>> from pathlib import Path
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.ones(2, 3)}, f"{directory}/model.safetensors")
            ...     report = load_state_dict(directory, rules=[]).report
            ...     report.to_html(f"{directory}/load.html", title="my load")
            ...     text = Path(directory, "load.html").read_text()
            >>> "<title>my load</title>" in text, "thread 1 read 24 bytes" in text
            (True, True)
        """
        page = timeline_page(self.timeline, self._title if title is None else title, cells_of(load_rows(self)))
        write_page(file, page)

    @property
    def _title(self) -> str:
        return f"load of {size_text(self.bytes_read)} in {seconds_text(self.timeline.seconds)}"


def load_rows(report: LoadReport) -> list[Row]:
    """Return the rows of the report of a load, those of devices and of rare problems only if they are not empty."""
    rows = cost_rows("read", report.bytes_read, report.gb_per_s)
    rows += [Row("mapped", size_text(report.bytes_mapped))] if report.bytes_mapped else []
    if report.requests:
        requests = f"{report.requests}, {report.retries} of them repeated"
        rows.append(Row("received", size_text(report.bytes_received)))
        rows += [Row("requests", requests), Row("connections, at most", str(report.connections))]
    rows.append(Row("seconds", f"{sum(report.seconds.values()):.3f}"))
    rows += phase_rows(report.seconds)
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

    def __repr__(self) -> str:
        return tensors_text(self)


def tensors_text(tensors: Mapping[str, Tensor]) -> str:
    """Return the number and size of tensors by name as one line, without their values."""
    distinct = {id(tensor): tensor.nbytes for tensor in tensors.values()}  # tied names share one tensor
    size = size_text(sum(distinct.values()))
    return f"<{type(tensors).__name__}: {len(tensors)} tensors, {size}; report says more>"


_KIND_OF_PHASE: dict[str | None, str] = {"open": OPEN, "plan": PLAN, "verify": VERIFY, "read": FILL}


class Clock:
    """Seconds by phase, and a span for each lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("open", "plan", "read"), 0.0)
        self.spans: list[Span] = []
        self.restart()
        self.start = self._last

    def restart(self) -> None:
        """Begin a lap now, so that the time since the last lap counts for no phase."""
        self._last = time.perf_counter()

    def lap(self, phase: str | None, kind: str = "") -> None:
        """End a span now, and add its time to a phase.

        Args:
            phase: ``open``, ``plan``, ``verify`` or ``read``; None for no phase.
            kind: kind of the span; "" for that of the phase.
        """
        now = time.perf_counter()
        if phase is not None:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self.spans.append(Span(PHASES, kind or _KIND_OF_PHASE[phase], self._last, now))
        self._last = now

    def timeline(self, stats: Mapping[torch.device, LoadStats]) -> Timeline:
        """Return the timeline of a load that ends now; the time since the last lap is its last span."""
        now = time.perf_counter()
        phases = [*self.spans, Span(PHASES, FINISH, self._last, now)]
        return timeline_of(phases, {str(device): one.spans for device, one in stats.items()}, self.start, now)


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
    report = LoadReport(
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
        timeline=clock.timeline(stats),
    )
    size, rate = size_text(report.bytes_read), rate_text(report.gb_per_s)
    _LOG.info("loaded %s: %s in %.3f s, %s", checkpoint.path, size, report.seconds["read"], rate)
    if report.without_kernels is not None:
        _LOG.warning("copies on the device run without kernels, which is slower: %s", report.without_kernels)
    return report
