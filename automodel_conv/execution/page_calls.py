"""System calls for pages of memory, one thin function for each.

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
    """Return whether this system accepts advice about pages of memory."""
    return sys.platform == "linux"


def advise_huge_pages(address: int, nbytes: int, use: bool = True) -> bool:
    """Ask the kernel for huge pages within ``[address, address + nbytes)``, or for none; never fail.

    Args:
        address: first address of the range.
        nbytes: length of the range.
        use: True asks for huge pages, False for small pages only.

    Returns:
        Whether the kernel accepted the advice. False on systems other than Linux, for a range below one whole page, and
        for a kernel without huge pages.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux" or stop <= start:
        return False
    return _memory_call("madvise")(start, stop - start, _MADV_HUGEPAGE if use else _MADV_NOHUGEPAGE) == 0


def populate_pages(address: int, nbytes: int) -> bool:
    """Create the pages of new memory, as a write to each page would; pages that exist keep their contents.

    Args:
        address: address of the first page.
        nbytes: total size of the pages, a multiple of the page size.

    Returns:
        Whether the system created the pages. False on systems other than Linux, before Linux 5.14, and if memory is
        short.
    """
    return sys.platform == "linux" and _memory_call("madvise")(address, nbytes, _MADV_POPULATE_WRITE) == 0


def resident_share(address: int, nbytes: int) -> float:
    """Return the share of pages that are in memory, from 0 to 1; return 1 if the system cannot determine it.

    Args:
        address: address of the first page.
        nbytes: total size of the pages, a positive multiple of the page size.
    """
    pages = bytearray(nbytes // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * len(pages)).from_buffer(pages)
    if sys.platform != "linux" or _memory_call("mincore")(address, nbytes, ctypes.addressof(vector)):
        return 1.0
    return pages.count(1) / len(pages)


@functools.cache
def _memory_call(name: str):
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p if name == "mincore" else ctypes.c_int)
    function.restype = ctypes.c_int
    return function
