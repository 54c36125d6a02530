"""Read the files of a checkpoint into the page cache while this process does other work.

The first plan of a process waits seconds for the import of transformers' models, while the disk is idle. No bytes are
copied into this process: copying 1.6 GB took a second of a core, and this takes 0.04 seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.free_memory import free_memory
from automodel_conv.files.source import LocalFile

# Bytes read by one call. While Python imports, a thread gets the interpreter only every few milliseconds, so small
# portions would be read slowly. The end of the block waits for the last portion, so large ones would delay it.
PORTION_BYTES = 16 << 20
# Smaller checkpoints are read too quickly for this to help.
LEAST_BYTES = 64 << 20
# Bytes read between two checks of the free memory.
_LOOK_BYTES = 256 << 20


@contextmanager
def reading_ahead(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Read the files of a checkpoint ahead in a thread that runs at most until the end of the block.

    Reading ahead never raises. It stops at a file that cannot be read, and the load then reports the error. Checkpoints
    that are small or not on this machine are not read ahead.

    Args:
        checkpoint: the checkpoint to read.
        share: index of this process and number of processes. Each process reads different portions.
    """
    stop = threading.Event()
    files = [source.path for source in checkpoint.sources if isinstance(source, LocalFile)]
    arguments = (files, share, stop)
    thread = threading.Thread(target=read_ahead, args=arguments, name="automodel_conv reading ahead", daemon=True)
    try:
        if not checkpoint.is_remote and sum(checkpoint.nbytes) >= LEAST_BYTES:
            with suppress(RuntimeError):  # no more threads: the load reports that if it needs one
                thread.start()
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def read_ahead(files: Sequence[str], share: tuple[int, int], stop: threading.Event) -> int:
    """Read files into the page cache in order until ``stop`` is set, skipping portions that are cached already.

    Reading ends early if the system does not report what is cached, or if half of the free memory is too small for the
    bytes that all processes have read and one more portion.

    Args:
        files: paths of the files.
        share: see ``reading_ahead``.
        stop: event that ends the reading.

    Returns:
        The number of bytes that were read.
    """
    number, shares = share
    done, next_look = 0, 0
    with suppress(OSError):
        for path in files:
            with system.open_readonly(path) as file:
                fd = file.fileno()
                size = system.size(fd)
                for offset in range(number * PORTION_BYTES, size, shares * PORTION_BYTES):
                    nbytes = min(PORTION_BYTES, size - offset)
                    cached = system.is_cached(fd, offset + nbytes - 1)
                    if cached is None or stop.is_set():
                        return done
                    if cached:
                        continue
                    if done >= next_look:
                        free, next_look = free_memory() or 0, done + _LOOK_BYTES
                    if (done + nbytes) * shares > free // 2:
                        return done
                    done += system.read_into_cache(fd, offset, nbytes)
    return done
