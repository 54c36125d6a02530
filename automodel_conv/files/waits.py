"""Seconds that threads wait for answers of servers; each thread counts its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Waits(threading.local):
    """The seconds of one thread."""

    seconds = 0.0


_waits = _Waits()


def seconds_waited() -> float:
    """Return the seconds that this thread has waited for answers since it began."""
    return _waits.seconds


@contextmanager
def waiting() -> Iterator[None]:
    """Count the time of a block as waiting for an answer, even if the block raises."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        _waits.seconds += time.perf_counter() - begin
