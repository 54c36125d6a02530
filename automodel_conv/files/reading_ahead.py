"""Bringing the files of a checkpoint into the system's cache while something else takes its time.

The first plan of a process waits seconds for the import of transformers' models, and the disk has nothing to do
meanwhile. Nothing of the files comes into this process: copying 1.6 GB took a second of a core, this takes 0.04.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.free_memory import free_memory
from automodel_conv.files.source import LocalFile

# Brought in by one call. While Python imports, a thread gets the interpreter every few milliseconds only, so that small
# portions would come slowly; who ends it waits for the last one.
PORTION_BYTES = 16 << 20
# Less is read in a moment.
LEAST_BYTES = 64 << 20
# Between two looks at the memory that is free.
_LOOK_BYTES = 256 << 20


@contextmanager
def reading_ahead(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Read the files for the length of a block, from a thread that has ended when the block has.

    It never fails: a file that cannot be read ends it, and the load will tell. Nothing is read of a checkpoint that is
    small or not on this machine.

    Args:
        share: number of this process and how many there are: each reads other portions.
    """
    stop = threading.Event()
    here = [source.path for source in checkpoint.sources if isinstance(source, LocalFile)]
    arguments = (here, share, stop)
    thread = threading.Thread(target=read_ahead, args=arguments, name="automodel_conv reading ahead", daemon=True)
    try:
        if not checkpoint.is_remote and sum(checkpoint.nbytes) >= LEAST_BYTES:
            with suppress(RuntimeError):  # no more threads: the load will tell, if it needs one
                thread.start()
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def read_ahead(files: Sequence[str], share: tuple[int, int], stop: threading.Event) -> int:
    """Read files in order until ``stop`` is set; not what is cached, and not where the system cannot tell that.

    It ends too where half of the memory that is free has no room for what all processes have read and one portion more.

    Args:
        files: paths.
        share: see ``reading_ahead``.

    Returns:
        The bytes that were brought in.
    """
    number, shares = share
    done, look_at = 0, 0
    with suppress(OSError):
        for path in files:
            fd = system.open_readonly(path)
            try:
                size = system.size(fd)
                for offset in range(number * PORTION_BYTES, size, shares * PORTION_BYTES):
                    nbytes = min(PORTION_BYTES, size - offset)
                    cached = system.is_cached(fd, offset + nbytes - 1)
                    if cached is None or stop.is_set():
                        return done
                    if cached:
                        continue
                    if done >= look_at:
                        free, look_at = free_memory() or 0, done + _LOOK_BYTES
                    if (done + nbytes) * shares > free // 2:
                        return done
                    done += system.bring_in(fd, offset, nbytes)
            finally:
                system.close(fd)
    return done
