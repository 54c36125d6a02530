"""Measure how fast a checkpoint loads on this machine, how fast it could load, and what limits it.

``bench`` loads targets of a plan up to a number of bytes, so the checkpoint may be larger than memory. The roof is the
time to read the same bytes, in runs of the same length, into new memory without arranging them. It is measured with
huge and with small pages, and the faster size counts. No memory is touched in advance.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from automodel_conv.compiling.planned import compile_plan
from automodel_conv.errors import UnsupportedError, message, rate_text
from automodel_conv.execution import page_calls
from automodel_conv.execution.buffers import allocate, byte_view
from automodel_conv.execution.host import default_threads, load_to_host
from automodel_conv.execution.new_memory import NewMemory
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_source
from automodel_conv.files.source import opened
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.schedule.host import RUN_BYTES, group_reads, split_copies
from automodel_conv.schedule.jobs import Read, ReadInPlace, Reads
from automodel_conv.types import LayoutName

DEFAULT_SAMPLE_BYTES = 8 * 10**9
RUNS = 3
_DEFAULTS = SourceSettings()

_PROBE_BYTES = 1 << 20
_TOUCH_BYTES = 256 << 20
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


@dataclass(frozen=True)
class Bench:
    """The measurements of one checkpoint; medians if there are several runs."""

    files: int
    """Number of files."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of all tensors that the plan reads."""
    sample_nbytes: int
    """Bytes of the sample, the tensors that were timed."""
    sample_targets: int
    """Number of targets in the sample."""
    scratch_nbytes: int
    """Bytes of the sample that are transposed, interleaved, cast or decoded; the rest is read directly into place."""
    open_seconds: float
    """Time to open the checkpoint."""
    plan_seconds: float
    """Time to compile the plan, without imports."""
    cached: float | None
    """Share of the sample that was in the page cache before the first read; None if the system cannot report it."""
    first_seconds: float
    """Time of the first read of the sample, by the method of the roof."""
    roof_seconds: Mapping[int, float]
    """Time of the roof by number of threads, from the page cache, with pages of the faster size."""
    roof_has_huge_pages: bool
    """True if huge pages are faster with most numbers of threads."""
    default_threads: int
    """Number of threads of a load by default."""
    load_seconds: Mapping[int, float]
    """Time of a load by number of threads, from the page cache, without opening and planning."""
    pages: PageUse
    """The new memory of the last load, which has measured the faster size of pages."""
    touch_gb_per_s: float
    """Rate of first writes to new memory by one thread, in huge pages if the system provides any."""
    touch_small_gb_per_s: float
    """Rate of first writes to new memory by one thread, in small pages."""
    huge_pages: str | None
    """The system's setting for huge pages: "always", "madvise" or "never"; None if it has no such setting."""
    memory_bytes: int
    """Memory of the machine."""
    dropped: bool = False
    """Whether the system was asked to drop the files from the page cache before the first read."""

    @property
    def threads(self) -> int:
        """Number of threads of the fastest load."""
        return min(self.load_seconds, key=lambda threads: self.load_seconds[threads])

    @property
    def share_of_roof(self) -> float:
        """Time of the fastest read of the bytes divided by the time of the fastest load."""
        return min(self.roof_seconds.values()) / self.load_seconds[self.threads]


