"""Group the jobs of a load whose bytes come by requests over a network; pure.

A thread runs the jobs of a group one after another. Bytes of several jobs that follow each other in a file come by one
request, whose answer the jobs receive in turn. So requests are long, while jobs and their scratch stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from automodel_conv.files.source import SMALL_RANGE_BYTES
from automodel_conv.schedule.jobs import Job, Reads

CONNECTIONS = 16
"""Threads of a load over a network, each of which waits for its own requests."""
MOST_REQUEST_BYTES = 16 << 20
"""Bytes of a group of jobs in a large load. Longer requests are no faster, and share the work less evenly."""
LEAST_REQUEST_BYTES = 8 << 20
"""Bytes of a group of jobs in a small load, so that more connections work at the same time."""
# Largest gap between wanted bytes that one request covers, and the largest part of its bytes that gaps may be.
_GAP_BYTES = 1 << 20
_GAP_SHARE = 64
# Ranges that a call may extend: the latest ones, so that the time for many small ranges stays proportional to them.
_OPEN_RANGES = 64


class JobGroup(NamedTuple):
    """Jobs that one thread runs one after another, and the ranges that it requests for them."""

    numbers: tuple[int, ...]
    """Numbers of the jobs."""
    ranges: dict[int, list[tuple[int, int]]]
    """Ranges of bytes that are requested, by the number of their file: first byte and the byte after the last."""


def one_by_one(jobs: Sequence[Job]) -> list[JobGroup]:
    """Return each job as a group of its own, without requests, as for files on this machine."""
    return [JobGroup((number,), {}) for number in range(len(jobs))]


def group_by_requests(jobs: Sequence[Job], threads: int) -> list[JobGroup]:
    """Group the jobs of a load.

    Args:
        jobs: all jobs, in the order of the files.
        threads: number of threads that will run the groups.
    """
    sizes = [job.total_bytes for job in jobs]
    enough = max(LEAST_REQUEST_BYTES, min(MOST_REQUEST_BYTES, sum(sizes) // (2 * threads)))
    groups: list[JobGroup] = []
    numbers: list[int] = []
    nbytes, last_file = 0, -1
    for number, job in enumerate(jobs):
        file = job.place[0]
        if numbers and (nbytes >= enough or file != last_file):
            groups.append(JobGroup(tuple(numbers), ranges_of(job.reads for job in jobs[numbers[0] : numbers[-1] + 1])))
            numbers, nbytes = [], 0
        numbers.append(number)
        nbytes, last_file = nbytes + sizes[number], file
    if numbers:
        groups.append(JobGroup(tuple(numbers), ranges_of(job.reads for job in jobs[numbers[0] : numbers[-1] + 1])))
    return groups


def ranges_of(parts: Iterable[Reads]) -> dict[int, list[tuple[int, int]]]:
    """Return the ranges to request for the reads of jobs that run one after another; see ``JobGroup``.

    Each call of a job extends the range that it follows, or begins a new one.
    """
    ranges: dict[int, list[_Range]] = {}
    for reads in parts:
        for call in reads.calls():
            start, stop = int(call.offset_bytes[0]), int(call.stop_bytes[-1])
            own = ranges.setdefault(int(call.file[0]), [])
            if not any(one.takes(start, stop) for one in own[-_OPEN_RANGES:]):
                own.append(_Range(start, stop))
    return {file: [(one.start, one.stop) for one in own] for file, own in ranges.items()}


class _Range:
    """A range that grows by the calls that follow it."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop
        self.wanted = stop - start

    def takes(self, start: int, stop: int) -> bool:
        """Add a call, unless it does not follow closely enough; return whether it was added."""
        if self.start <= start < self.stop and stop - self.start <= SMALL_RANGE_BYTES:  # as scales of neighbours do
            self.wanted += max(0, stop - self.stop)
            self.stop = max(self.stop, stop)
            return True
        gap = start - self.stop
        gaps = self.stop - self.start - self.wanted
        wanted = self.wanted + stop - start
        if gap < 0 or gap > _GAP_BYTES or _GAP_SHARE * (gaps + gap) > wanted:
            return False
        self.stop, self.wanted = stop, wanted
        return True
