"""A progress bar in bytes, off by default."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bytes_progress(total: int, description: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of bytes just done; any thread may call it.

    Enabled, it draws a tqdm bar with GB and GB/s on standard error; otherwise it does nothing, and
    tqdm is not imported.

    Args:
        total: in bytes.
    """
    if not enabled:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total, desc=description, unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield advance