def bench(
    path: str | os.PathLike[str],
    settings: SourceSettings = _DEFAULTS,
    *,
    rules: Sequence[Any] | None = None,
    layout: LayoutName | None = None,
    dtype: torch.dtype | str | None = None,
    most_bytes: int = DEFAULT_SAMPLE_BYTES,
    most_threads: int | None = None,
    drop_cache: bool = False,
) -> Bench:
    """Measure loads to host memory.

    Args:
        path: see ``load_state_dict``. Its files are on this machine.
        settings: see ``open_checkpoint``.
        rules: see ``load_state_dict``.
        layout: see ``load_state_dict``.
        dtype: see ``load_state_dict``.
        most_bytes: bytes of targets to time at most; never more than a third of the machine's memory.
        most_threads: largest number of threads. Loads run with 1, 2, 4 and so on up to it. None: the default of loads.
        drop_cache: drop the files from the page cache first, so that the first read is from the disk.

    Raises:
        CheckpointError: see ``compile_plan``.
        NameProblems: see ``compile_plan``.
        QuantizationError: see ``compile_plan``.
        UnsupportedError: see ``compile_plan``; or there is nothing to time.
        ReadError: a read failed.
    """
    compile_plan(open_source(path, settings), rules=rules, layout=layout, dtype=dtype)  # so that imports are not timed
    start = time.perf_counter()
    checkpoint = open_source(path, settings)
    opened_time = time.perf_counter()
    plan = compile_plan(checkpoint, rules=rules, layout=layout, dtype=dtype)
    planned_time = time.perf_counter()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sample = sample_of(plan, min(most_bytes, memory // 3))
    if not sample.bytes_read:
        raise UnsupportedError(message("the plan reads no tensor, so there is nothing to time", where=checkpoint.path))
    reads = _reads(sample, checkpoint)
    if drop_cache:
        for source in checkpoint.sources:
            with opened(source) as file:
                if (fd := file.descriptor()) is not None:
                    with suppress(OSError):  # only bytes that are on the disk can be dropped
                        system.sync(fd)
                    system.drop_cache(fd)
    cached = _cached(reads, checkpoint)
    counts = _counts(default_threads(), most_threads)
    first = _seconds(partial(_read, reads, checkpoint, counts[-1], huge=False))
    roofs: dict[tuple[int, bool], list[float]] = {(threads, huge): [] for threads in counts for huge in (True, False)}
    loads: dict[int, list[float]] = {threads: [] for threads in counts}
    pages = PageUse()
    for _ in range(RUNS):
        for threads in counts:
            for huge in (True, False):
                roofs[threads, huge].append(_seconds(partial(_read, reads, checkpoint, threads, huge=huge)))
            begin = time.perf_counter()
            pages = _load(sample, checkpoint, threads)
            loads[threads].append(time.perf_counter() - begin)
    medians = {threads_and_huge: statistics.median(times) for threads_and_huge, times in roofs.items()}
    huge_wins = sum(medians[threads, True] < medians[threads, False] for threads in counts)
    in_place, _ = split_copies(sample.targets, [t.copies for t in sample.targets], checkpoint, plan.sources.decodes)
    return Bench(
        files=len(checkpoint.files),
        tensors=len(checkpoint.names),
        nbytes=plan.bytes_read,
        sample_nbytes=sample.bytes_read,
        sample_targets=len(sample.targets),
        scratch_nbytes=sample.bytes_read - in_place.total_bytes,
        open_seconds=opened_time - start,
        plan_seconds=planned_time - opened_time,
        cached=cached,
        first_seconds=first,
        default_threads=default_threads(),
        roof_seconds={threads: min(medians[threads, True], medians[threads, False]) for threads in counts},
        roof_has_huge_pages=2 * huge_wins > len(counts),
        load_seconds={threads: statistics.median(times) for threads, times in loads.items()},
        pages=pages,
        touch_gb_per_s=_touch_gb_per_s(huge=True),
        touch_small_gb_per_s=_touch_gb_per_s(huge=False),
        huge_pages=_huge_pages(),
        memory_bytes=memory,
        dropped=drop_cache,
    )


def advice(result: Bench) -> list[str]:
    """Return what limits these loads and how to make them faster, in a few sentences for each limit."""
    roof, load = min(result.roof_seconds.values()), result.load_seconds[result.threads]
    gb = result.sample_nbytes / 1e9
    sentences = []
    if result.cached is not None and result.cached < 0.9 and result.first_seconds > 2 * roof:
        text = (
            f"The disk: it reads {rate_text(gb / result.first_seconds)}; the page cache reads {rate_text(gb / roof)}."
        )
        if result.nbytes > result.memory_bytes // 2:
            text += " The checkpoint is too large to stay there next to the model, so only a faster disk helps."
        sentences.append(text)
    if result.huge_pages == "never":
        sentences.append(
            f"Huge pages are off; without them new memory is written at {rate_text(result.touch_small_gb_per_s)}. "
            f"'echo madvise > {_HUGE_PAGES}', as root, allows loads to use them if they are faster."
        )
    by_default = result.load_seconds[result.default_threads]
    if by_default > 1.1 * load:
        sentences.append(
            f"Threads: {result.threads} load in {load:.2f} s, the default of {result.default_threads} in "
            f"{by_default:.2f} s. Load with {result.threads}."
        )
    scratch_share = result.scratch_nbytes / result.sample_nbytes
    if result.share_of_roof < 0.7 and scratch_share > 0.1:
        sentences.append(
            f"Copies: {scratch_share:.0%} of the bytes are transposed, interleaved, cast or decoded on the CPU. "
            "A checkpoint that was converted once to the layout and dtype of the load (automodel-conv convert) is read "
            "directly into place."
        )
    name_seconds = result.open_seconds + result.plan_seconds
    if name_seconds > 0.3 * load * result.nbytes / result.sample_nbytes:
        sentences.append(
            f"Names: opening and planning take {name_seconds:.2f} s for {result.tensors} tensors. "
            "A checkpoint with grouped experts has fewer."
        )
    return sentences or [f"The read itself: the fastest load takes {1 / result.share_of_roof:.2f} times as long."]


def sample_of(plan: CopyPlan, most_bytes: int) -> CopyPlan:
    """Return a plan of the first targets, at least one, up to a number of bytes.

    Targets that transformers' own code computes are skipped.
    """
    targets: list[Target] = []
    nbytes = 0
    for target in plan.targets:
        if target.fallback is None and target.nbytes and (not targets or nbytes + target.nbytes <= most_bytes):
            targets.append(target)
            nbytes += target.nbytes
    return replace(plan, targets=tuple(targets))


def _reads(plan: CopyPlan, checkpoint: Checkpoint) -> list[ReadInPlace]:
    """Return reads of the sources of a plan in the order of the files, stored one after another."""
    decodes = plan.sources.decodes
    rows = {part for row in plan.used_sources for part in (row, *(decodes[row].parts if row in decodes else ()))}
    reads: list[Read] = []
    start = 0
    for row in sorted(rows, key=lambda row: (checkpoint.file_ids[row], checkpoint.offsets[row])):
        if nbytes := checkpoint.nbytes[row]:
            reads.append(Read(checkpoint.file_ids[row], checkpoint.offsets[row], nbytes, 0, start))
            start += nbytes
    return [ReadInPlace(run) for run in group_reads(Reads.from_list(reads), RUN_BYTES)]


def _read(jobs: Sequence[ReadInPlace], checkpoint: Checkpoint, threads: int, huge: bool) -> None:
    memory = torch.empty(sum(job.reads.total_bytes for job in jobs), dtype=torch.uint8, device="cpu")
    pages = NewMemory([memory], huge)
    views = [byte_view(memory)]
    files = OpenFiles(checkpoint, jobs)

    def read_job(job: ReadInPlace) -> None:
        pages.populate_for(job.reads)
        read(job.reads, checkpoint, files, views)

    try:
        run_in_threads(jobs, threads, lambda: read_job)
    finally:
        files.close()


def _load(plan: CopyPlan, checkpoint: Checkpoint, threads: int) -> PageUse:
    return load_to_host(plan, checkpoint, allocate(plan.targets), threads=threads).pages


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _counts(default: int, most: int | None) -> list[int]:
    """Return 1, 2, 4 and so on up to ``most``, and the default."""
    most = default if most is None else most
    return sorted({default, most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})


def _cached(jobs: Sequence[ReadInPlace], checkpoint: Checkpoint) -> float | None:
    """Return the share of the bytes in the page cache, estimated from one byte in each MiB."""
    probes = []
    for job in jobs:
        reads = job.reads
        with opened(checkpoint.sources[int(reads.file[0])]) as file:
            fd = file.descriptor()
            offsets = range(int(reads.offset_bytes[0]), int(reads.stop_bytes[-1]), _PROBE_BYTES)
            probes += [None if fd is None else system.is_cached(fd, offset) for offset in offsets]
    known = [is_cached for is_cached in probes if is_cached is not None]
    return sum(known) / len(known) if known else None


def _touch_gb_per_s(huge: bool) -> float:
    memory = torch.empty(_TOUCH_BYTES, dtype=torch.uint8, device="cpu")
    page_calls.advise_huge_pages(memory.data_ptr(), memory.nbytes, huge)
    return _TOUCH_BYTES / 1e9 / _seconds(lambda: memory.fill_(1))


def _huge_pages() -> str | None:
    try:
        with open(_HUGE_PAGES, encoding="ascii") as setting:
            return setting.read().partition("[")[2].partition("]")[0] or None
    except OSError:
        return None
