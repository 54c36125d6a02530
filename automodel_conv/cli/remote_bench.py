"""Measure how fast a checkpoint that is not on this machine loads, and what bounds it: link, latency or this machine.

Ranges are read without placing them, with several numbers of connections, for a few seconds each; then a load follows.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from automodel_conv.cli.bench import DEFAULT_SAMPLE_BYTES, sample_of
from automodel_conv.compiling.planned import compile_plan
from automodel_conv.errors import UnsupportedError, message, rate_text
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.execution.workers import run_concurrently
from automodel_conv.files.checkpoint import Checkpoint, open_source
from automodel_conv.files.remote.connections import Traffic
from automodel_conv.files.source import OpenSource
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.schedule.requests import CONNECTIONS, LEAST_REQUEST_BYTES
from automodel_conv.types import LayoutName

SECONDS = 3.0
"""Time of the reads with each number of connections, and about that of the load."""
COUNTS = (1, 4, CONNECTIONS)
"""Numbers of connections."""
_PINGS = 5
# A load that is slower than this share of the bare reads is bound by this machine.
_SHARE = 0.8
# More connections help if the most of them read this many times as fast as the second most.
_GAIN = 1.25


@dataclass(frozen=True)
class RemoteBench:
    """The measurements of one checkpoint that is not on this machine."""

    files: int
    """Number of files."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of all tensors that the plan reads."""
    open_seconds: float
    """Time to open the checkpoint: the small files and all headers."""
    plan_seconds: float
    """Time to compile the plan, without imports."""
    wait_seconds: float
    """Time from a request for a few bytes to its answer; the median of several."""
    gb_per_s: Mapping[int, float]
    """GB/s of ranges that are read and thrown away, by number of connections."""
    load_bytes: int
    """Bytes that the load read."""
    load_seconds: float
    """Time of the load, without opening and planning."""
    connections: int
    """Number of connections of the load, and the largest of ``gb_per_s``."""
    retries: int
    """Number of requests that were repeated, in all."""

    @property
    def load_gb_per_s(self) -> float:
        """GB/s of the load."""
        return self.load_bytes / 1e9 / self.load_seconds

    @property
    def bound(self) -> str:
        """Name of what bounds the load: "machine", "latency" or "link"."""
        if self.load_gb_per_s < _SHARE * max(self.gb_per_s.values()):
            return "machine"
        fewer = [rate for count, rate in self.gb_per_s.items() if count != self.connections]
        most = max(self.gb_per_s[self.connections], self.load_gb_per_s)  # the load has as many connections
        return "latency" if fewer and most > _GAIN * max(fewer) else "link"


