"""A progress bar in bytes, off by default."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
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

    def add(self, nbytes: int) -> None:
        """Add the size of a task to the total."""
        with self._lock:
            self._bar.total += nbytes
            self._bar.refresh()

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

    The bar is tqdm's, with GB and GB/s on standard error. tqdm is imported only if the bar is enabled.

    Args:
        description: label of the bar.
        enabled: whether there is a bar.
        note: returns a text that follows the numbers; None for no text.
    """
    if not enabled:
        yield False
        return
    from tqdm import tqdm

    columns, rows = (_COLUMNS, _ROWS) if _has_no_size(sys.stderr) else (None, None)
    with tqdm(
        total=0, desc=description, unit="B", unit_scale=True, unit_divisor=1000, ncols=columns, nrows=rows
    ) as bar:
        yield SharedBar(bar, note)


def _has_no_size(stream: Any) -> bool:
    """Return whether a stream is a terminal that reports 0 columns."""
    try:
        return os.get_terminal_size(stream.fileno()).columns == 0
    except (AttributeError, OSError, ValueError):  # not a terminal, closed, or replaced by an object without a file
        return False


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
            yield lambda nbytes: None
