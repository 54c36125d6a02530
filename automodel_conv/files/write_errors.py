"""Raise errors of the system during a write as a WriteError."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from automodel_conv.errors import WriteError, message, size_text

_FREE = "free some space, or choose a directory on another disk"
_ALLOWED = "choose a directory that you may write to"
_FILE = "choose another path: a file is where the directory should be"
_ADVICE = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: ("raise the limit of file sizes (ulimit -f)", "pass a smaller {max_shard_size=}"),
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.EROFS: _ALLOWED,
    errno.ENOTDIR: _FILE,
    errno.EEXIST: _FILE,
    errno.ENOENT: "create the directory that it should be in, or choose another path",
}
"""What to do, by the number of the system's error."""


@contextmanager
def write_errors(path: str, what: str = "to a directory", expected: str | None = None) -> Iterator[None]:
    """Raise an OSError of the block as a WriteError.

    Args:
        path: path to report if the OSError names no file.
        what: target of the write in the error text, which begins "cannot write".
        expected: expectation in the error text, if any.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            message(
                f"cannot write {what}",
                where=error.filename or path,
                expected=expected,
                found=error,
                do=_ADVICE.get(error.errno or 0, "check the disk space, the quota and the permissions"),
            )
        ) from error


def no_room_error(directory: str, nbytes: int, files: int, free_bytes: int) -> WriteError:
    """Return the error for a disk with too little room.

    Args:
        directory: path of the directory to write to.
        nbytes: bytes that will be written.
        files: number of files that will be written.
        free_bytes: free bytes of the disk.
    """
    return WriteError(
        message(
            "the disk has too little room",
            where=directory,
            expected=f"{size_text(nbytes)} for {files} {'file' if files == 1 else 'files'}",
            found=f"{size_text(free_bytes)} free, {size_text(nbytes - free_bytes)} too few",
            do="remove other files, or choose a directory on another disk",
        )
    )
