"""Raise errors of the system during a write as a WriteError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from automodel_conv.errors import WriteError, message


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
                do="check the disk space, the quota and the permissions",
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
            expected=f"{nbytes} bytes for {files} files",
            found=f"{free_bytes} bytes",
            do="remove other files, or choose a directory on another disk",
        )
    )
