"""The timeline of a load: what each thread did, when, and what it waited for.

Each thread appends to a list of its own, so nothing is locked. A timeline is bounded: of a long load, neighbouring
spans are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby
from time import perf_counter
from typing import NamedTuple

from automodel_conv.files.waits import seconds_waited

MOST_SPANS = 20_000
"""Maximum number of spans in a timeline."""

# Laps after which a lane merges its spans to at most this number.
_MOST_LAPS = 4096
# A shorter span without bytes is added to the one that follows it.
_LEAST_SECONDS = 5e-6
# A shorter phase is left out.
_LEAST_PHASE_SECONDS = 1e-4

# Name of the lane of the caller's thread.
PHASES = "phases"
# The time before the first span, and before a restart.
_NOTHING = ""
# Phases of the caller's thread.
OPEN, PLAN, VERIFY, MAP, FILL = "open", "plan", "verify", "map", "fill"
CODE, RANKS, SEND, MERGE, FINISH = "code", "ranks", "send", "merge", "finish"
# Work of the thread of an executor.
SCHEDULE, UPSTREAM, DEVICE = "schedule", "upstream", "device"
# Work of the threads that read.
MEMORY, READ, ANSWER, DECODE, COPY = "memory", "read", "answer", "decode", "copy"
SLOT, UPLOAD, WINDOW, KERNELS, LAUNCH, COMPILE = "slot", "upload", "window", "kernels", "launch", "compile"


class Span(NamedTuple):
    """A range of time in which a thread did one thing.

    Example:
        >>> span = Span("thread 3", READ, 0.5, 0.75, 1_000_000)
        >>> span.seconds
        0.25
    """

    lane: str
    """Name of the thread, such as "thread 3"; "phases" for the phases of the caller's thread."""
    kind: str
    """What the thread did; the reference of reports lists all kinds."""
    begin: float
    """Seconds since the load began; in ``Spans``, seconds of ``time.perf_counter``."""
    end: float
    nbytes: int = 0
    """Bytes that it read, copied or decoded; 0 if they are not counted."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


_Fields = tuple[str, str, float, float, int]
"""The fields of a ``Span``."""


class Spans(NamedTuple):
    """The spans of a load to one device, on the clock of ``time.perf_counter``."""

    spans: tuple[_Fields, ...] = ()
    """Fields of spans, lane by lane, and those of a lane in order of time."""
    merged_seconds: float = 0.0
    """See ``Timeline``."""


@dataclass(frozen=True, repr=False)
class Timeline:
    """The spans of a load, by lane and then by time; spans of one lane do not overlap.

    Attributes:
        spans: the spans, at most ``MOST_SPANS``.
        seconds: seconds from the beginning of the load to its end.
        merged_seconds: 0 if all spans are as they were. Otherwise, of the spans of a lane that begin in one cell of
            time of this many seconds, those of one kind are merged: sums are exact, the order within a cell is not.

    Example:
        >>> timeline = Timeline((Span("thread 1", READ, 0.0, 0.5, 8), Span("thread 2", READ, 0.0, 1.0, 8)), 1.0)
        >>> timeline.lanes, timeline.seconds_of(READ), timeline.bytes_of(READ)
        (('thread 1', 'thread 2'), 1.5, 16)
    """

    spans: tuple[Span, ...] = ()
    seconds: float = 0.0
    merged_seconds: float = 0.0

    def __repr__(self) -> str:
        return f"<Timeline: {len(self.spans)} spans in {self.seconds:.3f} s>"

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of the lanes, in order."""
        return tuple(dict.fromkeys(span.lane for span in self.spans))

    def seconds_of(self, kind: str) -> float:
        """Return the seconds of all spans of a kind, in all lanes together."""
        return sum(span.seconds for span in self.spans if span.kind == kind)

    def bytes_of(self, kind: str) -> int:
        """Return the bytes of all spans of a kind."""
        return sum(span.nbytes for span in self.spans if span.kind == kind)


class Lane:
    """The recorder of one thread: each lap ends a span that began when the one before it ended.

    A lap must be cheap after a copy that has emptied the caches of the processor, so it does as little as possible.

    Args:
        name: name of the thread.
        is_remote: whether the thread may wait for answers of servers.
    """

    __slots__ = ("_is_remote", "_laps", "_spans", "_waited", "cell", "name")

    def __init__(self, name: str, is_remote: bool = False):
        self.name = name
        self.cell = 0.0
        """Seconds of a cell in which spans are merged; 0 if none are."""
        self._is_remote = is_remote
        self._spans: list[_Fields] = []
        self._laps: list[tuple[str, float, int]] = []
        """Kind, end and bytes of the laps that are in no span yet."""
        self.restart()

    def restart(self) -> None:
        """Begin the next span now; the time since the last one belongs to none."""
        self._waited = seconds_waited()
        self.lap(_NOTHING)

    def lap(self, kind: str, nbytes: int = 0) -> None:
        """End a span of a kind now."""
        self._laps.append((kind, perf_counter(), nbytes))

    def read_lap(self, nbytes: int) -> None:
        """End a span of reading now; what the thread waited for answers of a server is a span before it.

        Every job reads, so this is where the spans of a long load are merged.
        """
        if self._is_remote:
            before, self._waited = self._waited, seconds_waited()
            if self._waited > before:
                self._laps.append((ANSWER, min(perf_counter(), self._laps[-1][1] + self._waited - before), 0))
        self._laps.append((READ, perf_counter(), nbytes))
        if len(self._laps) > _MOST_LAPS:
            self._spans, cell = merged_to(self.spans(), _MOST_LAPS)
            self.cell = max(self.cell, cell)  # 0 if this time none was merged
            self._laps = [(_NOTHING, self._laps[-1][1], 0)]

    def spans(self) -> list[_Fields]:
        """Return the spans so far; a short one without bytes is part of the one that follows it."""
        spans, last = list(self._spans), self._laps[0][1]
        for kind, end, nbytes in self._laps:
            if kind == _NOTHING:
                last = end
            elif nbytes or end - last >= _LEAST_SECONDS:
                spans.append((self.name, kind, last, end, nbytes))
                last = end
        return spans


