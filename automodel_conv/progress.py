"""A progress bar in bytes, off by default."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SharedBar:
    """One bar for works that run at the same time; any thread may call it."""

    def __init__(self, bar: Any):
        self._bar = bar
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Add a work of so many bytes to the total."""
        with self._lock:
            self._bar.total += nbytes
            self._bar.refresh()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._bar.update(nbytes)


@contextmanager
def shared_progress(description: str, enabled: bool) -> Iterator[SharedBar | bool]:
    """Yields what several works take for their ``progress``, so that they draw one bar together; False if not enabled.

    The bar is tqdm's, with GB and GB/s on standard error; tqdm is not imported where there is none.
    """
    if not enabled:
        yield False
        return
    from tqdm import tqdm

    with tqdm(total=0, desc=description, unit="B", unit_scale=True, unit_divisor=1000) as bar:
        yield SharedBar(bar)


@contextmanager
def bytes_progress(total: int, description: str, progress: SharedBar | bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of bytes just done; any thread may call it.

    Args:
        total: in bytes.
        progress: True for a bar of its own, False for none, or a bar that others draw in too.
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