def remote_bench(
    path: str | os.PathLike[str],
    settings: SourceSettings,
    *,
    rules: Sequence[Any] | None = None,
    layout: LayoutName | None = None,
    dtype: torch.dtype | str | None = None,
    most_bytes: int = DEFAULT_SAMPLE_BYTES,
    threads: int | None = None,
    seconds: float | None = None,
) -> RemoteBench:
    """Measure reads of ranges and a load of a checkpoint that is not on this machine.

    Args:
        path, settings: see ``open_checkpoint``.
        rules, layout, dtype: see ``load_state_dict``.
        most_bytes: bytes of targets to load at most; never more than a third of the machine's memory.
        threads: number of connections of the load. None: the default of loads.
        seconds: time of the reads with each number of connections. None: ``SECONDS``.

    Raises:
        CheckpointError, NameProblems, QuantizationError, UnsupportedError: see ``compile_plan``; or there is nothing to
            time.
        ReadError: a read failed.
    """
    compile_plan(open_source(path, settings), rules=rules, layout=layout, dtype=dtype)  # so that imports are not timed
    start = time.perf_counter()
    checkpoint = open_source(path, settings)
    opened = time.perf_counter()
    plan = compile_plan(checkpoint, rules=rules, layout=layout, dtype=dtype)
    planned = time.perf_counter()
    ranges = _ranges(checkpoint)
    if not ranges or not plan.bytes_read:
        raise UnsupportedError(message("the plan reads no tensor, so there is nothing to time", where=checkpoint.path))
    most = CONNECTIONS if threads is None else threads
    seconds = SECONDS if seconds is None else seconds
    following = cycle(ranges)
    rates = {count: _rate(checkpoint, following, count, seconds) for count in sorted({*COUNTS, most}) if count <= most}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    enough = int(max(rates.values()) * 1e9 * seconds) + LEAST_REQUEST_BYTES
    sample = sample_of(plan, min(most_bytes, memory // 3, enough))
    begin = time.perf_counter()
    stats = load_to_host(sample, checkpoint, allocate(sample.targets), threads=most)
    load_seconds = time.perf_counter() - begin
    traffic = checkpoint.traffic or Traffic()
    return RemoteBench(
        files=len(checkpoint.files),
        tensors=len(checkpoint.names),
        nbytes=plan.bytes_read,
        open_seconds=opened - start,
        plan_seconds=planned - opened,
        wait_seconds=_wait_seconds(checkpoint, ranges),
        gb_per_s=rates,
        load_bytes=stats.bytes_read,
        load_seconds=load_seconds,
        connections=most,
        retries=traffic.retries,
    )


def remote_advice(result: RemoteBench) -> str:
    """Return what bounds these loads and how to make them faster, in a few sentences."""
    best, connections = max(result.gb_per_s.values()), result.connections
    if result.bound == "machine":
        return (
            f"This machine: it reads {rate_text(best)} and places {rate_text(result.load_gb_per_s)}. If bytes are "
            "transposed, cast or decoded, a checkpoint that was converted once to the layout and dtype of the load "
            "(automodel-conv convert) is read directly into place."
        )
    if result.bound == "latency":
        return (
            f"Latency: a request waits {1000 * result.wait_seconds:.0f} ms for its answer, and {connections} "
            f"connections are the fastest. Load with more: --threads {2 * connections}."
        )
    return (
        f"The link, or the server: {connections} connections read {rate_text(result.gb_per_s[connections])}, and more "
        "would not be faster. A node cache or a copy on a disk that is faster saves further loads the way."
    )


def _ranges(checkpoint: Checkpoint) -> list[tuple[int, int, int]]:
    """Return the file, the first byte and the byte after the last of ranges that cover the data of remote files."""
    spans: dict[int, tuple[int, int]] = {}
    for file, start, nbytes in zip(checkpoint.file_ids, checkpoint.offsets, checkpoint.nbytes, strict=True):
        if nbytes and checkpoint.sources[file].is_remote:
            first, last = spans.get(file, (start, start))
            spans[file] = min(first, start), max(last, start + nbytes)
    return [
        (file, start, min(start + LEAST_REQUEST_BYTES, last))
        for file, (first, last) in sorted(spans.items())
        for start in range(first, last, LEAST_REQUEST_BYTES)
    ]


def _rate(checkpoint: Checkpoint, ranges: Iterator[tuple[int, int, int]], count: int, seconds: float) -> float:
    """Return the GB/s of reads of ranges by a number of threads, each of which waits for its own requests."""
    files: dict[int, OpenSource] = {}
    lengths: list[int] = []
    stop_all = threading.Event()
    begin = time.perf_counter()

    def read() -> None:
        buffer = memoryview(bytearray(LEAST_REQUEST_BYTES))
        while time.perf_counter() - begin < seconds and not stop_all.is_set():
            file, start, stop = next(ranges)
            if file not in files:
                files[file] = checkpoint.sources[file].open()
            files[file].read_into([buffer[: stop - start]], start)
            lengths.append(stop - start)

    try:
        run_concurrently([read] * count, stop_all)
    finally:
        for opened in files.values():
            opened.close()
    return sum(lengths) / 1e9 / (time.perf_counter() - begin)


def _wait_seconds(checkpoint: Checkpoint, ranges: Sequence[tuple[int, int, int]]) -> float:
    source = checkpoint.sources[ranges[0][0]]
    return statistics.median(_seconds_of(source.identity) for _ in range(_PINGS))


def _seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