class Recorder:
    """The lanes of all threads of a load to one device.

    Args:
        is_remote: whether the threads may wait for answers of servers.
    """

    def __init__(self, is_remote: bool = False) -> None:
        self._is_remote = is_remote
        self.main = Lane("main", is_remote)
        """Lane of the thread that runs the executor."""
        self._lanes = [self.main]
        self._numbers = count(1)

    def lane(self, name: str | None = None) -> Lane:
        """Return a new lane for the calling thread, which begins now.

        Args:
            name: name of the lane; None for the next number of a thread that reads.
        """
        lane = Lane(f"thread {next(self._numbers)}" if name is None else name, self._is_remote)
        self._lanes.append(lane)
        return lane

    def recorded(self) -> Spans:
        """Return the spans of all lanes."""
        spans = tuple(chain.from_iterable(lane.spans() for lane in self._lanes))
        return Spans(spans, max(lane.cell for lane in self._lanes))


def timeline_of(phases: Sequence[Span], devices: Mapping[str, Spans], start: float, end: float) -> Timeline:
    """Return the timeline of a load.

    Args:
        phases: the phases of the caller's thread, in order.
        devices: spans by name of the device. If there are several, the names of lanes begin with it.
        start, end: beginning and end of the load, in seconds of ``time.perf_counter``.
    """
    spans: list[_Fields] = [span for span in phases if span.seconds >= _LEAST_PHASE_SECONDS]
    for device, part in devices.items():
        start_of_name = f"{device} " if len(devices) > 1 else ""
        spans += [(start_of_name + lane, kind, begin, end, n) for lane, kind, begin, end, n in part.spans]
    spans, cell = merged_to(spans, MOST_SPANS)
    moved = tuple(Span(lane, kind, begin - start, end - start, n) for lane, kind, begin, end, n in spans)
    return Timeline(moved, end - start, max([cell, *(part.merged_seconds for part in devices.values())]))


def merged_to(spans: Sequence[_Fields], most: int) -> tuple[list[_Fields], float]:
    """Merge spans until at most ``most`` are left; return them and the seconds of a cell, 0 if all are as they were.

    Args:
        spans: the spans, lane by lane, and those of a lane in order of time.
        most: maximum number of spans. It is exceeded only if all lanes together have more kinds.
    """
    if len(spans) <= most:
        return list(spans), 0.0
    seconds = max(end for _, _, _, end, _ in spans) - min(begin for _, _, begin, _, _ in spans)
    cell = max(seconds, _LEAST_SECONDS) / most
    merged = merged_in_cells(spans, cell)
    while len(merged) > most and cell <= seconds:
        cell *= 2
        merged = merged_in_cells(spans, cell)
    return list(merged), cell


def merged_in_cells(spans: Iterable[_Fields], cell: float) -> list[Span]:
    """Merge spans of one kind that begin in the same cell of time, in each lane.

    Merged spans follow each other from the beginning of the first span in the cell, so spans of a lane still do not
    overlap, and the seconds and bytes of each kind stay what they are.

    Args:
        spans: the spans, lane by lane, and those of a lane in order of time.
        cell: seconds of a cell.

    Example:
        >>> spans = [Span("t", READ, 0.0, 0.25), Span("t", COPY, 0.25, 0.5), Span("t", READ, 0.5, 0.75)]
        >>> [(span.kind, span.begin, span.end) for span in merged_in_cells(spans, 1.0)]
        [('read', 0.0, 0.5), ('copy', 0.5, 0.75)]
    """
    merged: list[Span] = []
    for (lane, _), group in groupby(spans, key=lambda span: (span[0], span[2] // cell)):
        sums: dict[str, tuple[float, int]] = {}
        at = math.inf
        for _, kind, begin, end, nbytes in group:
            at = min(at, begin)
            seconds, before = sums.get(kind, (0.0, 0))
            sums[kind] = seconds + end - begin, before + nbytes
        for kind, (seconds, nbytes) in sums.items():
            merged.append(Span(lane, kind, at, at + seconds, nbytes))
            at += seconds
    return merged
