"""A line on standard error with the current step of a command that takes longer than a second."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_SECONDS = 1.0
# Return to the start of the line and erase it. Source: ECMA-48, EL.
_ERASE = "\r\x1b[2K"


@contextmanager
def step_line(enabled: bool, seconds: float = _SECONDS) -> Iterator[Callable[[str], None]]:
    """Yield a function that sets the current step, such as "planning".

    After ``seconds`` the line appears. On a terminal it is replaced by the next step, and erased at the end.

    Args:
        enabled: whether to show the line at all.
        seconds: seconds before the line appears.
    """
    if not enabled:
        yield lambda step: None
        return
    line = _StepLine(sys.stderr)
    timer = threading.Timer(seconds, line.show)
    timer.daemon = True
    timer.start()
    try:
        yield line.set
    finally:
        timer.cancel()
        timer.join()
        line.end()


class _StepLine:
    """The line of the current step; the command and the timer that shows it use it from two threads."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        erases = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._start, self._end = (_ERASE, "") if erases else ("", "\n")
        self._step = ""
        self._is_shown = False
        self._lock = threading.Lock()

    def show(self) -> None:
        with self._lock:
            self._is_shown = True
            self._draw()

    def set(self, step: str) -> None:
        with self._lock:
            self._step = step
            self._draw()

    def end(self) -> None:
        """Erase the line; the timer has ended."""
        if self._is_shown:
            self._stream.write(self._start)
            self._stream.flush()

    def _draw(self) -> None:
        if self._is_shown and self._step:
            self._stream.write(f"{self._start}{self._step} ...{self._end}")
            self._stream.flush()
