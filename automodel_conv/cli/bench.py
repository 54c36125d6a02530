"""Measure how fast a checkpoint loads on this machine, how fast it could load, and what limits it.

The measurement loads the targets of a plan up to a number of bytes, so the checkpoint may be larger than memory. The
roof is the time to read the same bytes, in runs of the same length, into new memory without laying them out, with huge
or small pages, whichever is faster here. Memory is as found.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from automodel_conv.compiling.planned import compile_plan
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution import page_calls
from automodel_conv.execution.buffers import allocate, byte_view
from automodel_conv.execution.host import default_threads, load_to_host
from automodel_conv.execution.new_memory import NewMemory
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.reading import OpenFiles, read
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_downloaded
from automodel_conv.files.source import opened
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.schedule.host import RUN_BYTES, divide, runs
from automodel_conv.schedule.jobs import Read, ReadInPlace, Reads

DEFAULT_SAMPLE_BYTES = 8 * 10**9
RUNS = 3

_PROBE_BYTES = 1 << 20
_TOUCH_BYTES = 256 << 20
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


@dataclass(frozen=True)
class Bench:
    """What was measured; medians where there are several runs."""

    files: int
    tensors: int
    nbytes: int
    """Of all tensors that the plan reads."""
    sample_nbytes: int
    """Of those that were timed."""
    sample_targets: int
    scratch_nbytes: int
    """Of the sample: transposed, interleaved, cast or decoded on the way; the rest is read straight to its place."""
    open_seconds: float
    plan_seconds: float
    """When all imports are done."""
    cached: float | None
    """Share of the sample that lay in the page cache before it was first read; None where the system cannot tell."""
    first_seconds: float
    """The first read of the sample, as the roof reads it."""
    roof_seconds: Mapping[int, float]
    """Keyed by threads; from the page cache, with pages of the faster size."""
    roof_has_huge_pages: bool
    """The size that is faster with most numbers of threads."""
    default_threads: int
    """Of a load where nobody says it."""
    load_seconds: Mapping[int, float]
    """By threads, from the page cache, without opening and planning."""
    pages: PageUse
    """The new memory of the last load, which has measured the faster size."""
    touch_gb_per_s: float
    """First writes to new memory in huge pages, where the system gives any, by one thread."""
    touch_small_gb_per_s: float
    """The same in small pages."""
    huge_pages: str | None
    """What the system lets processes have: "always", "madvise" or "never"; None where it has no such setting."""
    memory_bytes: int
    """Of the machine."""

    @property
    def threads(self) -> int:
        """Of the fastest load."""
        return min(self.load_seconds, key=lambda threads: self.load_seconds[threads])

    @property
    def share_of_roof(self) -> float:
        """The time of the fastest read of the bytes, in that of the fastest load."""
        return min(self.roof_seconds.values()) / self.load_seconds[self.threads]


def bench(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    use_model: bool = True,
    most_bytes: int = DEFAULT_SAMPLE_BYTES,
    most_threads: int | None = None,
    drop_cache: bool = False,
) -> Bench:
    """Measure loads to host memory.

    Args:
        path, layout, dtype: see ``load_state_dict``.
        use_model: names of the model of ``config.json``; False: those of the checkpoint.
        most_bytes: of the targets that are timed, but at most a third of the machine's memory.
        most_threads: threads are 1, 2, 4 and so on up to this; None: the default of loads.
        drop_cache: first let the system forget what it holds of the files, so that the first read is the disk's.

    Raises:
        CheckpointError, NameProblems, QuantizationError, UnsupportedError: see ``compile_plan``; or there is nothing
            to time.
        ReadError: reading failed.
    """
    rules = None if use_model else []
    compile_plan(path, rules=rules, layout=layout, dtype=dtype)  # imports what it needs
    start = time.perf_counter()
    checkpoint = open_downloaded(path)
    opened_at = time.perf_counter()
    plan = compile_plan(checkpoint, rules=rules, layout=layout, dtype=dtype)
    planned = time.perf_counter()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sample = _sample(plan, min(most_bytes, memory // 3))
    if not sample.bytes_read:
        raise UnsupportedError(
            message("no tensor here is read by plan, so there is nothing to time", where=checkpoint.path)
        )
    reads = _reads(sample, checkpoint)
    if drop_cache:
        for source in checkpoint.sources:
            with opened(source) as file:
                if (fd := file.descriptor()) is not None:
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
    medians = {way: statistics.median(found) for way, found in roofs.items()}
    huge_wins = sum(medians[threads, True] < medians[threads, False] for threads in counts)
    in_place, _ = divide(sample.targets, [t.copies for t in sample.targets], checkpoint, plan.sources.decodes)
    return Bench(
        files=len(checkpoint.files),
        tensors=len(checkpoint.names),
        nbytes=plan.bytes_read,
        sample_nbytes=sample.bytes_read,
        sample_targets=len(sample.targets),
        scratch_nbytes=sample.bytes_read - in_place.total_bytes,
        open_seconds=opened_at - start,
        plan_seconds=planned - opened_at,
        cached=cached,
        first_seconds=first,
        default_threads=default_threads(),
        roof_seconds={threads: min(medians[threads, True], medians[threads, False]) for threads in counts},
        roof_has_huge_pages=2 * huge_wins > len(counts),
        load_seconds={threads: statistics.median(found) for threads, found in loads.items()},
        pages=pages,
        touch_gb_per_s=_touch_gb_per_s(huge=True),
        touch_small_gb_per_s=_touch_gb_per_s(huge=False),
        huge_pages=_huge_pages(),
        memory_bytes=memory,
    )


def advice(found: Bench) -> list[str]:
    """What bounds these loads, and what would make them faster, a sentence or two each."""
    roof, load = min(found.roof_seconds.values()), found.load_seconds[found.threads]
    gb = found.sample_nbytes / 1e9
    said = []
    if found.cached is not None and found.cached < 0.9 and found.first_seconds > 2 * roof:
        text = f"The disk: it gives {gb / found.first_seconds:.2f} GB/s, and files in the page cache {gb / roof:.2f}."
        if found.nbytes > found.memory_bytes // 2:
            text += " The checkpoint is too large to stay there beside the model; only a faster disk helps."
        said.append(text)
    if found.huge_pages == "never":
        said.append(
            f"Huge pages are off; without them new memory is written at {found.touch_small_gb_per_s:.1f} GB/s. "
            f"'echo madvise > {_HUGE_PAGES}', as root, lets loads ask for them, where they are faster."
        )
    by_default = found.load_seconds[found.default_threads]
    if by_default > 1.1 * load:
        said.append(
            f"Threads: {found.threads} load in {load:.2f} s, the default of {found.default_threads} in "
            f"{by_default:.2f} s. Load with {found.threads}."
        )
    share = found.scratch_nbytes / found.sample_nbytes
    if found.share_of_roof < 0.7 and share > 0.1:
        said.append(
            f"Copies: {share:.0%} of the bytes are transposed, interleaved, cast or decoded on the way, by the cores. "
            "A checkpoint converted once to the layout and dtype that is loaded (automodel-conv convert) is read "
            "straight to its place."
        )
    names = found.open_seconds + found.plan_seconds
    if names > 0.3 * load * found.nbytes / found.sample_nbytes:
        said.append(
            f"Names: opening and planning take {names:.2f} s for {found.tensors} tensors. A checkpoint with grouped "
            "experts has fewer."
        )
    return said or [f"The read itself: the fastest load takes {1 / found.share_of_roof:.2f} times as long as it."]


def _sample(plan: CopyPlan, most_bytes: int) -> CopyPlan:
    """The first targets, at least one, up to a number of bytes; none that upstream's own code makes."""
    targets: list[Target] = []
    nbytes = 0
    for target in plan.targets:
        if target.fallback is None and target.nbytes and (not targets or nbytes + target.nbytes <= most_bytes):
            targets.append(target)
            nbytes += target.nbytes
    return replace(plan, targets=tuple(targets))


