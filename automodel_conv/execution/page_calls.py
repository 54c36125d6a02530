"""System calls for pages of memory, one thin function each.

Callers write ``page_calls.populate_pages`` and import no function by name, so that tests can replace it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

# Source: asm-generic/mman-common.h.
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_MADV_POPULATE_WRITE = 23


def can_advise() -> bool:
    """Whether this system takes advice about the pages of memory."""
    return sys.platform == "linux"


def advise_huge_pages(address: int, nbytes: int, use: bool = True) -> bool:
    """Ask for huge pages within ``[address, address + nbytes)``, or for none; advice, so it never fails.

    Returns:
        Whether the kernel took it: False off Linux, below one whole page, or without huge pages.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux" or stop <= start:
        return False
    return _memory_call("madvise")(start, stop - start, _MADV_HUGEPAGE if use else _MADV_NOHUGEPAGE) == 0


def populate_pages(address: int, nbytes: int) -> bool:
    """Make the pages of new memory, as if each was written to; those that are there keep what they hold.

    Args:
        address: of a page.
        nbytes: of whole pages.

    Returns:
        Whether the system has done it: False off Linux, before Linux 5.14, and where memory is short.
    """
    return sys.platform == "linux" and _memory_call("madvise")(address, nbytes, _MADV_POPULATE_WRITE) == 0


def resident_share(address: int, nbytes: int) -> float:
    """How many of these pages are in memory, from 0 to 1; 1 where the system cannot tell.

    Args:
        address: of a page.
        nbytes: of whole pages, at least one.
    """
    pages = bytearray(nbytes // mmap.PAGESIZE)
    place = (ctypes.c_ubyte * len(pages)).from_buffer(pages)
    if sys.platform != "linux" or _memory_call("mincore")(address, nbytes, ctypes.addressof(place)):
        return 1.0
    return pages.count(1) / len(pages)


@functools.cache
def _memory_call(name: str):
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p if name == "mincore" else ctypes.c_int)
    function.restype = ctypes.c_int
    return function
