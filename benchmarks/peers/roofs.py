"""The roofs, which no load can exceed: the same bytes, not converted and not in their final places.

Like a method, a roof prepares outside the timing and returns the function to time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.execution import page_calls
from benchmarks import measure, memory
from benchmarks.memory import AS_FOUND, READY

# The fastest size of 1 to 128 MiB on this machine, from memory and from a disk.
_RUN_BYTES = 4 << 20
_DIRECT_BYTES = 8 << 20


class Roof(NamedTuple):
    """A roof: its preparation, and the states in which it applies."""

    title: str
    prepare: Callable[[str, int], Callable[[], object]]
    """Called with the checkpoint and the number of threads."""
    caches: tuple[str, ...]
    """The states of the page cache in which it is a bound."""
    memory: tuple[str, ...] = (READY, AS_FOUND)
    """The states of free memory in which it is meaningful."""


def preadv_untouched(directory: str, threads: int, huge: bool) -> Callable[[], object]:
    """Read each file with ``os.preadv`` in runs of 4 MiB into new memory of huge or of small pages.

    Each page size is allocated in the faster way: huge pages by page faults of the read, small ones all at once before
    a run is read (``MADV_POPULATE_WRITE``).
    """

    def run() -> list[Tensor]:
        buffers = [_new(path.stat().st_size, huge) for path in _files(directory)]
        _read(directory, buffers, threads, make=not huge)
        return buffers

    return run


def preadv_touched(directory: str, threads: int) -> Callable[[], object]:
    """Read the same into memory that was written before."""
    buffers = [_touched(path.stat().st_size) for path in _files(directory)]
    return lambda: _read(directory, buffers, threads)


def memcpy(directory: str, threads: int) -> Callable[[], object]:
    """Copy the same number of bytes from memory to memory.

    Both were written before.
    """
    sources = [_touched(path.stat().st_size) for path in _files(directory)]
    runs = [
        run
        for source in sources
        for run in zip(source.split(_RUN_BYTES), _touched(source.nbytes).split(_RUN_BYTES), strict=False)
    ]

    def run() -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda pair: pair[1].copy_(pair[0]), runs))

    return run


def disk(directory: str, threads: int) -> Callable[[], object]:
    """Read every file past the page cache (O_DIRECT), in runs of 8 MiB into a buffer per thread."""
    files = _files(directory)
    runs = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _DIRECT_BYTES)]

    def read(share: list[tuple[Path, int]]) -> None:
        with mmap.mmap(-1, _DIRECT_BYTES) as buffer:  # aligned to pages
            for path, offset in share:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
                try:
                    wanted = min(_DIRECT_BYTES, path.stat().st_size - offset)
                    if (count := os.preadv(descriptor, [buffer], offset)) != wanted:
                        raise EOFError(f"{path}: {count} bytes at {offset}, expected {wanted}")
                finally:
                    os.close(descriptor)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, [runs[first::threads] for first in range(threads)]))

    return run


def _read(directory: str, buffers: list[Tensor], threads: int, make: bool = False) -> None:
    descriptors = [os.open(path, os.O_RDONLY) for path in _files(directory)]
    runs = [
        (descriptor, start, memoryview(buffer.numpy())[start : start + _RUN_BYTES])
        for descriptor, buffer in zip(descriptors, buffers, strict=True)
        for start in range(0, buffer.nbytes, _RUN_BYTES)
    ]

    def read(run: tuple[int, int, memoryview]) -> None:
        if make:
            _make_pages(run[2])
        measure.read_into(*run)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, runs))
    for descriptor in descriptors:
        os.close(descriptor)


def _make_pages(view: memoryview) -> None:
    """Allocate the whole pages of a view.

    On systems without the call (before Linux 5.14), the read does it.
    """
    start, stop = memory.pages(torch.frombuffer(view, dtype=torch.uint8).data_ptr(), len(view))
    if stop > start:
        page_calls.populate_pages(start, stop - start)


def _new(nbytes: int, huge: bool) -> Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    memory.advise(buffer.data_ptr(), nbytes, huge)
    return buffer


def _touched(nbytes: int) -> Tensor:
    return _new(nbytes, huge=True).fill_(1)


def _files(directory: str) -> list[Path]:
    return sorted(Path(directory).glob("*.safetensors"))


ROOFS: Mapping[str, Roof] = {
    "preadv": Roof("bare preadv, huge pages", partial(preadv_untouched, huge=True), ("warm", "cold")),
    "preadv-small": Roof(
        "bare preadv, small pages made before", partial(preadv_untouched, huge=False), ("warm", "cold")
    ),
    "preadv-touched": Roof("bare preadv, memory touched before", preadv_touched, ("warm",), (READY,)),
    "memcpy": Roof("memcpy, memory touched before", memcpy, ("warm",), (READY,)),
    "disk": Roof("the disk, past the page cache", disk, ("cold",), (READY,)),
}
LOADS = ("preadv", "preadv-small")
"""The roofs for a load into new memory. A load is compared with the faster one."""
