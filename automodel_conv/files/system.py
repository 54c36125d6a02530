"""All file calls of the package, one thin function each, so that tests can count them and make the n-th fail.

Callers use them through the module (``system.preadv``) and never import them by name.

Functions that open a file return a ``FileIO``, never the bare number of a descriptor: an interrupt such as Ctrl-C can
arrive between any two instructions, and Python then closes a file that nothing refers to. All other functions take the
number, ``file.fileno()``.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import io
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


# Source: asm-generic/mman-common.h, asm-generic/mman.h. Python's mmap module has MAP_NORESERVE from 3.13 on.
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_PRIVATE, _MAP_NORESERVE = 0x02, 0x4000

# Source: linux/fs.h.
_SYNC_FILE_RANGE_WRITE = 2

# Without pread, seek and read are two calls that share a position, so threads must not interleave them.
_seek_lock = threading.Lock()


def exists(path: str) -> bool:
    """Return whether ``path`` exists, after following links."""
    return os.path.exists(path)


def is_file(path: str) -> bool:
    """Return whether ``path`` is a regular file, after following links."""
    return os.path.isfile(path)


def is_directory(path: str) -> bool:
    """Return whether ``path`` is a directory, after following links."""
    return os.path.isdir(path)


def is_link(path: str) -> bool:
    """Return whether ``path`` is a symbolic link."""
    return os.path.islink(path)


def real_path(path: str) -> str:
    """Return the absolute path with links resolved as far as it exists."""
    return os.path.realpath(path)


def list_names(directory: str) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(os.listdir(directory))


class File(io.FileIO):
    """An open file, closed at the end of a ``with`` block or with the last reference to it."""

    def close(self) -> None:
        """Close the file.

        Errors of pending writes are ignored, since ``sync`` has reported them before.
        """
        try:
            super().close()
        except OSError as error:
            if error.errno == errno.EBADF:  # other code has closed it: next time that could hit the file of another
                raise


def open_readonly(path: str) -> File:
    """Open a file for reading."""
    return File(path, "r")


def size(fd: int) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(fd).st_size


def preadv(fd: int, views: list[memoryview], offset: int) -> int:
    """Read at ``offset`` into ``views`` one after the other.

    Args:
        fd: descriptor of the file.
        views: at most ``full_io.IOV_MAX`` writable, contiguous views of bytes, none of them empty.
        offset: offset in bytes from the start of the file.

    Returns:
        The number of bytes read, which may be fewer than requested.
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
    """Return whether the byte at ``offset`` can be read without waiting for a disk; None if the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support the flag
        return None
    return True


def read_text(path: str) -> str | None:
    """Return the text of a small file of the operating system; None if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeError):
        return None


def read_into_cache(fd: int, offset: int, nbytes: int) -> int:
    """Read bytes of a file into the page cache only, and wait until they are cached.

    Linux discards pages that are sent to ``/dev/null``, without copying them.

    Returns:
        The number of bytes read, which may be fewer than requested; 0 at the end of the file.
    """
    with File(os.devnull, "w") as null:
        return os.sendfile(null.fileno(), fd, offset, nbytes)


def drop_cache(fd: int) -> None:
    """Advise the system to drop the cached bytes of a file that are on the disk."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
    """Write ``views`` one after the other at ``offset``.

    Args:
        fd: descriptor of the file.
        views: at most ``full_io.IOV_MAX`` contiguous views of bytes, none of them empty.
        offset: offset in bytes from the start of the file.

    Returns:
        The number of bytes written, which may be fewer than requested.
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
    """Return the seconds that this thread has spent on a core or ready and waiting for one.

    On systems other than Linux, the time of waiting is not included.

    Source: Documentation/scheduler/sched-stats.rst of Linux, ``/proc/<pid>/schedstat``: nanoseconds on a core, then
    nanoseconds of waiting for one. Both are 0 if Linux does not keep these statistics.
    """
    text = read_text("/proc/thread-self/schedstat")
    waited = int(text.split()[1]) / 1e9 if text else 0.0
    return time.thread_time() + waited


def can_map() -> bool:
    """Return whether ``map_private`` works on this system, which is Linux only."""
    return sys.platform == "linux"


