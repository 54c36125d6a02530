"""The system's page cache: evict files from it, and measure how much of them it holds."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from pathlib import Path

import numpy


def evict(directory: str) -> None:
    """Write back all files and evict them from the page cache.

    This needs no rights.
    """
    for path in _files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(directory: str) -> float:
    """Return the share of all files that is in the page cache, from 0 to 1, by mincore(2), which reads nothing.

    Raises:
        OSError: the system does not report it.
    """
    pages = [_resident(path) for path in _files(directory)]
    return float(numpy.concatenate(pages).mean()) if pages else 1.0


def _resident(path: Path) -> numpy.ndarray:
    """Return whether each page of a file is in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        flags = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = _mincore()(ctypes.addressof(first), len(mapped), flags)
        del first  # the map cannot be closed while this view exists
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        return numpy.frombuffer(flags, numpy.uint8) & 1


@functools.cache
def _mincore():
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function


def _files(directory: str) -> list[Path]:
    return [path for path in sorted(Path(directory).iterdir()) if path.is_file() and path.stat().st_size]
