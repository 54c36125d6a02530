"""Read or write many buffers completely in as few calls as possible, or raise an error that states the progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from automodel_conv.errors import ConversionError, ReadError, WriteError, message
from automodel_conv.files import system

# Maximum number of buffers of one preadv. Source: UIO_MAXIOV in linux/uio.h; IOV_MAX is the same on macOS.
IOV_MAX = 1024


def read_exactly(fd: int, views: list[memoryview], offset: int, path: str) -> None:
    """Fill all ``views`` with consecutive bytes of a file, starting at ``offset``.

    Args:
        fd: descriptor of the file.
        views: any number of writable, contiguous views of bytes; empty ones are skipped.
        offset: offset in bytes from the start of the file.
        path: path of the file, used only in error texts.

    Raises:
        ReadError: the file ends too early, or the system reports an error.
    """
    _transfer(system.preadv, fd, views, offset, path, _READ)


def write_exactly(fd: int, views: list[memoryview], offset: int, path: str) -> None:
    """Write all ``views`` to a file one after the other, starting at ``offset``.

    Args:
        fd: descriptor of the file.
        views: any number of contiguous views of bytes; empty ones are skipped.
        offset: offset in bytes from the start of the file.
        path: path of the file, used only in error texts.

    Raises:
        WriteError: the system reports an error, such as a full disk.
    """
    _transfer(system.pwritev, fd, views, offset, path, _WRITE)


class _Direction(NamedTuple):
    """The error texts of reading or of writing."""

    error: type[ConversionError]
    fails: str
    """Text for an error of the system."""
    do_if_fails: str
    """Advice for an error of the system."""
    ends: str
    """Text for a call that transfers no bytes."""
    do_if_ends: str
    """Advice for a call that transfers no bytes."""


_READ = _Direction(
    ReadError,
    "cannot read a file",
    "try again; if that fails too, check the disk or the network file system, and copy or download the file again",
    "a file ends too early",
    "the file is truncated: copy or download it again",
)


_WRITE = _Direction(
    WriteError,
    "cannot write a file",
    "check the disk space, the quota and the disk",
    "a file accepts no more bytes",
    "check the disk space and the quota",
)


def _transfer(
    call: Callable[[int, list[memoryview], int], int],
    fd: int,
    views: list[memoryview],
    offset: int,
    path: str,
    direction: _Direction,
) -> None:
    pending = [view for view in views if len(view)]
    total = sum(map(len, pending))
    done = 0
    while done < total:
        try:
            count = call(fd, pending[:IOV_MAX], offset + done)
        except OSError as error:
            raise direction.error(
                message(
                    direction.fails,
                    where=f"{path}, byte {offset + done}",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{done} bytes, then: {error}",
                    do=direction.do_if_fails,
                )
            ) from error
        if count == 0:
            raise direction.error(
                message(
                    direction.ends,
                    where=f"{path}, byte {offset + done}",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{done} bytes",
                    do=direction.do_if_ends,
                )
            )
        done += count
        if done < total:
            pending = _remaining(pending, count)


def _remaining(views: list[memoryview], count: int) -> list[memoryview]:
    """Return the part of ``views`` that follows their first ``count`` bytes."""
    full = 0
    while count >= len(views[full]):
        count -= len(views[full])
        full += 1
    return [views[full][count:], *views[full + 1 :]]