def _reads(plan: CopyPlan, checkpoint: Checkpoint) -> list[ReadInPlace]:
    """The sources of a plan in the order of the files, each to a place of its own behind the one before."""
    decodes = plan.sources.decodes
    rows = {part for row in plan.used_sources for part in (row, *(decodes[row].parts if row in decodes else ()))}
    reads: list[Read] = []
    start = 0
    for row in sorted(rows, key=lambda row: (checkpoint.file_ids[row], checkpoint.offsets[row])):
        if nbytes := checkpoint.nbytes[row]:
            reads.append(Read(checkpoint.file_ids[row], checkpoint.offsets[row], nbytes, 0, start))
            start += nbytes
    return [ReadInPlace(run) for run in runs(Reads.from_list(reads), RUN_BYTES)]


def _read(jobs: Sequence[ReadInPlace], checkpoint: Checkpoint, threads: int, huge: bool) -> None:
    memory = torch.empty(sum(job.reads.total_bytes for job in jobs), dtype=torch.uint8, device="cpu")
    pages = NewMemory([memory], huge)
    views = [byte_view(memory)]
    files = OpenFiles(checkpoint, (job.reads for job in jobs))

    def take(job: ReadInPlace) -> None:
        pages.populate_for(job)
        read(job.reads, checkpoint, files, views)

    try:
        run_in_threads(jobs, threads, lambda: take)
    finally:
        files.close()


def _load(plan: CopyPlan, checkpoint: Checkpoint, threads: int) -> PageUse:
    return load_to_host(plan, checkpoint, allocate(plan.targets), threads=threads).pages


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _counts(default: int, most: int | None) -> list[int]:
    """1, 2, 4 and so on up to ``most``, and the default."""
    most = default if most is None else most
    return sorted({default, most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})


def _cached(jobs: Sequence[ReadInPlace], checkpoint: Checkpoint) -> float | None:
    """Share of the bytes that the page cache holds, by looking at one in each MiB."""
    seen = []
    for job in jobs:
        reads = job.reads
        with opened(checkpoint.sources[int(reads.file[0])]) as file:
            fd = file.descriptor()
            offsets = range(int(reads.offset_bytes[0]), int(reads.stop_bytes[-1]), _PROBE_BYTES)
            seen += [None if fd is None else system.is_cached(fd, offset) for offset in offsets]
    known = [found for found in seen if found is not None]
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
