"""Progress bars in bytes, off by default: one for a load, and one for each phase of a save or a conversion."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Size assumed for a terminal that reports none, as that of ``script`` or of a container. tqdm would draw nothing.
_COLUMNS, _ROWS = 80, 24


class SharedBar:
    """One progress bar for several tasks that run at the same time; any thread may call it."""

    def __init__(self, bar: Any, note: Callable[[], str] | None = None):
        self._bar = bar
        self._note = note
        self._lock = threading.Lock()
        self._paused = 0.0

    def add(self, nbytes: int) -> None:
        """Add the size of a task to the total."""
        with self._lock:
            done, start = self._bar.n, self._bar.start_t
            self._bar.reset(self._bar.total + nbytes)  # the widget of a notebook takes a new total in no other way
            self._bar.n, self._bar.start_t = done, start

    def pause(self) -> None:
        """Stop the clock of the bar until ``resume``, as its speed does not include other phases."""
        self._paused = time.time()

    def resume(self) -> None:
        """Show the bar again, and let its clock continue."""
        with self._lock:
            seconds = time.time() - self._paused
            self._bar.start_t += seconds  # tqdm's times of its start and of its last line
            self._bar.last_print_t += seconds
            self._bar.refresh()

    def close(self) -> None:
        """End the bar; its line stays."""
        with self._lock:
            self._bar.close()

    def advance(self, nbytes: int) -> None:
        """Advance the bar by bytes that are done."""
        with self._lock:
            if self._note is not None:
                self._bar.set_postfix_str(self._note(), refresh=False)
            self._bar.update(nbytes)


@contextmanager
def shared_progress(
    description: str, enabled: bool, note: Callable[[], str] | None = None
) -> Iterator[SharedBar | bool]:
    """Yield a bar that several tasks accept as their ``progress``, or False if not enabled.

    The bar is tqdm's, with GB and GB/s: text on standard error, or a widget in a notebook. tqdm is imported only if the
    bar is enabled.

    Args:
        description: label of the bar.
        enabled: whether there is a bar.
        note: returns a text that follows the numbers; None for no text.
    """
    if not enabled:
        yield False
        return
    with _new_bar(description, 0) as bar:
        yield SharedBar(bar, note)


def _new_bar(description: str, total: int) -> Any:
    """Return a bar of tqdm at the current line, with a size in bytes."""
    from tqdm.auto import tqdm  # a widget in a notebook that can show one, else text

    columns, rows = _size_of(sys.stderr)
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        ncols=columns,
        nrows=rows,
        position=0,
    )


def _size_of(stream: Any) -> tuple[int | None, int | None]:
    """Return the columns and rows of a terminal that does not report them itself; None if it does, or is none."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (AttributeError, OSError, ValueError):  # not a terminal, closed, or replaced by an object without a file
        return None, None
    return (None, None) if columns and rows else (columns or _COLUMNS, rows or _ROWS)


@contextmanager
def bytes_progress(total: int, description: str, progress: SharedBar | bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar by a number of bytes; any thread may call it.

    Args:
        total: size of the task in bytes.
        description: label of the bar.
        progress: True for a new bar, False for no bar, or a bar that is shared with other tasks.
    """
    if isinstance(progress, SharedBar):
        progress.add(total)
        yield progress.advance
        return
    with shared_progress(description, progress) as bar:
        if isinstance(bar, SharedBar):
            bar.add(total)
            yield bar.advance
        else:
            yield ignore


class Phases:
    """The phases of one piece of work, such as "writing" and "verifying", which may alternate.

    Only the bar of the current phase is shown. At the end each has a line.
    """

    seconds: dict[str, float]
    """Seconds of each phase."""

    def __init__(self, totals: Mapping[str, int], enabled: bool):
        """Prepare the phases.

        Args:
            totals: size in bytes of each phase, by its name.
            enabled: whether there are bars; a phase without bytes has none.
        """
        self.seconds = dict.fromkeys(totals, 0.0)
        self._totals = totals
        self._enabled = enabled
        self._bars: dict[str, SharedBar] = {}

    @contextmanager
    def begin(self, phase: str) -> Iterator[Callable[[int], None]]:
        """Run a block as part of a phase, and yield the function that advances its bar."""
        if phase in self._bars:
            self._bars[phase].resume()
        elif self._enabled and self._totals[phase]:
            self._bars[phase] = SharedBar(_new_bar(phase, self._totals[phase]))
        bar = self._bars.get(phase)
        began = time.perf_counter()
        try:
            yield ignore if bar is None else bar.advance
        finally:
            self.seconds[phase] += time.perf_counter() - began
            if bar is not None:
                bar.pause()

    def close(self) -> None:
        """End all bars."""
        for bar in self._bars.values():
            bar.close()


def ignore(nbytes: int) -> None:
    """Advance no bar."""


@contextmanager
def phases(totals: Mapping[str, int], enabled: bool) -> Iterator[Phases]:
    """Yield the phases of one piece of work, and end their bars after it; see ``Phases``."""
    running = Phases(totals, enabled)
    try:
        yield running
    finally:
        running.close()
