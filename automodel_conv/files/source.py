"""``ByteSource``, the bytes of one file of a checkpoint on any storage, and ``LocalFile``, a file on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from automodel_conv.errors import ReadError, message
from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly

Identity = tuple[int, int] | str
SMALL_RANGE_BYTES = 1 << 20
"""Largest range that a remote source keeps in memory; see ``OpenSource.expect``."""


class OpenSource(Protocol):
    """An open source, shared by threads."""

    def size(self) -> int:
        """Return the size in bytes."""
        ...

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """State the ranges of bytes that this thread reads next.

        A remote source requests each range once. The bytes of a range are read in order; those of a range of at most
        ``SMALL_RANGE_BYTES`` in any order, and more than once. Other bytes may be read too, and ranges may be left
        unread.
        """
        ...

    def read_into(self, views: list[memoryview], offset: int) -> None:
        """Fill all ``views`` with consecutive bytes, starting at ``offset``.

        Raises:
            ReadError: the source ends too early, or cannot be read.
        """
        ...

    def descriptor(self) -> int | None:
        """Return the descriptor of a local file, which the system can map or copy; None for other sources."""
        ...

    def abort(self) -> None:
        """End reads in which other threads wait for a network; they raise ReadError."""
        ...

    def close(self) -> None:
        """Close the source.

        It must not be read afterwards.
        """
        ...


class ByteSource(Protocol):
    """The bytes of one file of a checkpoint on any storage."""

    @property
    def is_remote(self) -> bool:
        """Whether bytes come by requests over a network, so that many should be under way at the same time."""
        ...

    def describe(self) -> str:
        """Return a path or a URL for error texts."""
        ...

    def identity(self) -> Identity:
        """Return a JSON value that changes whenever the bytes do: size and modification time, or a version.

        Raises:
            OSError: the source does not exist any more.
        """
        ...

    def open(self) -> OpenSource:
        """Open the source for reading.

        Raises:
            OSError: the source cannot be opened.
        """
        ...


class LocalFile(NamedTuple):
    """A file on this machine."""

    path: str

    @property
    def is_remote(self) -> bool:
        return False

    def describe(self) -> str:
        return self.path

    def identity(self) -> Identity:
        return system.identity(self.path)

    def open(self) -> OpenSource:
        return _OpenFile(system.open_readonly(self.path), self.path)


class _OpenFile(NamedTuple):
    file: system.File
    path: str

    def size(self) -> int:
        return system.size(self.file.fileno())

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def read_into(self, views: list[memoryview], offset: int) -> None:
        read_exactly(self.file.fileno(), views, offset, self.path)

    def descriptor(self) -> int | None:
        return self.file.fileno()

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.file.close()


@contextmanager
def opened(source: ByteSource) -> Iterator[OpenSource]:
    """Open a source for the length of a block.

    Raises:
        ReadError: the source cannot be opened.
    """
    try:
        file = source.open()
    except OSError as error:
        raise ReadError(message("cannot open a file", where=source.describe(), found=error)) from error
    try:
        yield file
    finally:
        file.close()
