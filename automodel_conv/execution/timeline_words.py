"""The kinds of spans in a timeline in words, and sentences that say what a load waited for and what bound it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from automodel_conv.errors import size_text
from automodel_conv.execution.timeline import FILL, PHASES, Span, Timeline


class Kind(NamedTuple):
    """A kind of span in words."""

    did: str
    """What a thread did, such as "read"; for a wait, what it waited for."""
    cause: str
    """The beginning of a sentence about what bound a load."""
    is_wait: bool = False

    @property
    def label(self) -> str:
        """Words for a legend."""
        return f"waited for {self.did}" if self.is_wait else self.did


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "open": Kind("opened the checkpoint", "Opening the checkpoint"),
        "plan": Kind("planned, with imports", "Planning, with imports,"),
        "verify": Kind("compared checksums", "Comparing checksums"),
        "map": Kind("mapped files", "Mapping files"),
        "code": Kind("ran the loading code", "Running the loading code"),
        "fill": Kind("filled the tensors", "Filling the tensors"),
        "ranks": Kind("other ranks", "Waiting for other ranks", is_wait=True),
        "send": Kind("sent parts to other ranks", "Sending parts to other ranks"),
        "merge": Kind("merged the adapter", "Merging the adapter"),
        "finish": Kind("compared and installed tensors", "Comparing and installing tensors"),
        "schedule": Kind("scheduled the reads", "Scheduling the reads"),
        "memory": Kind("created new memory", "Creating new memory"),
        "answer": Kind("answers of a server", "Waiting for answers of a server", is_wait=True),
        "read": Kind("read", "Reading"),
        "decode": Kind("decoded", "Decoding"),
        "copy": Kind("copied", "Copying on the host"),
        "upload": Kind("queued uploads", "Queueing uploads"),
        "launch": Kind("queued copies on the device", "Queueing copies on the device"),
        "compile": Kind("prepared kernels", "Preparing kernels"),
        "slot": Kind("uploads out of its pinned memory", "Uploading to the device", is_wait=True),
        "window": Kind("a free window on the device", "Emptying windows on the device", is_wait=True),
        "kernels": Kind("kernels", "Preparing kernels", is_wait=True),
        "device": Kind("the device to finish", "Finishing on the device", is_wait=True),
        "upstream": Kind("ran transformers' own code", "Running transformers' own code"),
    }
)
"""Every kind of span in words, in the order in which legends show them."""


def seconds_text(seconds: float) -> str:
    """Return seconds with three digits, in the unit that fits.

    Example:
        >>> seconds_text(12.34), seconds_text(0.0123), seconds_text(0.00000456)
        ('12.3 s', '12.3 ms', '4.56 us')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995 or unit == "us":
            break
    value = seconds * factor
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def span_text(span: Span) -> str:
    """Return what a thread did in a span.

    Example:
        >>> span_text(Span("thread 3", "read", 0.0, 0.012, 16_800_000))
        'thread 3 read 16.8 MB in 12 ms (1.40 GB/s)'
        >>> span_text(Span("thread 3", "answer", 0.0, 0.2))
        'thread 3 waited 200 ms for answers of a server'
    """
    kind, time = KINDS[span.kind], seconds_text(span.seconds)
    if kind.is_wait:
        return f"{span.lane} waited {time} for {kind.did}"
    speed = f" ({span.nbytes / 1e9 / max(span.seconds, 1e-9):.2f} GB/s)" if span.nbytes else ""
    size = f" {size_text(span.nbytes)}" if span.nbytes else ""
    return f"{span.lane}{': ' if span.lane == PHASES else ' '}{kind.did}{size} in {time}{speed}"


def is_reader(lane: str) -> bool:
    """Return whether a lane is that of a thread that reads."""
    return lane.rpartition(" ")[0].endswith("thread")


def sentences(timeline: Timeline) -> list[str]:
    """Return a sentence about what bound a load, and one for each kind of wait.

    Example:
        >>> spans = (Span("phases", "fill", 0.0, 1.0), Span("thread 1", "read", 0.0, 0.7, 7_000_000_000))
        >>> spans += (Span("thread 2", "read", 0.0, 0.9, 9_000_000_000),)
        >>> for sentence in sentences(Timeline(spans, 1.0)):
        ...     print(sentence)
        Reading bound the load: it took 800 ms of 1 s, as an average of 2 threads.
        Threads waited 200 ms in all for the last one to end.
    """
    readers = [lane for lane in timeline.lanes if is_reader(lane)]
    seconds: dict[str, float] = {}
    by_readers: set[str] = set()
    for span in timeline.spans:
        own = is_reader(span.lane)
        seconds[span.kind] = seconds.get(span.kind, 0.0) + span.seconds / (len(readers) if own else 1)
        by_readers |= {span.kind} if own else set()
    seconds.pop(FILL, None)
    texts = []
    if seconds:
        kind = max(seconds, key=lambda one: seconds[one])
        average = f", as an average of {len(readers)} threads" if kind in by_readers and len(readers) > 1 else ""
        took = f"{seconds_text(seconds[kind])} of {seconds_text(timeline.seconds)}{average}"
        cause = KINDS[kind].cause
        if 2 * seconds[kind] >= timeline.seconds:
            texts.append(f"{cause} bound the load: it took {took}.")
        else:
            texts.append(f"Nothing alone bound the load. {cause} took longest: {took}.")
    for name, kind in KINDS.items():
        waited = timeline.seconds_of(name) if kind.is_wait else 0.0
        if waited:
            texts.append(f"Threads waited {seconds_text(waited)} in all for {kind.did}.")
    ends = [max(span.end for span in timeline.spans if span.lane == lane) for lane in readers]
    idle = sum(max(ends, default=0.0) - end for end in ends)
    if idle > 0:
        texts.append(f"Threads waited {seconds_text(idle)} in all for the last one to end.")
    return texts