def map_private(fd: int, offset: int, nbytes: int) -> int:
    """Map bytes of a file into memory, copy-on-write, and return the address of the first byte.

    Writes never reach the file, and only written pages take up memory. Python's own ``mmap`` would keep a descriptor
    open for the lifetime of the mapping.

    Args:
        fd: descriptor of the file.
        offset: offset in bytes from the start of the file, a multiple of ``mmap.ALLOCATIONGRANULARITY``.
        nbytes: number of bytes, at least one. All must be within the file: an access beyond its end kills the process
            (SIGBUS).
    """
    protection, flags = _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_NORESERVE
    address = _mmap()(None, nbytes, protection, flags, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def unmap(address: int, nbytes: int) -> None:
    """Remove a mapping.

    Its memory must not be accessed afterwards.
    """
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


def create(path: str) -> File:
    """Create or empty a file, and open it for reading and writing."""
    return File(path, "w+")


def open_existing(path: str) -> File:
    """Open an existing file for reading and writing."""
    return File(path, "r+")


def open_again(file: File) -> File:
    """Open the file of a descriptor once more for reading and writing, even if it has been removed; Linux only."""
    return File(f"/proc/self/fd/{file.fileno()}", "r+")


def open_append(path: str) -> File:
    """Open a file for reading and appending, and create it if necessary."""
    return File(path, "a+")


def write_end(fd: int, data: bytes) -> None:
    """Append ``data`` to a file opened by ``open_append``, and wait until it is on the disk."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]
    sync(fd)


def truncate(fd: int, nbytes: int) -> None:
    """Truncate a file to ``nbytes``, or extend it with zeros."""
    os.ftruncate(fd, nbytes)


def reserve(fd: int, nbytes: int) -> None:
    """Set the size of a file, and allocate disk space for it if the file system supports that.

    Raises:
        OSError: the disk is full, or the system reports another error.
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
    """Let the operating system copy bytes from one file to another.

    Returns:
        The number of bytes copied, which may be fewer than requested; 0 if it cannot copy between these files,
        or at the end of the source.
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
    """Start to write cached bytes to the disk, so that ``sync`` waits for less.

    Errors are ignored.
    """
    if sys.platform == "linux":
        _sync_file_range()(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range():
    function = ctypes.CDLL(None).sync_file_range
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


def sync(fd: int) -> None:
    """Wait until all bytes written to a file are on the disk."""
    os.fsync(fd)


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk."""
    if os.name == "posix":
        opened: list[int] = []  # not a File, which cannot be a directory
        try:
            opened.extend(map(os.open, [path], [os.O_RDONLY]))  # one step, so that no interrupt can lose the descriptor
            os.fsync(opened[0])
        finally:
            for fd in opened:
                os.close(fd)


def make_directory(path: str) -> None:
    """Create a directory and its parents unless they exist."""
    os.makedirs(path, exist_ok=True)


def make_temporary_directory(prefix: str) -> str:
    """Create a new folder in the system's directory for temporary files, and return its path."""
    return tempfile.mkdtemp(prefix=prefix)


def cache_directory() -> str:
    """Return the user's directory for files that can be made again.

    Source: XDG Base Directory Specification 0.8, ``$XDG_CACHE_HOME``.
    """
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def rename(path: str, new: str) -> None:
    """Rename a file atomically, replacing any file of the new name."""
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
    """Lock an open file for this process until it is unlocked or closed.

    Return False if another process has locked it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Release the lock of an open file, also in child processes that were forked while it was locked."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def can_lock_ranges() -> bool:
    """Return whether ``lock_range`` works on this system."""
    return fcntl is not None and hasattr(fcntl, "F_OFD_SETLK")


def lock_range(fd: int, offset: int, nbytes: int) -> bool:
    """Lock bytes of an open file until they are unlocked or the file is closed.

    Other opens of the file cannot lock them, those of this process neither. Source: "Open file description locks" in
    fcntl_locking(2) of Linux.

    Return False if they are locked already.
    """
    try:
        _set_lock(fd, offset, nbytes, locked=True)
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock_range(fd: int, offset: int, nbytes: int) -> None:
    """Unlock bytes of an open file, also in child processes that were forked while they were locked."""
    with suppress(OSError):
        _set_lock(fd, offset, nbytes, locked=False)


def _set_lock(fd: int, offset: int, nbytes: int, *, locked: bool) -> None:
    if fcntl is not None:
        kind = fcntl.F_WRLCK if locked else fcntl.F_UNLCK
        # struct flock of linux/fcntl.h: type, whence, start, length, process.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, nbytes, 0))


def is_at(fd: int, path: str) -> bool:
    """Return whether an open file is the file that is at ``path`` now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def identity(path: str) -> tuple[int, int]:
    """Return size in bytes and modification time in nanoseconds, by which a change of a file is detected."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def free_bytes(directory: str) -> int:
    """Return the free bytes of the file system that holds a directory."""
    return shutil.disk_usage(directory).free
