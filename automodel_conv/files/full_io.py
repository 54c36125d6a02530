"""Read or write many buffers in as few calls as possible, all of them or with an error that says how far it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from automodel_conv.errors import ConversionError, ReadError, WriteError, message
from automodel_conv.files import system

# Most buffers of one preadv. Source: UIO_MAXIOV in linux/uio.h; IOV_MAX is the same on macOS.
IOV_MAX = 1024


def read_exactly(fd: int, views: list[memoryview], offset: int, path: str) -> None:
    """Fill all ``views`` with the bytes that follow ``offset``, in as few calls as possible.

    Args:
        views: any number of writable, contiguous views of bytes; empty ones are skipped.
        offset: in bytes from the start of the file.
        path: for the error text alone.

    Raises:
        ReadError: the file ends too early, or the system reports an error.
    """
    _exactly(system.preadv, fd, views, offset, path, _READ)


def write_exactly(fd: int, views: list[memoryview], offset: int, path: str) -> None:
    """Write all ``views``, one after the other, from ``offset`` on.

    Args:
        views: any number of contiguous views of bytes; empty ones are skipped.
        offset: in bytes from the start of the file.
        path: for the error text alone.

    Raises:
        WriteError: the system reports an error, a full disk among them.
    """
    _exactly(system.pwritev, fd, views, offset, path, _WRITE)


class _Way(NamedTuple):
    """What the errors of one direction say."""

    error: type[ConversionError]
    fails: str
    ends: str
    do: str


_READ = _Way(
    ReadError, "cannot read a file", "a file ends too early", "the file is truncated: copy or download it again"
)


_WRITE = _Way(WriteError, "cannot write a file", "a file takes no more bytes", "look at the disk and its quota")


def _exactly(
    call: Callable[[int, list[memoryview], int], int],
    fd: int,
    views: list[memoryview],
    offset: int,
    path: str,
    way: _Way,
) -> None:
    pending = [view for view in views if len(view)]
    total = sum(map(len, pending))
    done = 0
    while done < total:
        try:
            count = call(fd, pending[:IOV_MAX], offset + done)
        except OSError as error:
            raise way.error(
                message(
                    way.fails,
                    where=f"{path}, byte {offset + done}",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{done} bytes, then: {error}",
                )
            ) from error
        if count == 0:
            raise way.error(
                message(
                    way.ends,
                    where=f"{path}, byte {offset + done}",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{done} bytes",
                    do=way.do,
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
