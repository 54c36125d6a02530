"""Every file call of the package, one thin function each: tests count them and fail the n-th.

They are called through the module (``system.preadv``) and never imported by name.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import sys
import threading
import time
from contextlib import suppress

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


# Source: asm-generic/mman-common.h, asm-generic/mman.h. Python's mmap module has the last from 3.13 on.
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_PRIVATE, _MAP_NORESERVE = 0x02, 0x4000

# Source: linux/fs.h.
_SYNC_FILE_RANGE_WRITE = 2

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


def is_link(path: str) -> bool:
    """Whether ``path`` is a symbolic link."""
    return os.path.islink(path)


def real_path(path: str) -> str:
    """The absolute path without links in it; as far as it exists."""
    return os.path.realpath(path)


def list_names(directory: str) -> list[str]:
    """Names in a directory, sorted."""
    return sorted(os.listdir(directory))


def open_readonly(path: str) -> int:
    """Open a file for reading; returns its descriptor."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def close(fd: int) -> None:
    """Close a descriptor; what the system may still have to tell about a file, ``sync`` has told before."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # closed twice: somebody else's file would be next
            raise


def size(fd: int) -> int:
    """Length of an open file in bytes."""
    return os.fstat(fd).st_size


def preadv(fd: int, views: list[memoryview], offset: int) -> int:
    """Read at ``offset`` into ``views`` in turn; returns the bytes read, which may be fewer.

    Args:
        views: at most ``exactly.IOV_MAX`` writable, contiguous views of bytes, none of them empty.
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


def is_cached(fd: int, offset: int) -> bool | None:
    """Whether the byte at ``offset`` can be read without waiting for a disk; None where the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system without this
        return None
    return True


def read_text(path: str) -> str | None:
    """The text of a small file of the system's own; None if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeError):
        return None


def bring_in(fd: int, offset: int, nbytes: int) -> int:
    """Read bytes of a file into the system's cache alone, and wait until they are there.

    The kernel throws pages away that are sent to ``/dev/null``, and does not copy them.

    Returns:
        The bytes that were brought in, which may be fewer; 0 where the file ends.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        return os.sendfile(nowhere, fd, offset, nbytes)
    finally:
        os.close(nowhere)


def drop_cache(fd: int) -> None:
    """Let the system forget the file's bytes that it holds and that are on the disk; advice."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
    """Write ``views`` one after the other at ``offset``; returns the bytes written, which may be fewer.

    Args:
        views: at most ``exactly.IOV_MAX`` contiguous views of bytes, none of them empty.
        offset: in bytes from the start of the file.
    """
    if hasattr(os, "pwritev"):
        return os.pwritev(fd, views, offset)
    return _pwrite(fd, views[0], offset)


def _pwrite(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def seconds_ready() -> float:
    """How long this thread has had a core, or was ready to run and waited for one; off Linux the former alone.

    Source: Documentation/scheduler/sched-stats.rst of Linux, ``/proc/<pid>/schedstat``: nanoseconds on a core, then
    nanoseconds of waiting for one; both are 0 where the kernel keeps no account.
    """
    text = read_text("/proc/thread-self/schedstat")
    waited = int(text.split()[1]) / 1e9 if text else 0.0
    return time.thread_time() + waited


def can_map() -> bool:
    """Whether ``map_private`` works here: on Linux."""
    return sys.platform == "linux"


def map_private(fd: int, offset: int, nbytes: int) -> int:
    """Map bytes of a file into memory, copy-on-write; returns the address of the first.

    What is written there never reaches the file, and takes memory only once it is written. Python's own ``mmap`` would
    keep a descriptor open as long as the mapping lives.

    Args:
        offset: a multiple of ``mmap.ALLOCATIONGRANULARITY``.
        nbytes: at least one, all of them within the file: a touch beyond its end ends the process (SIGBUS).
    """
    protection, flags = _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_NORESERVE
    address = _mmap()(None, nbytes, protection, flags, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def unmap(address: int, nbytes: int) -> None:
    """Take a mapping back; nothing may touch it any more."""
    _munmap()(address, nbytes)


@functools.cache
def _mmap():
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t), *[ctypes.c_int] * 3, ctypes.c_int64)
    function.restype = ctypes.c_void_p
    return function


@functools.cache
def _munmap():
    function = ctypes.CDLL(None).munmap
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


def create(path: str) -> int:
    """Open a new or emptied file for reading and writing; returns its descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)


def open_existing(path: str) -> int:
    """Open a file that is there, to read it and to write into it; returns its descriptor."""
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def open_append(path: str) -> int:
    """Open a file, made if need be, to read it and to write at its end; returns its descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)


def write_end(fd: int, data: bytes) -> None:
    """Add ``data`` to a file opened by ``open_append``, and wait until the disk has it."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]
    sync(fd)


def truncate(fd: int, nbytes: int) -> None:
    """Cut a file to ``nbytes``, or lengthen it with zeros."""
    os.ftruncate(fd, nbytes)


def reserve(fd: int, nbytes: int) -> None:
    """Give a file its length, with room on the disk where the file system can promise it.

    Raises:
        OSError: among others, there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    truncate(fd, nbytes)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy bytes from file to file within the kernel.

    Returns:
        The bytes copied, which may be fewer; 0 where these files cannot be copied so, or the source ends.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, nbytes, source_offset, target_offset)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return 0
        raise


def begin_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the system start to bring written bytes to the disk, so that ``sync`` has less to wait for; never fails."""
    if sys.platform == "linux":
        _sync_file_range()(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range():
    function = ctypes.CDLL(None).sync_file_range
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


def sync(fd: int) -> None:
    """Wait until the disk has all that was written to a file."""
    os.fsync(fd)


def sync_directory(path: str) -> None:
    """Wait until the disk knows the names in a directory."""
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_directory(path: str) -> None:
    """Make a directory and those above it, where they are missing."""
    os.makedirs(path, exist_ok=True)


def rename(path: str, new: str) -> None:
    """Give a file another name, at once, in place of any file of that name."""
    os.replace(path, new)


def copy_file(path: str, new: str) -> None:
    """Copy a small file and its permissions."""
    shutil.copy(path, new)


def remove(path: str) -> None:
    """Remove a file."""
    os.remove(path)


def remove_directory(path: str) -> None:
    """Remove an empty directory."""
    os.rmdir(path)


def lock(fd: int) -> bool:
    """Take an open file for this process alone, until it is closed; False if somebody else has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: str) -> bool:
    """Whether an open file is the one that lies at ``path`` now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def identity(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: what tells whether a file was changed."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def free_bytes(directory: str) -> int:
    """Bytes that may still be written to the file system of a directory."""
    return shutil.disk_usage(directory).free
