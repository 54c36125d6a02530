"""Every file call of the package, one thin function each: tests count them and fail the n-th.

They are called through the module (``system.preadv``) and never imported by name.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import threading

from automodel_conv.errors import ReadError, message

# Most buffers of one preadv. Source: UIO_MAXIOV in linux/uio.h; IOV_MAX is the same on macOS.
IOV_MAX = 1024

# Source: asm-generic/mman-common.h.
_MADV_HUGEPAGE = 14

# Without pread, seek and read are two calls on one position; threads must not interleave them.
_seek_lock = threading.Lock()


def exists(path: str) -> bool:
    """Whether anything lies at ``path``, after following links."""
    return os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether ``path`` is a regular file, after following links."""
    return os.path.isfile(path)


def is_directory(path: str) -> bool:
    """Whether ``path`` is a directory, after following links."""
    return os.path.isdir(path)


def list_names(directory: str) -> list[str]:
    """Names in a directory, sorted."""
    return sorted(os.listdir(directory))


def open_readonly(path: str) -> int:
    """Open a file for reading; returns its descriptor."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def close(fd: int) -> None:
    """Close a descriptor."""
    os.close(fd)


def size(fd: int) -> int:
    """Length of an open file in bytes."""
    return os.fstat(fd).st_size


def preadv(fd: int, views: list[memoryview], offset: int) -> int:
    """Read at ``offset`` into ``views`` in turn; returns the bytes read, which may be fewer.

    Args:
        views: at most ``IOV_MAX`` writable, contiguous views of bytes, none of them empty.
        offset: in bytes from the start of the file.
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, views, offset)
    total = 0
    for view in views:
        data = _pread(fd, len(view), offset + total)
        view[: len(data)] = data
        total += len(data)
        if len(data) < len(view):
            break
    return total


def _pread(fd: int, nbytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def read_exactly(fd: int, views: list[memoryview], offset: int, path: str) -> None:
    """Fill all ``views`` with the bytes that follow ``offset``, in as few calls as possible.

    Args:
        views: any number of writable, contiguous views of bytes; empty ones are skipped.
        offset: in bytes from the start of the file.
        path: for the error text alone.

    Raises:
        ReadError: the file ends too early, or the system reports an error.
    """
    pending = [view for view in views if len(view)]
    total = sum(map(len, pending))
    done = 0
    while done < total:
        try:
            count = preadv(fd, pending[:IOV_MAX], offset + done)
        except OSError as error:
            raise ReadError(
                message(
                    "cannot read a file",
                    where=f"{path}, byte {offset + done}",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{done} bytes, then: {error}",
                )
            ) from error
        if count == 0:
            raise ReadError(
                message(
                    "a file ends too early",
                    where=f"{path}, byte {offset + done}",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{done} bytes",
                    do="the file is truncated: copy or download it again",
                )
            )
        done += count
        if done < total:
            pending = _after(pending, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of ``views`` once their first ``count`` bytes are filled."""
    full = 0
    while count >= len(views[full]):
        count -= len(views[full])
        full += 1
    return [views[full][count:], *views[full + 1 :]]


def advise_huge_pages(address: int, nbytes: int) -> bool:
    """Ask for huge pages within ``[address, address + nbytes)``; advice, so it never fails.

    Returns:
        Whether the kernel took it: False off Linux, below one whole page, or without huge pages.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux" or stop <= start:
        return False
    return _madvise()(start, stop - start, _MADV_HUGEPAGE) == 0


@functools.cache
def _madvise():
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
